import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax import dark_attention, draw_projections
from darkformer_jax.ops.dark_attention import init_state
from darkformer_jax.ops.state import NEG, FarState, empty_far, merge_far

FEATURES, DIM, VALUE_DIM = 24, 6, 5
random = np.random.default_rng(0)
W = draw_projections(jax.random.key(0), FEATURES, DIM)
K = random.standard_normal((1, 60, 1, DIM)).astype(np.float32)
V = random.standard_normal((1, 60, 1, VALUE_DIM)).astype(np.float32)


@jax.jit
def _summary(k, v, segments):
    _, state = dark_attention(k, k, v, projections=W, segment_ids=segments, chunk_size=8, return_state=True)
    return state.far


def summary(start, stop, segment=1):
    """The far state after tokens start:stop of a document; padded to one length, which leaves no trace."""
    real = np.arange(60) < stop - start
    move = (np.arange(60) + start) % 60
    return _summary(K[:, move], V[:, move], np.where(real, segment, 0)[None].astype(np.int32))


def assert_same(got, want):
    """Equal up to rounding, as sums: c only says which power of e they are divided by."""
    np.testing.assert_array_equal(got.segment, want.segment)
    np.testing.assert_array_equal(got.key_max, want.key_max)
    np.testing.assert_allclose(got.normalizer, want.normalizer, rtol=2e-6)
    np.testing.assert_allclose(got.values, want.values, rtol=1e-5, atol=1e-5)


def test_the_state_is_its_definition():
    far = summary(0, 60)
    x = np.asarray(K[0, :, 0], np.float64) * DIM**-0.25
    log_k = x @ np.asarray(W, np.float64).T - 0.5 * np.sum(x**2, axis=1, keepdims=True)
    c = log_k.max(axis=0)
    weights = np.exp(log_k - c)
    np.testing.assert_allclose(far.key_max[0, 0], c, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(far.normalizer[0, 0], weights.sum(axis=0), rtol=1e-5)
    np.testing.assert_allclose(far.values[0, 0], weights.T @ V[0, :, 0], rtol=1e-4, atol=1e-5)
    assert np.all(far.normalizer >= 1)


@pytest.mark.parametrize("cut", [1, 7, 8, 33, 59])
def test_merge_of_two_parts_is_the_summary_of_the_whole(cut):
    assert_same(merge_far(summary(0, cut), summary(cut, 60)), summary(0, 60))


def test_merge_is_associative():
    a, b, c = summary(0, 20), summary(20, 21), summary(21, 60)
    assert_same(merge_far(merge_far(a, b), c), merge_far(a, merge_far(b, c)))
    assert_same(merge_far(a, merge_far(b, c)), summary(0, 60))


def test_empty_is_the_identity_on_both_sides():
    far = summary(0, 13)
    nothing = jax.tree.map(lambda leaf, like: jnp.broadcast_to(leaf, like.shape), empty_far(FEATURES, VALUE_DIM), far)
    for merged in (merge_far(nothing, far), merge_far(far, nothing)):
        jax.tree.map(np.testing.assert_array_equal, merged, far)
    assert_same(merge_far(nothing, nothing), nothing)
    jax.tree.map(np.testing.assert_array_equal, summary(0, 0), nothing)


def test_another_segment_replaces_what_came_before():
    second = summary(30, 60, segment=2)
    jax.tree.map(np.testing.assert_array_equal, merge_far(summary(0, 30), second), second)
    # ... for the sequences where it is another one
    rows = [
        jax.tree.map(lambda a, b: jnp.concatenate([a, b]), summary(0, 30), summary(0, 30)),
        jax.tree.map(lambda a, b: jnp.concatenate([a, b]), summary(30, 60), second),
    ]
    merged = merge_far(*rows)
    assert_same(jax.tree.map(lambda leaf: leaf[:1], merged), summary(0, 60))
    assert_same(jax.tree.map(lambda leaf: leaf[1:], merged), second)


def test_merge_survives_any_distance_between_the_parts():
    def far(level, segment=1):
        return FarState(jnp.full((2,), level), jnp.ones((2,)), jnp.full((2, 1), 3.0), jnp.asarray(segment, jnp.int32))

    merged = merge_far(far(-500.0), far(500.0))
    np.testing.assert_array_equal(merged.normalizer, 1)
    np.testing.assert_array_equal(merged.values, 3)
    gradient = jax.grad(lambda z: jnp.sum(merge_far(far(-500.0)._replace(normalizer=z), far(500.0)).normalizer))
    assert np.all(np.isfinite(gradient(jnp.ones((2,)))))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sums_are_float32_and_the_state_does_not_grow(dtype):
    state = init_state(3, 2, DIM, VALUE_DIM, FEATURES, dtype, chunk_size=8, window=16, num_sinks=4)
    assert state.far.key_max.shape == (3, 2, FEATURES) and np.all(state.far.key_max == NEG)
    assert state.far.values.shape == (3, 2, FEATURES, VALUE_DIM)
    assert {leaf.dtype for leaf in state.far[:3]} == {jnp.dtype(jnp.float32)}
    assert state.recent.keys.shape == (3, 2, 24, DIM) and state.recent.keys.dtype == dtype
    assert state.sinks.values.shape == (3, 2, 4, VALUE_DIM)

    k, v = (jnp.asarray(np.tile(x, (3, 1, 2, 1)), dtype) for x in (K, V))
    _, after = jax.eval_shape(
        lambda state: dark_attention(
            k, k, v, projections=W, chunk_size=8, window=16, num_sinks=4, state=state, return_state=True
        ),
        state,
    )
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
