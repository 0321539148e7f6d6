"""Gated random feature attention beside its definition in float64, and beside the recurrence of transformers' xLSTM."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.xlstm import modeling_xlstm

from darkformer_jax.config import base
from darkformer_jax.config.validation import validate
from darkformer_jax.errors import UserError
from darkformer_jax.mixers.rfa_gate import FLOOR, RFAGate
from darkformer_jax.mixers.spec import Geometry, Projection
from tests.tiny_specs import mixer_spec

LENGTH = 37
IDS = jnp.ones((1, LENGTH), jnp.int32)


@pytest.fixture
def random():
    return np.random.default_rng(0)


def make(random, **changes):
    mixer = RFAGate(mixer_spec("rfa_gate", **{"decay": "gate", "num_features": 16} | changes), 0)
    mixer.sigma[...] = jnp.asarray(1 + 0.5 * random.random(mixer.sigma.shape), jnp.float32)
    return mixer


def tokens(random, length=LENGTH):
    """(q, k, v, gates): gates near 0 and near 1, too."""
    q, k, v = (random.standard_normal((1, length, heads, 8)) for heads in (4, 2, 2))
    gates = 1 / (1 + np.exp(-3 * random.standard_normal((1, length, 2))))
    return q, k, v, gates


def attend(mixer, ids=IDS, positions=0 * IDS):
    def call(q, k, v, log_decay):
        return mixer(q, k, v, segment_ids=ids, positions=positions, log_decay=log_decay)[0]

    return jax.jit(call)


def recurrence(phi_q, phi_k, v, gates):
    """The paper's, one token after the other, with its normaliser floored; arrays [n, ...] of one head."""

    def step(carry, token):
        (S, z), (phi_q, phi_k, v, g) = carry, token
        S, z = g * S + (1 - g) * jnp.outer(phi_k, v), g * z + (1 - g) * phi_k
        return (S, z), phi_q @ S / jnp.maximum(jnp.abs(phi_q @ z), FLOOR)

    start = jnp.zeros((phi_k.shape[1], v.shape[1])), jnp.zeros(phi_k.shape[1])
    return jax.lax.scan(step, start, (phi_q, phi_k, v, gates))[1]


def features(x, w, sigma):
    """x [n, d] -> [n, 2 m]."""
    angles = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) * sigma[None]) @ w.T
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1) / np.sqrt(len(w))


def test_it_is_the_recurrence_in_values_and_all_gradients(random):
    mixer, inputs = make(random), tokens(random)
    graphdef, sigma, rest = nnx.split(mixer, Geometry, ...)
    cotangent = random.standard_normal(inputs[0].shape)
    w = np.asarray(mixer.projections[...], np.float64)

    def by_definition(sigma, q, k, v, log_decay):
        heads = [
            recurrence(
                features(q[0, :, head], w[head // 2], sigma[head // 2]),
                features(k[0, :, head // 2], w[head // 2], sigma[head // 2]),
                v[0, :, head // 2],
                jnp.exp(log_decay[0, :, head // 2]),
            )
            for head in range(4)
        ]
        return jnp.stack(heads, axis=1)[None]

    arguments = (*inputs[:3], np.log(inputs[3]))
    with jax.enable_x64(True):
        wide = (np.asarray(mixer.sigma[...], np.float64), *arguments)
        want, pull = jax.vjp(jax.jit(by_definition), *wide)
        wanted = jax.tree.map(np.asarray, pull(jnp.asarray(cotangent)))

    @jax.jit
    def ours(sigma, *arrays):
        return attend(nnx.merge(graphdef, sigma, rest))(*arrays)

    out, pull = jax.vjp(ours, sigma, *(x.astype(np.float32) for x in arguments))
    np.testing.assert_allclose(out, want, rtol=0, atol=2e-5 * np.abs(want).max())
    got = jax.tree.leaves(pull(jnp.asarray(cotangent, jnp.float32)))
    assert len(got) == len(wanted) == 5
    for ours, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4 * np.abs(theirs).max())


def test_it_is_the_gated_recurrence_of_transformers_xlstm_on_the_same_features(random):
    # exp(input gate) = (1 - g) / FLOOR turns the floor of their normaliser, which is 1, into ours.
    mixer, (q, k, v, gates) = make(random, num_kv_heads=4), tokens(random)
    k, v, gates = (x.repeat(2, axis=2) for x in (k, v, gates))
    w, sigma = (torch.tensor(np.asarray(x[...], np.float64)) for x in (mixer.projections, mixer.sigma))

    def theirs(x):
        unit = torch.nn.functional.normalize(torch.tensor(x[0]).transpose(0, 1), dim=-1)
        angles = torch.einsum("hnd,hmd->hnm", unit * sigma[:, None], w)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)[None] / 4

    gate = torch.tensor(gates[0].T)[None]
    want = modeling_xlstm.mlstm_recurrent_sequence_native(
        query=theirs(q) * 32**0.5,  # theirs divides by the root of the number of features
        key=theirs(k),
        value=torch.tensor(v[0]).transpose(0, 1)[None],
        igate=torch.log((1 - gate) / FLOOR),
        fgate=torch.logit(gate),
        eps=0,
        dtype_state=torch.float64,
    )[0].transpose(0, 1)
    out = attend(mixer)(*(x.astype(np.float32) for x in (q, k, v, np.log(gates))))
    np.testing.assert_allclose(out[0], want, rtol=0, atol=2e-5 * np.abs(want.numpy()).max())


def test_features_estimate_a_gaussian_kernel_of_directions(random):
    mixer = make(random, num_features=4096, num_heads=2)
    q, k = (random.standard_normal((1, 20, 2, 8)) for _ in range(2))
    phi = [np.asarray(mixer._features(jnp.asarray(x, jnp.float32)))[0] for x in (q, k)]
    sigma = np.asarray(mixer.sigma[...], np.float64)
    apart = sigma * (q / np.linalg.norm(q, axis=-1, keepdims=True) - k / np.linalg.norm(k, axis=-1, keepdims=True))[0]
    kernel = np.exp(-np.sum(apart**2, axis=-1) / 2)
    np.testing.assert_allclose(np.sum(phi[0] * phi[1], axis=-1), kernel, atol=4 * 4096**-0.5)
    np.testing.assert_allclose(np.sum(phi[0] ** 2, axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize("log_gate", [-np.inf, -1e4, -80.0, -1e-30, 0.0])
def test_gates_near_0_and_1_give_no_nan(random, log_gate):
    mixer, (q, k, v, _) = make(random), tokens(random)
    log_decay = np.full((1, LENGTH, 2), log_gate, np.float32)
    out, pull = jax.vjp(attend(mixer), *(x.astype(np.float32) for x in (q, k, v)), log_decay)
    assert all(np.all(np.isfinite(x)) for x in (out, *pull(jnp.ones_like(out))))
    if log_gate < -1:  # each token sees itself alone
        phi = [np.asarray(mixer._features(jnp.asarray(x, jnp.float32)), np.float64) for x in (q, k)]
        kernel = np.sum(phi[0] * phi[1].repeat(2, axis=2), axis=-1, keepdims=True)
        want = kernel * v.repeat(2, axis=2) / np.maximum(np.abs(kernel), FLOOR)
        np.testing.assert_allclose(out, want, atol=1e-3)
    else:
        assert np.abs(out).max() < 1e-6


def test_a_vector_of_zeros_gives_no_nan(random):
    mixer, (q, k, v, gates) = make(random), tokens(random)
    arrays = [x.astype(np.float32) for x in (0 * q, 0 * k, v, np.log(gates))]
    out, pull = jax.vjp(attend(mixer), *arrays)
    assert all(np.all(np.isfinite(x)) for x in (out, *pull(jnp.ones_like(out))))


def test_chunks_change_the_cost_alone_and_bfloat16_is_near(random):
    state = random.bit_generator.state
    q, k, v, gates = tokens(random)
    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    log_decay = jnp.asarray(np.log(gates), jnp.float32)
    outs = []
    for chunk_size in (8, 13):
        random.bit_generator.state = state
        outs.append(attend(make(random, chunk_size=chunk_size))(*arrays, log_decay))
    np.testing.assert_allclose(outs[1], outs[0], rtol=0, atol=2e-5 * np.abs(outs[0]).max())
    random.bit_generator.state = state
    narrow = attend(make(random))(*(x.astype(jnp.bfloat16) for x in arrays), log_decay)
    assert narrow.dtype == jnp.bfloat16
    apart = np.abs(np.asarray(narrow, np.float32) - outs[0])
    assert np.median(apart) < 0.01 * np.std(outs[0])


def test_what_is_learned_what_is_drawn_and_what_is_kept(random):
    mixer = make(random)
    assert isinstance(mixer.sigma, Geometry) and mixer.sigma.shape == (2, 8)
    assert isinstance(mixer.projections, Projection) and mixer.projections.shape == (2, 16, 8)
    assert np.all(np.asarray(RFAGate(mixer.spec, 0).sigma[...]) == 1)
    state = mixer.init_state(3, 10**6, jnp.bfloat16)
    assert state.values.shape == (3, 2, 32, 9) and state.values.dtype == jnp.float32
    assert RFAGate.mixing_flops(mixer.spec, 16) == (
        (4 + 2) * 2 * 16 * 8  # features
        + (4 + 2) * 2 * 32 * 9  # state
        + 4 * 2 * (32 + 9) * 4.5  # own chunk: 1 to 8 tokens
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decay": "none"}, "model.attention.decay = 'none': 'rfa_gate' needs 'gate'"),
        ({"decay": "learned"}, "model.attention.decay = 'learned': 'rfa_gate' is gated; allowed: gate"),
        ({"positions": "alibi"}, "positions = 'alibi' with decay = 'gate': ALiBi is a decay"),
        ({"undecayed_heads": 1}, "undecayed_heads = 1: no rfa_gate layer uses it"),
        ({"window": 128}, "window = 128: no rfa_gate layer uses it"),
    ],
)
def test_other_decays_and_what_it_does_not_have_are_refused(fields, message):
    config = base.get_config()
    config.model.attention.update({"kind": "rfa_gate", "decay": "gate"} | fields)
    with pytest.raises(UserError, match=message):
        validate(config)


def test_a_sequence_on_several_devices_is_refused(random):
    with pytest.raises(UserError, match="mesh.context > 1: 'rfa_gate' does not split sequences"):
        RFAGate.check_stretch(make(random).spec, 16)


def test_with_the_longest_memory_by_default_a_first_token_returns_its_own_value(random):
    mixer = RFAGate(mixer_spec("rfa_gate", decay="gate", num_features=64), 0)
    q, k, v = (jnp.asarray(random.standard_normal((8, 1, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    places = {"segment_ids": jnp.ones((8, 1), jnp.int32), "positions": jnp.zeros((8, 1), jnp.int32)}
    gate = np.log1p(-1 / base.get_config().model.attention.longest_memory)
    out, _ = mixer(q, k, v, **places, log_decay=jnp.full((8, 1, 2), gate, jnp.float32))
    is_own = np.isclose(out, np.repeat(v, 2, axis=2), rtol=1e-5).all(-1)
    assert is_own.mean() > 0.8  # of 32: an estimate of the kernel may be below the floor, or negative
