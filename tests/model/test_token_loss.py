"""The loss in chunks of tokens against whole logits, and against float64."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.aot.collectives import collectives
from darkformer_jax.distributed.sharding import MESH_AXES, make_mesh, sharding_of
from darkformer_jax.model import token_loss
from darkformer_jax.model.token_loss import LossFactors, Predictions, token_figures
from darkformer_jax.model.unembedding import Unembedding
from tests.tiny_runs import make_chunks, on_eight_devices

ROWS, VOCAB, WIDTH = (3, 7), 37, 16  # 21 tokens, which chunks of 5 do not divide; neither do they the vocabulary
FACTORS = {
    "text": LossFactors(nll=1.0),
    "text and z": LossFactors(nll=1.0, z=0.1),
    "teacher alone": LossFactors(nll=0.0, divergence=1.0),
    "all": LossFactors(nll=0.7, z=0.1, divergence=0.3),
}


def arrays(rows=ROWS, vocab=VOCAB, width=WIDTH, softcap=0.0, dtype="float32", seed=0):
    """(the model's predictions, a teacher's of another width, targets, weights of which a third are 0)."""
    random = np.random.default_rng(seed)
    sides = []
    for own_width, scale in ((width, 1.0), (width + 8, 2.0)):
        hidden = random.normal(size=(*rows, own_width)).astype(np.float32)
        matrix = scale * random.normal(size=(vocab, own_width)).astype(np.float32) * own_width**-0.5
        unembedding = Unembedding(jnp.asarray(matrix), dtype, softcap)
        sides.append(Predictions(jnp.asarray(hidden, dtype), unembedding))
    targets = random.integers(vocab, size=rows).astype(np.int32)
    weights = (random.random(rows) < 2 / 3).astype(np.float32)
    return *sides, jnp.asarray(targets), jnp.asarray(weights)


@pytest.fixture
def chunks_of(monkeypatch):
    """Sets how many tokens a chunk has."""
    return functools.partial(make_chunks, monkeypatch)


def losses_and_gradients(factors, model, teacher, targets, weights):
    """(loss, the figures of each token, the gradients of hidden states and matrix)."""

    @jax.jit
    def both(model):
        taught = teacher if factors.divergence else None
        return jax.value_and_grad(lambda m: token_loss.token_loss(m, targets, weights, factors, taught), has_aux=True)(
            model
        )

    (loss, figures), gradients = both(model)
    return jax.device_get((loss, figures, gradients.hidden, gradients.unembedding.matrix))


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def by_hand(factors, model, teacher, targets, weights):
    """The loss and its gradients in float64: of logits (softmax - onehot), times the slope of the soft-cap."""
    hidden, matrix = np.float64(model.hidden), np.float64(model.unembedding.matrix)
    cap = model.unembedding.softcap
    raw = np.einsum("bnd,vd->bnv", hidden, matrix)
    logits = cap * np.tanh(raw / cap) if cap else raw
    wanted = np.einsum("bnd,vd->bnv", np.float64(teacher.hidden), np.float64(teacher.unembedding.matrix))
    wanted = cap * np.tanh(wanted / cap) if cap else wanted
    log_p, log_q = log_softmax(wanted), log_softmax(logits)
    p, q, onehot = np.exp(log_p), np.exp(log_q), np.eye(logits.shape[-1])[targets]
    log_normalizer = np.log(np.exp(logits).sum(-1))
    loss = factors.nll * -(onehot * log_q).sum(-1)
    loss = loss + factors.z * log_normalizer**2 + factors.divergence * (p * (log_p - log_q)).sum(-1)
    slope = factors.nll * (q - onehot) + factors.divergence * (q - p) + 2 * factors.z * log_normalizer[..., None] * q
    slope = slope * (1 - np.tanh(raw / cap) ** 2 if cap else 1.0) * np.float64(weights)[..., None]
    of_matrix = np.einsum("bnv,bnd->vd", slope, hidden)
    return (np.float64(weights) * loss).sum(), np.einsum("bnv,vd->bnd", slope, matrix), of_matrix


def close(actual, expected, tolerance=1e-6):
    """To `tolerance` of the largest number."""
    actual, expected = np.float64(actual), np.float64(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
def test_chunks_give_the_loss_and_the_gradients_of_whole_logits(factors, softcap, chunks_of):
    given = arrays(softcap=softcap)
    whole = losses_and_gradients(factors, *given)
    chunks_of(5)
    chunked = losses_and_gradients(factors, *given)
    expected = by_hand(factors, *given)
    for measured in (whole, chunked):
        for actual, wanted in zip((measured[0], *measured[2:]), expected, strict=True):
            close(actual, wanted)
    for actual, wanted in zip(jax.tree.leaves(chunked), jax.tree.leaves(whole), strict=True):
        close(actual, wanted)


def test_what_has_no_gradient_says_the_same_in_chunks(chunks_of):
    model, _, targets, _ = arrays(softcap=3.0)
    whole = token_figures(model, targets)
    chunks_of(5)
    chunked = token_figures(model, targets)
    np.testing.assert_array_equal(chunked.best, np.argmax(model.unembedding.logits(model.hidden), axis=-1))
    for actual, wanted in zip(chunked[:3], whole[:3], strict=True):
        close(actual, wanted)


def test_a_matrix_in_bfloat16_gets_gradients_that_were_summed_in_float32(chunks_of):
    """2,048 tokens in chunks of 8: sums in bfloat16 would lose most of them."""
    model, *others = arrays(rows=(4, 512), dtype="bfloat16")
    matrix = jnp.asarray(model.unembedding.matrix, jnp.bfloat16)
    model = model._replace(unembedding=model.unembedding.with_matrix(matrix))
    chunks_of(8)
    _, _, of_hidden, of_matrix = losses_and_gradients(FACTORS["text"], model, *others)
    assert of_hidden.dtype == of_matrix.dtype == jnp.bfloat16
    _, expected_hidden, expected_matrix = by_hand(FACTORS["text"], model, *others)
    close(of_hidden, expected_hidden, 2**-7)
    close(of_matrix, expected_matrix, 2**-7)


def test_targets_and_weights_of_padding_count_nothing(chunks_of):
    """A chunk that is filled up with padding, and a batch of which no token counts."""
    model, teacher, targets, weights = arrays()
    chunks_of(20)  # two chunks of 11 tokens, of which one is padding
    loss, _, *gradients = losses_and_gradients(FACTORS["all"], model, teacher, targets, 0 * weights)
    assert loss == 0 and not any(gradient.any() for gradient in gradients)


def test_an_id_beyond_the_vocabulary_is_not_a_number_in_chunks_either(chunks_of):
    model, _, targets, _ = arrays()
    wrong = targets.at[1, 2].set(VOCAB)
    whole = token_figures(model, wrong).nll
    chunks_of(5)
    chunked = token_figures(model, wrong).nll
    assert np.argwhere(np.isnan(whole)).tolist() == np.argwhere(np.isnan(chunked)).tolist() == [[1, 2]]


def test_a_loss_of_hidden_states_alone_multiplies_by_the_matrix_once(chunks_of):
    """Its factors are 0: no gradient needs the products of the backward pass."""
    model, _, targets, weights = arrays()
    chunks_of(5)

    def loss(model, factors):
        return token_loss.token_loss(model, targets, weights, factors)

    gradient = jax.value_and_grad(loss, has_aux=True)
    program = jax.make_jaxpr(gradient, static_argnums=1)
    nothing = LossFactors(nll=0.0)
    assert str(program(model, FACTORS["text"])).count("dot_general") == 3
    assert str(program(model, nothing)).count("dot_general") == 1
    (value, figures), gradients = gradient(model, nothing)
    assert value == 0 and not any(leaf.any() for leaf in jax.tree.leaves(gradients))
    close(figures.nll, token_figures(model, targets).nll)


def test_chunks_are_for_logits_that_are_large():
    """The bound is 256 MiB of float32, and a chunk never has fewer than 1,024 tokens if there are more."""
    assert token_loss.tokens_at_once((8, 256), 2048) == 2048  # the quickstart's step: whole
    assert token_loss.tokens_at_once((1, 1024), 256_128) == 1024
    assert token_loss.tokens_at_once((1, 1025), 256_128) == 513  # two chunks, one token of padding
    assert token_loss.tokens_at_once((1, 8192), 256_128) == 1024
    assert token_loss.tokens_at_once((4, 1024), 49_152) == 1024  # 1,365 would do, but 4 chunks are needed even so


def test_no_array_of_the_program_has_the_logits_of_all_tokens(chunks_of):
    rows, vocab = (4, 256), 4096
    model, teacher, targets, weights = arrays(rows, vocab)

    def peak(factors):
        taught = teacher if factors.divergence else None
        gradient = jax.grad(lambda m: token_loss.token_loss(m, targets, weights, factors, taught)[0])
        return jax.jit(gradient).lower(model).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * rows[0] * rows[1] * vocab
    for factors in (FACTORS["text and z"], FACTORS["all"]):
        chunks_of(rows[0] * rows[1])
        assert peak(factors) > logits  # else the next line could not fail
        chunks_of(32)
        assert peak(factors) < logits / 4


# data, fsdp, tensor, context
MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2), (1, 1, 1, 8)]
# Rows and places that every mesh divides, then rows that `data` and `fsdp` do not, which the compiler splits.
SPLIT_ROWS = [((8, 16), MESHES), ((3, 16), [(2, 2, 2, 1)])]


def on_eight():
    """([[rows, the loss and the gradients in chunks of 3 tokens per device]] with arrays as nested lists, `sent()`)."""
    token_loss._TOKENS, token_loss._LOGITS = 3, 1
    out = []
    for rows, meshes in SPLIT_ROWS:
        for sizes in meshes:
            mesh = make_mesh(dict(zip(MESH_AXES, sizes, strict=True)))
            model, *others = arrays(rows, vocab=40)
            sharding = sharding_of("matrix", ("vocab", "embed"), model.unembedding.matrix.shape, mesh)
            matrix = jax.device_put(model.unembedding.matrix, sharding)
            with jax.set_mesh(mesh):
                given = model._replace(unembedding=model.unembedding.with_matrix(matrix))
                loss, figures, *gradients = losses_and_gradients(FACTORS["all"], given, *others)
            leaves = [loss, *jax.tree.leaves(figures), *gradients]
            out.append([list(rows), [np.asarray(leaf).tolist() for leaf in leaves]])
    return out, sent()


def sent():
    """Of the gradient of a matrix that eight devices share: the bytes of the largest message of each kind."""
    mesh = make_mesh({"fsdp": 8})
    model, *others = arrays((8, 16), vocab=1000)
    sharding = sharding_of("matrix", ("vocab", "embed"), model.unembedding.matrix.shape, mesh)
    matrix = jax.device_put(model.unembedding.matrix, sharding)

    def loss(matrix):
        given = model._replace(unembedding=model.unembedding.with_matrix(matrix))
        return token_loss.token_loss(given, others[1], others[2], FACTORS["text"])[0]

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss)).lower(matrix).compile().as_text()
    largest: dict[str, int] = {}
    for message in collectives(program, [0] * 8)[0]:
        largest[message.kind] = max(message.num_bytes, largest.get(message.kind, 0))
    return largest


def test_eight_devices_have_the_loss_and_the_gradients_of_one(tmp_path):
    code = "import json; from tests.model.test_token_loss import on_eight; print(json.dumps(on_eight()))"
    (tmp_path / "program.py").write_text(code)
    ended = on_eight_devices(tmp_path / "program.py", tmp_path).wait()
    assert ended.status == 0, ended.err
    measured, largest = json.loads(ended.out.splitlines()[-1])
    assert len(measured) == len(MESHES) + 1
    # The gradients of the matrix are never summed to a whole one, which would be a second one in memory.
    matrix = 4 * 1000 * WIDTH  # bytes
    assert largest["reduce-scatter"] == matrix and largest.get("all-reduce", 0) <= matrix / 8
    for rows, leaves in measured:
        loss, figures, *gradients = losses_and_gradients(FACTORS["all"], *arrays(tuple(rows), vocab=40))
        for actual, wanted in zip(leaves, [loss, *jax.tree.leaves(figures), *gradients], strict=True):
            close(actual, wanted)
