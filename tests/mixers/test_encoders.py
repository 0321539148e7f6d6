"""The mechanisms that no causal model can have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import NystromformerConfig, ReformerConfig
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from darkformer_jax.config import base
from darkformer_jax.config.validation import validate
from darkformer_jax.errors import UserError
from darkformer_jax.mixers.linformer import Linformer
from darkformer_jax.mixers.nystromformer import Nystromformer, pseudo_inverse
from darkformer_jax.mixers.reformer import Reformer
from tests.tasks.labelled_files import labelled_config, write_labelled
from tests.tiny_runs import metrics_without_time, run, tiny_config
from tests.tiny_specs import mixer_spec

KINDS = {"linformer": Linformer, "nystromformer": Nystromformer, "reformer": Reformer}
LENGTH = 32
random = np.random.default_rng(0)


def make(kind, **options):
    horizon = {"horizon": 40} if kind == "linformer" else {}
    return KINDS[kind](mixer_spec(kind, **{"num_features": 8, "causal": False} | horizon | options), 0)


def tokens(length=LENGTH, heads=4, kv_heads=2, rows=1):
    return [random.standard_normal((rows, length, h, 8)).astype(np.float32) for h in (heads, kv_heads, kv_heads)]


def attend(mixer, qkv, segment_ids=None):
    ids = np.ones(qkv[0].shape[:2], np.int32) if segment_ids is None else segment_ids
    call = jax.jit(lambda q, k, v, ids: mixer(q, k, v, segment_ids=ids, positions=0 * ids)[0])
    return np.asarray(call(*qkv, ids))


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_linformer_is_softmax_over_mixtures_of_keys_in_values_and_gradients():
    mixer = make("linformer")
    E, F = (np.asarray(x[...], np.float64)[:LENGTH] for x in (mixer.E, mixer.F))
    qkv, cotangent = tokens(), random.standard_normal((1, LENGTH, 4, 8))

    def by_definition(q, k, v):
        q, k, v = (x[0].transpose(1, 0, 2) for x in (q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)))
        logits = q @ (E.T @ k).transpose(0, 2, 1) / np.sqrt(8)
        return (jax.nn.softmax(logits, axis=-1) @ (F.T @ v)).transpose(1, 0, 2)[None]

    with jax.enable_x64(True):
        want, pull = jax.vjp(jax.jit(by_definition), *(x.astype(np.float64) for x in qkv))
        gradients = pull(jnp.asarray(cotangent))
    ids = jnp.ones((1, LENGTH), jnp.int32)
    call = jax.jit(lambda q, k, v: mixer(q, k, v, segment_ids=ids, positions=0 * ids)[0])
    out, pull = jax.vjp(call, *qkv)
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
    for got, wanted in zip(pull(jnp.asarray(cotangent, jnp.float32)), gradients, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_nystromformer_is_that_of_transformers_from_the_same_weights():
    # One head and one text, because theirs scales the pseudo-inverses of all heads and texts by one number.
    mixer = make("nystromformer", num_heads=1, num_kv_heads=1)
    config = NystromformerConfig(
        hidden_size=8, num_attention_heads=1, num_landmarks=8, segment_means_seq_len=LENGTH, conv_kernel_size=33
    )
    torch.manual_seed(0)
    theirs = NystromformerSelfAttention(config).eval().double()
    x = torch.tensor(random.standard_normal((1, LENGTH, 8)))
    qkv = []
    with torch.no_grad():
        theirs.conv.weight.copy_(torch.tensor(np.asarray(mixer.kernel[...]).T[:, None, :, None]))
        for linear in (theirs.query, theirs.key, theirs.value):
            linear.weight.mul_(20)  # q and k as large as those of trained models
            qkv.append(linear(x).float().numpy()[:, :, None])
        want = theirs(x)[0].numpy()
    # B^+ multiplies what float32 rounds. Of 60 seeds the worst was 5e-6 here, and 1e-5 in theirs with float32.
    np.testing.assert_allclose(attend(mixer, qkv)[:, :, 0], want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("length", [5, 8])
def test_nystromformer_with_a_landmark_per_token_is_exact_attention_and_its_convolution(length):
    mixer = make("nystromformer")
    _, _, v = tokens(length)
    # Orthogonal keys, and queries near them: the softmax of their products has no small singular value.
    k = np.stack([2 * np.linalg.qr(random.standard_normal((8, 8)))[0][:length] for _ in range(2)], axis=1)[None]
    q = k.repeat(2, axis=2) * np.array([1.0, 1.2, 1.4, 1.6])[:, None] + 0.1 * random.standard_normal((1, length, 4, 8))
    heads = [x[0].astype(np.float64).transpose(1, 0, 2) for x in (q, k.repeat(2, axis=2), v.repeat(2, axis=2))]
    want = softmax(heads[0] @ heads[1].transpose(0, 2, 1) / np.sqrt(8)) @ heads[2]
    assert np.abs(want - heads[2]).max() > 0.3  # it mixes
    kernel = np.asarray(mixer.kernel[...], np.float64)
    for n in range(length):
        for j in range(length):
            want[:, n] += kernel[16 + j - n][:, None] * heads[2][:, j]
    out = attend(mixer, [q.astype(np.float32), k.astype(np.float32), v])
    np.testing.assert_allclose(out[0].transpose(1, 0, 2), want, rtol=1e-4, atol=1e-4)


def test_the_pseudo_inverse_is_one():
    matrices = softmax(3 * random.standard_normal((2, 3, 6, 6)))
    inverse = np.asarray(pseudo_inverse(jnp.asarray(matrices, jnp.float32)))
    apart = np.abs(matrices @ inverse @ matrices - matrices).max()
    assert apart < 0.05  # six steps do not reach small singular values


@pytest.mark.parametrize("num_hashes", [1, 2])
def test_reformer_is_that_of_transformers_from_the_same_weights_and_rotations(num_hashes):
    mixer = make("reformer", num_kv_heads=4, num_hashes=num_hashes)
    config = ReformerConfig(
        hidden_size=32, num_attention_heads=4, attention_head_size=8, num_hashes=num_hashes, num_buckets=8,
        lsh_attn_chunk_length=8, lsh_num_chunks_before=1, lsh_num_chunks_after=0, is_decoder=False, hash_seed=3,
        lsh_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = LSHSelfAttention(config).eval().double()
    torch.manual_seed(config.hash_seed)
    rotations = torch.randn((4, 8, num_hashes, 4), dtype=torch.float64)  # as `_hash_vectors` draws them
    mixer.rotations[...] = jnp.asarray(rotations.numpy().transpose(2, 0, 1, 3), jnp.float32)
    x, cotangent = (random.standard_normal((2, 48, 32)) for _ in range(2))
    qk, v = (random.standard_normal((32, 32)) * 32**-0.5 for _ in range(2))
    with torch.no_grad():
        theirs.query_key.weight.copy_(torch.tensor(3 * qk.T))
        theirs.value.weight.copy_(torch.tensor(v.T))
    wide = torch.tensor(x, requires_grad=True)
    want = theirs(wide).hidden_states
    want.backward(torch.tensor(cotangent))

    @jax.jit
    def ours(x):
        q, values = ((x @ weight.astype(np.float32)).reshape(2, 48, 4, 8) for weight in (3 * qk, v))
        ids = jnp.ones((2, 48), jnp.int32)
        return mixer(q, q, values, segment_ids=ids, positions=ids)[0].reshape(2, 48, 32)

    out, pull = jax.vjp(ours, x.astype(np.float32))
    want, gradient = want.detach().numpy(), wide.grad.numpy()
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-5 * np.abs(want).max())
    got = pull(jnp.asarray(cotangent, jnp.float32))[0]
    np.testing.assert_allclose(got, gradient, rtol=0, atol=1e-5 * np.abs(gradient).max())


@pytest.mark.parametrize("length", [1, 5, 8, 13, 19, LENGTH])
def test_reformer_by_hand(length):
    mixer = make("reformer", num_hashes=3)
    qkv = tokens(length)
    q, v = (x[0].astype(np.float64) for x in (qkv[0], qkv[2].repeat(2, axis=2)))
    rotations = np.asarray(mixer.rotations[...], np.float64)
    want = np.zeros_like(q)
    for head in range(4):
        keys = q[:, head] / np.linalg.norm(q[:, head], axis=-1, keepdims=True)
        chunks = []
        for rotation in rotations[:, head]:
            rotated = q[:, head] @ rotation
            order = np.argsort(np.argmax(np.concatenate([rotated, -rotated], axis=-1), axis=-1), kind="stable")
            chunks += [order[start : start + 8] for start in range(0, length, 8)]
        sums, weighed = np.zeros((length, 1)), np.zeros((length, 8))
        for number, chunk in enumerate(chunks):
            near = chunk if length <= 8 else np.concatenate([chunk, chunks[number - 1]])
            for i in chunk:
                others = near[near != i] if length > 1 else near
                weights = np.exp(keys[others] @ q[i, head])
                sums[i] += weights.sum()
                weighed[i] += weights @ v[others, head]
        want[:, head] = weighed / sums
    np.testing.assert_allclose(attend(mixer, qkv)[0], want, rtol=1e-4, atol=1e-5)


def test_reformer_has_no_projection_to_k_and_an_even_number_of_buckets():
    spec = mixer_spec("reformer", num_features=8, causal=False, embed_dim=24, qk_norm=True)
    layer = Reformer.build(spec, 0, rngs=nnx.Rngs(params=0))
    names = {"/".join(path) for path, _ in nnx.to_flat_state(nnx.state(layer))}
    assert names == {"q/kernel", "q_norm/scale", "v/kernel", "out/kernel", "mechanism/rotations"}
    assert Reformer.flops(spec, 16) == (
        2 * 24 * (32 + 16 + 32)  # q, v and out
        + 2 * 4 * (8 * 8 + 4 * 8 * 16)  # two rounds: hash, and 16 keys
    )  # fmt: skip
    with pytest.raises(UserError, match="num_features = 7: 'reformer' has as many buckets; must be even"):
        Reformer.check(mixer_spec("reformer", num_features=7, causal=False))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 5, 19])
def test_a_text_has_the_same_outputs_whatever_stands_beside_it_and_however_it_is_padded(kind, length):
    mixer = make(kind)
    alone = tokens(length)
    padded = [np.concatenate([x, np.full((1, LENGTH - length, *x.shape[2:]), np.nan, np.float32)], 1) for x in alone]
    rows = [np.concatenate([x, y]) for x, y in zip(padded, tokens(), strict=True)]
    ids = np.stack([(np.arange(LENGTH) < length), np.ones(LENGTH)]).astype(np.int32)
    out = attend(mixer, rows, ids)
    np.testing.assert_allclose(out[0, :length], attend(mixer, alone)[0], rtol=1e-4, atol=1e-5)
    assert (out[0, length:] == 0).all() and np.isfinite(out).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_padding_gives_zeros_and_finite_gradients(kind):
    mixer, ids = make(kind), jnp.zeros((1, LENGTH), jnp.int32)
    grad = jax.jit(jax.grad(lambda q, k, v: mixer(q, k, v, segment_ids=ids, positions=ids)[0].sum(), argnums=(0, 1, 2)))
    assert all((np.asarray(x) == 0).all() for x in grad(*tokens()))
    assert (attend(mixer, tokens(), np.zeros((1, LENGTH), np.int32)) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_refused_in_causal_models_and_with_what_they_do_not_have(kind):
    config = base.get_config()
    config.model.attention.update(kind=kind, window=64)  # that no flag but one mends it is said alone
    with pytest.raises(
        UserError, match=f"^model.causal = True: in '{kind}' a token depends on later ones; allowed: False"
    ):
        validate(config, ["model.attention.kind"])
    config.model.attention.update(window=0, horizon=512 if kind == "linformer" else 0)
    for fields, message in (
        ({"positions": "alibi"}, "model.attention.positions = 'alibi'"),
        ({"conv_width": 4}, "conv_width = 4: no"),
        ({"window": 64}, "window = 64: no"),
    ):
        changed = config.copy_and_resolve_references()
        changed.model.causal = False
        changed.task.name = "classification"
        changed.model.attention.update(fields)
        with pytest.raises(UserError, match=message):
            validate(changed)
    with pytest.raises(UserError, match="cannot continue a text"):
        make(kind).init_state(1, 8, jnp.float32)


def test_linformer_refuses_more_tokens_than_its_horizon():
    with pytest.raises(UserError, match="horizon = 20 with 32 tokens: must be at least as many"):
        attend(make("linformer", horizon=20), tokens())


@pytest.mark.standard_promotion
@pytest.mark.parametrize("kind", ["linformer", "reformer"])
def test_they_train_and_are_scored(kind, tmp_path):
    options = {"horizon": tiny_config().sequence_length} if kind == "linformer" else {"chunk_size": 8}
    config = labelled_config(
        write_labelled(tmp_path / "mails.jsonl"),
        **{f"model__attention__{name}": value for name, value in options.items()},
        model__attention__kind=kind,
        model__causal=False,
        num_steps=3,
    )
    run(config, tmp_path / "run")
    assert metrics_without_time(tmp_path / "run")[-1]["heldout_loss"] > 0
