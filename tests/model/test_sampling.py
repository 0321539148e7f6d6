import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.config.specs import model_spec
from darkformer_jax.errors import UserError
from darkformer_jax.model import sampling
from darkformer_jax.model.network import Network
from darkformer_jax.model.sampling import Sampler, continue_prompts, filter_logits
from darkformer_jax.ops.state import NEG
from tests.tiny_runs import tiny_config

VOCAB = 23
# Shorter than, as long as and longer than a chunk of 16, and than what prompts are padded to.
PROMPTS = [list(map(int, np.random.default_rng(n).integers(0, VOCAB, n))) for n in (1, 5, 16, 19)]


@functools.cache
def model(kind):
    window = 16 if kind == "hybrid" else 0
    kind = "dark" if kind == "hybrid" else kind
    network = Network.of(model_spec(tiny_config(model__attention__kind=kind, model__attention__window=window), VOCAB))
    params, projections = jax.jit(network.init)(jax.random.key(3))
    params = jax.tree.map(lambda x: 1.5 * x, params)  # an untrained model's likeliest token is the last one again
    return network, params, projections


@functools.cache
def full_logits(kind):
    network, params, projections = model(kind)

    def logits(tokens):  # padded at the end, which causal attention does not see
        ones = jnp.ones(tokens.shape, jnp.int32)
        return network.bind(params, projections)(tokens, ones, jnp.arange(tokens.shape[1])[None])[0]

    return jax.jit(logits)


def next_logits(kind, tokens):
    padded = np.zeros((1, 48), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(full_logits(kind)(padded))[0, len(tokens) - 1]


def written(sampler, prompts, count):
    return np.stack(list(sampler.stream(prompts, count)), axis=1).tolist()


@pytest.mark.parametrize("kind", ["dark", "hybrid", "softmax", "mamba2", "gated_deltanet"])
def test_long_prompts_are_read_piece_by_piece(kind, monkeypatch):
    """Of four prompts in one batch, two end in the first piece of 8 tokens, one at the end of the second."""
    whole = written(Sampler(*model(kind), temperature=0), PROMPTS, 8)
    monkeypatch.setattr(sampling, "PIECE", 8)
    assert written(Sampler(*model(kind), temperature=0), PROMPTS, 8) == whole


def test_reading_exact_attentions_prompt_takes_no_square_of_its_length():
    network, params, projections = model("softmax")

    def peak(length):
        sampler = Sampler(network, params, projections, temperature=0)
        tokens, lengths = np.zeros((1, length), np.int32), np.full(1, length, np.int32)
        lowered = sampler._prefill.lower(params, projections, tokens, lengths, jax.random.key(0), room=length + 1)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    short, long = peak(2 * sampling.PIECE), peak(4 * sampling.PIECE)
    assert long < 2.5 * short


@pytest.mark.parametrize("kind", ["dark", "hybrid", "softmax", "mamba2", "gated_deltanet"])
def test_greedy_is_the_argmax_of_a_full_forward_pass_at_each_step(kind):
    new = written(Sampler(*model(kind), temperature=0), PROMPTS, 20)
    assert len({token for row in new for token in row}) > 4
    for prompt, row in zip(PROMPTS, new, strict=True):
        tokens = list(prompt)
        for token in row:
            logits = next_logits(kind, tokens)
            assert logits[token] >= logits.max() - 1e-4, (len(prompt), len(tokens))
            tokens.append(token)


def test_a_prompt_alone_is_continued_as_in_a_batch():
    sampler = Sampler(*model("dark"), temperature=0)
    together = written(sampler, PROMPTS, 20)
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert written(sampler, [prompt], 20) == [row]


def test_a_batch_does_not_change_a_prompts_probabilities():
    sampler = Sampler(*model("dark"), temperature=0)
    tokens = np.zeros((4, 32), np.int32)
    lengths = np.array([len(prompt) for prompt in PROMPTS], np.int32)
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    network, params, projections = model("dark")
    key = jax.random.key(0)
    _, together = sampler._prefill(params, projections, tokens, lengths, key, room=40)

    def logits_after(state, token, position):
        bound = network.bind(params, projections)
        ones = jnp.ones((len(token), 1), jnp.int32)
        hidden, _ = bound.hidden(token[:, None], ones, position[:, None], state)
        return bound.logits(hidden[:, 0])

    step = jax.jit(logits_after)
    of_batch = np.asarray(step(together, np.full(4, 7), lengths))
    for row, prompt in enumerate(PROMPTS):
        _, alone = sampler._prefill(params, projections, tokens[row : row + 1], lengths[row : row + 1], key, room=40)
        np.testing.assert_allclose(step(alone, np.full(1, 7), lengths[row : row + 1])[0], of_batch[row], atol=1e-5)
        np.testing.assert_allclose(next_logits("dark", [*prompt, 7]), of_batch[row], atol=1e-4)


def test_a_seed_is_a_text():
    new = [written(Sampler(*model("dark"), temperature=2.0, seed=seed), PROMPTS, 12) for seed in (0, 0, 1)]
    assert new[0] == new[1] != new[2]
    same_prompt = written(Sampler(*model("dark"), temperature=2.0), [PROMPTS[1]] * 3, 12)
    assert len(set(map(tuple, same_prompt))) == 3  # each row of a batch draws for itself


def test_the_state_of_dark_does_not_grow_with_what_is_written():
    def size(kind, count):
        network, params, projections = model(kind)
        state = jax.eval_shape(lambda: network.bind(params, projections).init_state(2, count))
        return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(state))

    assert size("dark", 10) == size("dark", 100_000)
    assert size("hybrid", 10) == size("hybrid", 100_000)
    assert size("softmax", 100_000) > 1000 * size("softmax", 10)  # what the others are compared with


def reference_filter(logits, temperature, top_k, top_p):
    """The probabilities that are left, by sorting in numpy."""
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    if top_k:
        probabilities[order[top_k:]] = 0
        probabilities /= probabilities.sum()
    if top_p < 1:
        kept = np.searchsorted(np.cumsum(probabilities[order]), top_p) + 1  # the smallest set that reaches top_p
        probabilities[order[kept:]] = 0
    return probabilities / probabilities.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (99, 1.0), (0, 0.3), (0, 0.9), (6, 0.6)])
def test_filters_equal_a_reference(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(8, VOCAB)).astype(np.float32) * 2
    kept = filter_logits(jnp.asarray(logits), temperature=temperature, top_k=top_k, top_p=top_p)
    wanted = np.stack([reference_filter(row, temperature, top_k, top_p) for row in logits])
    np.testing.assert_allclose(jax.nn.softmax(kept), wanted, atol=1e-6)
    np.testing.assert_array_equal(kept == NEG, wanted == 0)
    assert (wanted > 0).any(axis=1).all()


def test_the_first_token_of_top_p_always_stays():
    kept = filter_logits(jnp.array([[0.0, 5.0, 1.0]]), temperature=1.0, top_k=0, top_p=1e-6)
    assert (np.asarray(kept > NEG) == [[False, True, False]]).all()


@pytest.mark.parametrize(
    "options",
    [
        *({"temperature": temperature} for temperature in (5e-324, 1e-40, 1e-37, 1e-20)),
        *({"temperature": 1.5, "top_p": top_p} for top_p in (5e-324, 1e-40)),
        {"temperature": 1e-40, "top_k": 3, "top_p": 0.5},
    ],
)
def test_options_too_small_for_float32_take_the_likeliest_token(options):
    tokens = np.ravel(written(Sampler(*model("dark"), **options), PROMPTS, 1))
    for prompt, token in zip(PROMPTS, tokens, strict=True):
        logits = next_logits("dark", prompt)
        assert logits[token] >= logits.max() - 1e-4


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.5}, {"temperature": 2.0, "top_k": 8, "top_p": 0.8}])
def test_draws_have_the_filtered_probabilities(options):
    prompt, copies = PROMPTS[1], 2000
    sampler = Sampler(*model("dark"), **options)
    tokens = next(sampler.stream([prompt] * copies, 1))
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    wanted = reference_filter(next_logits("dark", prompt), **full)
    counts = np.bincount(tokens, minlength=VOCAB)
    assert counts[wanted == 0].sum() == 0
    possible = wanted > 0
    chi_square = ((counts - copies * wanted) ** 2 / (copies * np.where(possible, wanted, 1)))[possible].sum()
    freedom = possible.sum() - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


class Fixed:
    """A sampler that writes what it is told."""

    def __init__(self, columns):
        self.columns, self.taken = columns, 0

    def stream(self, prompts, max_new_tokens):
        for column in self.columns[:max_new_tokens]:
            self.taken += 1
            yield np.array(column)


def test_a_document_ends_at_eos_and_the_batch_when_all_have_ended():
    sampler = Fixed([[1, 2], [9, 3], [4, 9], [5, 5]])
    assert continue_prompts(sampler, [[0], [0]], 10, ends={9}) == [[1], [2, 3]]
    assert sampler.taken == 3
    assert continue_prompts(Fixed([[1, 2], [9, 3], [4, 9]]), [[0], [0]], 2, ends={9}) == [[1], [2, 3]]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
    ],
)
def test_options_out_of_range_are_refused(options):
    name = next(iter(options))
    with pytest.raises(UserError, match=f"{name} = {options[name]}"):
        Sampler(*model("softmax"), **options)


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_without_a_token_there_is_no_prompt(prompts):
    with pytest.raises(UserError, match="no prompt, or one has no tokens"):
        next(Sampler(*model("softmax")).stream(prompts, 3))


def test_ids_beyond_the_tokenizers_vocabulary_are_never_drawn():
    written_ids = [written(Sampler(*model("dark"), temperature=t, vocab_size=7), PROMPTS, 12) for t in (0, 5.0)]
    assert all(max(token for row in rows for token in row) < 7 for rows in written_ids)
    assert max(token for row in written(Sampler(*model("dark"), temperature=5.0), PROMPTS, 12) for token in row) >= 7
