"""Every mechanism through the one interface, and each against its own definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from darkformer_jax.mixers.attention import Mechanism
from darkformer_jax.mixers.encoders import EncoderMechanism
from darkformer_jax.mixers.features import draw_layer
from darkformer_jax.mixers.spec import Geometry, Projection
from darkformer_jax.ops.oracle import dark_attention_oracle
from tests.tiny_specs import mixer_spec

SPEC = mixer_spec(num_features=16, geometry_init=0.7, seed=3)
HYBRID = dataclasses.replace(SPEC, window=8, num_sinks=2)
CONVERTED = dataclasses.replace(HYBRID, window_kernel="softmax", far_gain=True, balanced=True)
LOCAL = dataclasses.replace(SPEC, local_window=7, softcap=2.0, query_scale=0.6)
NEEDED = {"window": 8, "local_window": 7, "horizon": 64, "decay": "gate"}
OPTIONS = {"num_features": 16, "geometry_init": 0.7, "seed": 3}
# Every kind with what it needs, every kind that can have a window with one, and what a conversion makes.
MECHANISMS = [
    kind
    for kind, mixer in MIXERS.items()
    if issubclass(mixer, Mechanism) and not issubclass(mixer, EncoderMechanism)  # see test_encoders.py
]
NEEDS = {kind: {need: NEEDED[need] for need in MIXERS[kind].needs} for kind in MECHANISMS}
ALL = [(kind, mixer_spec(kind, **OPTIONS, **NEEDS[kind])) for kind in MECHANISMS]
ALL += [(kind, mixer_spec(kind, **OPTIONS, window=8, num_sinks=2)) for kind in MIXERS if "window" in MIXERS[kind].uses]
ALL += [("dark", CONVERTED), ("softmax_local", LOCAL)]
ALL += [(kind, dataclasses.replace(HYBRID, kind=kind, exact_kv_heads=1)) for kind in ("dark", "window_only")]
ALL += [("dark", dataclasses.replace(SPEC, exact_kv_heads=1, decay="learned"))]
BIDIRECTIONAL = [kind for kind in MECHANISMS if MIXERS[kind].bidirectional]
LENGTH = 40

random = np.random.default_rng(0)
Q = random.standard_normal((1, LENGTH, 4, 8)).astype(np.float32)
K = random.standard_normal((1, LENGTH, 2, 8)).astype(np.float32)
V = random.standard_normal((1, LENGTH, 2, 8)).astype(np.float32)
ONE = np.ones((1, LENGTH), np.int32)
POSITIONS = np.arange(LENGTH, dtype=np.int32)[None]
ARRAYS = tuple(map(jnp.asarray, (Q, K, V)))  # for calls outside of jit, which annotations check
PLACES = {"segment_ids": jnp.asarray(ONE), "positions": jnp.asarray(POSITIONS)}


def make(kind, spec, layer=0):
    """The mechanism as a jitted function. Where it needs a decay, each key/value head has a constant one."""
    mechanism = MIXERS[kind](spec, layer)
    log_decay = -jnp.array([0.02, 0.5]) if spec.has_decay else None

    def call(q, k, v, segment_ids, positions, state=None):
        places = {"segment_ids": segment_ids, "positions": positions}
        return mechanism(q, k, v, **places, log_decay=log_decay, state=state)

    return mechanism, jax.jit(call)


def assert_close(got, want, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("kind", "spec"), ALL)
def test_one_interface(kind, spec):
    mechanism, call = make(kind, spec)
    # Rows: the sequence; another future after token 20; two documents packed; each of them alone, padded.
    ids, positions = np.tile(ONE, (5, 1)), np.tile(POSITIONS, (5, 1))
    q, k, v = (np.tile(x, (5, 1, 1, 1)) for x in (Q, K, V))
    q[1, 21:], k[1, 21:], v[1, 21:] = -q[1, 21:], 10 * k[1, 21:], 1000 * v[1, 21:]
    ids[2, 16:], positions[2, 16:] = 2, np.arange(24)
    ids[3, 16:], ids[4, 24:] = 0, 0
    for x in (q, k, v):
        x[4, :24] = x[4, 16:]
    out, state = call(q, k, v, ids, positions)
    out = np.asarray(out)
    assert state is None and out.shape == q.shape and np.all(np.isfinite(out))
    assert np.max(np.abs(out[1, :21] - out[0, :21])) <= 1e-6 * np.max(np.abs(out[0]))
    assert np.max(np.abs(out[1, 21:] - out[0, 21:])) > 1
    assert_close(out[2, :16], out[3, :16])
    assert_close(out[2, 16:], out[4, :24])
    np.testing.assert_array_equal(out[3, 16:], 0)

    # Prefill of three tokens of 13, 21 tokens one at a time, one of which waits for its neighbour: decode = forward.
    state = mechanism.init_state(2, LENGTH, jnp.float32)
    lengths = np.array([13, 10])
    inputs = [np.tile(x, (2, 1, 1, 1)) for x in (Q, K, V)]
    prefill_ids = (np.arange(13) < lengths[:, None]).astype(np.int32)
    prefill, state = call(*(x[:, :13] for x in inputs), prefill_ids, np.tile(POSITIONS[:, :13], (2, 1)), state)
    assert_close(prefill[0], out[0, :13])
    assert_close(prefill[1, :10], out[0, :10])
    places, shapes = lengths.copy(), jax.tree.map(jnp.shape, state)
    for step in range(24):
        real = np.array([1, int(step % 6 != 3)], np.int32)
        token = (x[np.arange(2), places][:, None] for x in inputs)
        decoded, state = call(*token, real[:, None], places[:, None].astype(np.int32), state)
        assert_close(decoded[0, 0], out[0, places[0]])
        if real[1]:
            assert_close(decoded[1, 0], out[0, places[1]])
        places = places + real
    assert jax.tree.map(jnp.shape, state) == shapes


@pytest.mark.parametrize("kind", BIDIRECTIONAL)
def test_without_causality_a_sequence_read_backwards_gives_the_same(kind):
    _, call = make(kind, mixer_spec(kind, **OPTIONS, **NEEDS[kind], causal=False))
    ids, positions = np.where(np.arange(LENGTH) < 24, 1, 2)[None].astype(np.int32), POSITIONS
    out, _ = call(Q, K, V, ids, positions)
    backwards, _ = call(*(x[:, ::-1] for x in (Q, K, V, ids, positions)))
    assert_close(out, backwards[:, ::-1])
    causal, _ = make(kind, mixer_spec(kind, **OPTIONS, **NEEDS[kind]))[1](Q, K, V, ids, positions)
    for last in (23, LENGTH - 1):  # the last token of a document sees the same either way, the first one does not
        assert_close(out[0, last], causal[0, last])
        assert np.max(np.abs(out[0, last - 12] - causal[0, last - 12])) > 1e-3


@pytest.mark.parametrize("kind", [kind for kind in MIXERS if not MIXERS[kind].bidirectional])
def test_what_is_causal_only_is_refused_in_an_encoder(kind):
    with pytest.raises(UserError, match=f"model.causal = False: '{kind}' is causal only; allowed: True"):
        MIXERS[kind].check(mixer_spec(kind, causal=False))


def test_softmax_by_hand():
    _, call = make("softmax", SPEC)
    out, _ = call(Q, K, V, ONE, POSITIONS)
    q, k, v = (x[0].astype(np.float64).transpose(1, 0, 2) for x in (Q, K.repeat(2, axis=2), V.repeat(2, axis=2)))
    weights = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(8)) * np.tri(LENGTH)
    assert_close(out[0].transpose(1, 0, 2), weights @ v / weights.sum(-1, keepdims=True))


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_softmax_local_by_hand(softcap):
    _, call = make("softmax_local", dataclasses.replace(LOCAL, softcap=softcap))
    out, _ = call(Q, K, V, ONE, POSITIONS)
    q, k, v = (x[0].astype(np.float64).transpose(1, 0, 2) for x in (Q, K.repeat(2, axis=2), V.repeat(2, axis=2)))
    logits = 0.6 * q @ k.transpose(0, 2, 1)
    logits = softcap * np.tanh(logits / softcap) if softcap else logits
    weights = np.exp(logits) * (np.tri(LENGTH) - np.tri(LENGTH, k=-7))
    assert_close(out[0].transpose(1, 0, 2), weights @ v / weights.sum(-1, keepdims=True))


def test_softmax_local_keeps_its_window_only():
    mechanism, call = make("softmax_local", LOCAL)
    state = mechanism.init_state(1, LENGTH, jnp.float32)
    assert state.keys.shape == (1, 7, 2, 8) and mechanism.init_state(1, 3, jnp.float32).keys.shape == (1, 3, 2, 8)
    out, _ = call(Q, K, V, ONE, POSITIONS)
    for start, stop in ((0, 3), (3, 4), (4, 24), (24, 26), (26, LENGTH)):  # pieces below and above the window
        piece = (x[:, start:stop] for x in (Q, K, V, ONE, POSITIONS))
        continued, state = call(*piece, state)
        assert_close(continued, out[:, start:stop])
    assert sorted(state.positions[0].tolist()) == list(range(LENGTH - 7, LENGTH))


@pytest.mark.parametrize("kind", ["performer", "dark"])
def test_features_scale_their_products_as_asked(kind):
    _, call = make(kind, SPEC)
    _, scaled = make(kind, dataclasses.replace(SPEC, query_scale=4 * 8**-0.5))
    assert_close(scaled(Q, K, V, ONE, POSITIONS)[0], call(2 * Q, 2 * K, V, ONE, POSITIONS)[0])


def test_constant_is_the_mean_of_what_is_visible():
    _, call = make("constant", SPEC)
    ids = np.where(np.arange(LENGTH) < 24, 1, 2)[None].astype(np.int32)
    out, _ = call(Q, K, V, ids, POSITIONS)
    v = V[0].astype(np.float64).repeat(2, axis=1)
    for start, stop in ((0, 24), (24, LENGTH)):
        mean = np.cumsum(v[start:stop], axis=0) / np.arange(1, stop - start + 1)[:, None, None]
        np.testing.assert_allclose(out[0, start:stop], mean, rtol=1e-6, atol=1e-6)


def test_random_looks_at_nothing_but_positions():
    graphdef, state = nnx.split(MIXERS["random"](SPEC, 0))
    run = jax.jit(
        lambda state, q, k, v, positions: nnx.merge(graphdef, state)(
            q, k, v, segment_ids=PLACES["segment_ids"], positions=positions
        )[0]
    )
    out = np.asarray(run(state, Q, K, V, POSITIONS))
    np.testing.assert_array_equal(run(state, 5 * Q, -K, V, POSITIONS), out)
    np.testing.assert_array_equal(run(state, Q, K, 2 * V, POSITIONS), 2 * out)
    assert np.max(np.abs(run(state, Q, K, V, POSITIONS + 1) - out)) > 1e-2
    for other in (MIXERS["random"](SPEC, 1), MIXERS["random"](dataclasses.replace(SPEC, seed=4), 0)):
        assert np.max(np.abs(run(nnx.state(other), Q, K, V, POSITIONS) - out)) > 1e-2
    # Weights are positive and sum to one: the identity's rows as values show them.
    values = np.zeros_like(V)
    values[0, :8] = np.eye(8)[:, None]
    weights = np.asarray(run(state, Q, K, values, POSITIONS))[0, 7]
    np.testing.assert_allclose(np.sum(weights, axis=-1), 1, rtol=1e-5)
    assert np.all(weights > 0) and np.all(np.std(weights, axis=-1) > 0.01)


@pytest.mark.parametrize("spec", [SPEC, HYBRID])
def test_dark_is_performer_at_the_identity_and_its_own_kernel_elsewhere(spec):
    performer, call = make("performer", spec, layer=2)
    at_identity = make("dark", dataclasses.replace(spec, geometry_init=1.0), layer=2)[1]
    performer_out = call(Q, K, V, ONE, POSITIONS)[0]
    assert_close(at_identity(Q, K, V, ONE, POSITIONS)[0], performer_out)
    np.testing.assert_array_equal(performer.projections[...], draw_layer(spec, 2, 0))

    dark, _ = make("dark", spec)
    np.testing.assert_array_equal(dark.M[...], np.tile(np.float32(0.7) * np.eye(8, dtype=np.float32), (2, 1, 1)))
    dark.M[...] = jnp.asarray(random.standard_normal((2, 8, 8)), jnp.float32) / 3
    out = jax.jit(lambda: dark(*ARRAYS, **PLACES)[0])()
    with jax.enable_x64(True):
        w, m = (np.asarray(x[...], np.float64) for x in (dark.projections, dark.M))
        q, k, v = (x.astype(np.float64) for x in (Q, K, V))
        options = {"chunk_size": spec.chunk_size, "window": spec.window, "num_sinks": spec.num_sinks}
        oracle = functools.partial(dark_attention_oracle, **options)
        want = jax.jit(oracle)(q, k, v, projections=w, geometry=m)
    assert_close(out, want)


def test_lfk_starts_as_performer_and_learns_its_projections():
    lfk, call = make("lfk", SPEC, layer=1)
    assert_close(call(Q, K, V, ONE, POSITIONS)[0], make("performer", SPEC, layer=1)[1](Q, K, V, ONE, POSITIONS)[0])
    assert isinstance(lfk.projections, Geometry)
    graphdef, params = nnx.split(lfk)

    def loss(params):
        out, _ = nnx.merge(graphdef, params)(*ARRAYS, **PLACES)
        return jnp.sum(jnp.square(out))

    gradient = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
    assert len(gradient) == 1 and np.all(np.any(np.asarray(gradient[0]) != 0, axis=-1))


def test_what_is_learned_and_what_is_only_stored():
    def variables(kind, **changes):
        mechanism = MIXERS[kind](dataclasses.replace(HYBRID if kind == "window_only" else SPEC, **changes), 0)
        return {path[-1]: type(leaf) for path, leaf in nnx.to_flat_state(nnx.state(mechanism))}

    assert variables("dark") == {"projections": Projection, "M": Geometry}
    assert variables("dark", learn_projections=True) == {"projections": Geometry, "M": Geometry}
    assert variables("performer") == {"projections": Projection}
    assert variables("lfk") == {"projections": Geometry}
    assert all(issubclass(kind, Projection) for kind in variables("random").values())
    assert variables("softmax") == variables("constant") == variables("window_only") == {}


def test_window_only_is_masked_softmax():
    _, call = make("window_only", HYBRID)
    out, _ = call(Q, K, V, ONE, POSITIONS)
    n, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
    seen = (j <= n) & ((j >= n // 8 * 8 - 8) | (j < 2))
    q, k, v = (x[0].astype(np.float64).transpose(1, 0, 2) for x in (Q, K.repeat(2, axis=2), V.repeat(2, axis=2)))
    weights = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(8)) * seen
    assert_close(out[0].transpose(1, 0, 2), weights @ v / weights.sum(-1, keepdims=True))


def test_a_far_part_without_gain_leaves_the_pretrained_window():
    alone, _ = make("window_only", HYBRID)[1](Q, K, V, ONE, POSITIONS)
    mechanism, _ = make("dark", CONVERTED)
    assert isinstance(mechanism.log_gain, Geometry) and mechanism.log_gain.shape == (4,)

    def difference(gain):
        mechanism.log_gain[...] = jnp.full(4, gain)
        out, _ = mechanism(*ARRAYS, **PLACES)
        return np.max(np.abs(out - alone))

    assert difference(-1e4) < 1e-5
    assert difference(0.0) > 1e-2
