"""Mixers that are no attention, through the interface that the transformer calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from darkformer_jax.mixers.attention import Mechanism
from tests.tiny_specs import mixer_spec

LENGTH = 40
KINDS = [kind for kind, mixer in MIXERS.items() if not issubclass(mixer, Mechanism)]
random = np.random.default_rng(0)
X = random.standard_normal((1, LENGTH, 24)).astype(np.float32)


def make(kind, **changes):
    """The layer, and it as a jitted function of x, segment ids and a state."""
    sizes = {"embed_dim": 24} | ({"state_size": 6} if "state_size" in MIXERS[kind].uses else {})
    spec = mixer_spec(kind, **sizes | changes)
    layer = MIXERS[kind].build(spec, 0, rngs=nnx.Rngs(params=0))
    graphdef, arrays = nnx.split(layer)

    @jax.jit
    def call(x, segment_ids, state=None):
        return nnx.merge(graphdef, arrays)(x, segment_ids, jnp.zeros_like(segment_ids), state)

    return layer, call


def assert_is_theirs(layer, theirs, cache):
    """Whether a layer of width 32 gives the outputs of transformers' in one pass and, with a cache, token by token."""
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(1).standard_normal((2, 50, 32)).astype(np.float32)
    ids = np.ones((2, 50), np.int32)
    graphdef, arrays = nnx.split(layer)
    ours = jax.jit(lambda x, ids, state=None: nnx.merge(graphdef, arrays)(x, ids, ids, state))
    with torch.no_grad():
        want = theirs(torch.tensor(x)).numpy()
        limit = 1e-4 * np.abs(want).max()
        np.testing.assert_allclose(ours(x, ids)[0], want, atol=limit)
        state = layer.init_state(2, 50, jnp.float32)
        for start, stop in [(0, 44), *((n, n + 1) for n in range(44, 50))]:
            step = theirs(torch.tensor(x[:, start:stop]), cache_params=cache).numpy()
            out, state = ours(x[:, start:stop], ids[:, start:stop], state)
            np.testing.assert_allclose(step, want[:, start:stop], atol=limit)
            np.testing.assert_allclose(out, step, atol=limit)


def assert_close(got, want, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_one_interface(kind):
    layer, call = make(kind)
    # Rows: the sequence; another future after token 20; two documents packed; each of them alone, padded with NaN.
    x, ids = np.tile(X, (5, 1, 1)), np.ones((5, LENGTH), np.int32)
    x[1, 21:] *= -3
    ids[2, 16:], ids[3, 16:], ids[4, 24:] = 2, 0, 0
    x[4, :24] = x[4, 16:]
    x[3, 16:], x[4, 24:] = np.nan, np.nan
    out, state = call(x, ids)
    assert state is None and out.shape == x.shape and np.all(np.isfinite(out))
    assert np.std(out[0]) > 0.01
    np.testing.assert_allclose(out[1, :21], out[0, :21], rtol=0, atol=1e-6 * np.max(np.abs(out[0])))
    assert np.max(np.abs(out[1, 21:] - out[0, 21:])) > 0.01
    assert_close(out[2, :16], out[3, :16])
    assert_close(out[2, 16:], out[4, :24])
    np.testing.assert_array_equal(out[3, 16:], 0)

    # Prefill of prompts of unequal lengths, then one token at a time, now and then padding: decode = forward.
    state, lengths = layer.init_state(2, LENGTH, jnp.float32), np.array([13, 10])
    ids = (np.arange(13) < lengths[:, None]).astype(np.int32)
    shapes = jax.tree.map(jnp.shape, state)
    prefill, state = call(x[:1, :13].repeat(2, 0), ids, state)
    assert_close(prefill[0], out[0, :13])
    assert_close(prefill[1, :10], out[0, :10])
    for step in range(24):
        real = np.array([1, int(step % 6 != 3)], np.int32)
        decoded, state = call(x[0, lengths][:, None], real[:, None], state)
        for row in np.flatnonzero(real):
            assert_close(decoded[row, 0], out[0, lengths[row]])
        lengths = lengths + real
    assert jax.tree.map(jnp.shape, state) == shapes


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_every_parameter_is_finite_and_not_zero(kind):
    layer, _ = make(kind)
    graphdef, arrays = nnx.split(layer)
    ids = jnp.where(jnp.arange(LENGTH) < 30, 1, 0)[None].astype(jnp.int32)

    @jax.jit
    @jax.grad
    def gradients(arrays):
        x = jnp.where(ids[..., None] == 0, jnp.nan, X)
        return jnp.sum(jnp.sin(nnx.merge(graphdef, arrays)(x, ids, ids)[0]))

    for path, leaf in nnx.to_flat_state(gradients(arrays)):
        assert np.all(np.isfinite(leaf)) and np.any(np.asarray(leaf) != 0), path


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_the_cost_alone_and_bfloat16_is_near(kind):
    ids = np.ones((1, LENGTH), np.int32)
    out = make(kind)[1](X, ids)[0]
    assert_close(make(kind, chunk_size=13)[1](X, ids)[0], out)
    narrow = make(kind, dtype="bfloat16")[1](jnp.asarray(X, jnp.bfloat16), ids)[0]
    assert narrow.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(narrow, np.float32) - out) < 0.03 * np.linalg.norm(out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_on_several_devices_is_refused(kind):
    with pytest.raises(
        UserError, match=f"mesh.context > 1: '{kind}' does not split sequences; allowed: mesh.context = 1"
    ):
        MIXERS[kind].check_stretch(mixer_spec(kind), 16)
