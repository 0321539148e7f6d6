"""What users pass: numpy's arrays and numbers mean what JAX's own mean, with x64 and without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax import dark_attention
from darkformer_jax.ops.dark_attention import init_state
from darkformer_jax.ops.features import log_elu_plus_one
from darkformer_jax.ops.linear_attention import linear_attention
from tests.ops.linear_attentions import HYBRID, PURE, draw

pytestmark = pytest.mark.usefixtures("unchecked_types")

X = draw("dark", 20, heads=(4, 2))
Q, K, V = X[:3]
DECAY = -np.ones(2, np.float32)
IDS = np.ones((1, 20), np.int32)


def wide(leaf):
    """The array or number as numpy's 64 bits."""
    return np.asarray(leaf, np.int64 if np.issubdtype(np.asarray(leaf).dtype, np.integer) else np.float64)


def run(options, *changes):
    """The outputs of `dark_attention` with each of the changes, from one program."""

    def calls():
        for own in changes:
            out, state = dark_attention(**{"q": Q, "k": K, "v": V} | X.arrays | options | own, return_state=True)
            assert out.dtype == jnp.float32
            assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {jnp.dtype(kind) for kind in ("f4", "i4", "?")}
            yield out

    return jax.device_get(jax.jit(lambda: list(calls()))())


def assert_same(options, *changes):
    want, *outs = run(options, *changes)
    for out in outs:
        np.testing.assert_array_equal(out, want)


ARRAYS = [  # options, the argument that is changed, its value
    *((PURE, name, X.arrays[name]) for name in ("projections", "geometry")),
    (PURE, "log_weights", np.ones((2, 32), np.float32)),
    (HYBRID, "log_gain", np.ones(4, np.float32)),
    *((options, "log_decay", value) for options in (PURE, HYBRID) for value in (DECAY, np.tile(DECAY, (1, 20, 1)))),
    *((options, "segment_ids", IDS) for options in (PURE, HYBRID)),
]


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(("options", "name", "value"), ARRAYS)
def test_arrays_of_64_bits_beside_float32_are_as_those_of_32(options, name, value, x64):
    with jax.enable_x64(x64):
        assert_same(options, *({name: same} for same in (value, wide(value), value.tolist(), jnp.asarray(value))))


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("options", [PURE, HYBRID])
def test_a_scale_of_any_type_is_that_number(options, x64):
    with jax.enable_x64(x64):
        values = (1.0, 1, np.int64(1), np.float64(1), np.float32(1), np.array(1), jnp.asarray(1.0))
        want, *known, traced = run(options, *({"scale": value} for value in values))
    for out in known:
        np.testing.assert_array_equal(out, want)
    np.testing.assert_allclose(traced, want, atol=1e-4)


def test_integers_of_numpy_are_integers():
    assert_same(HYBRID, {}, {name: np.int64(value) for name, value in HYBRID.items()})
    assert_same(PURE, {"log_decay": DECAY}, {"log_decay": np.array([-1, -1])})


def test_numpys_float64_is_float32_where_x64_is_off():
    wider = {name: wide(array) for name, array in zip("qkv", X[:3], strict=True)}
    changes = [{name: wider[name] for name in names} for names in ("", "q", "qk", "qkv")]
    assert_same(PURE, *changes)
    narrow, *others = (linear_attention(**{"q": Q, "k": K, "v": V} | own) for own in changes)
    for out in others:
        np.testing.assert_array_equal(out, narrow)


def test_a_state_that_was_on_disk_goes_on():
    options = HYBRID | {"log_decay": DECAY}
    _, state = jax.jit(lambda: dark_attention(*map(jnp.asarray, X[:3]), **X.arrays, **options, return_state=True))()
    assert_same(options, {"state": state}, {"state": jax.device_get(state)})
    sizes = init_state(1, 2, 16, 8, 32, np.dtype(np.float64), **HYBRID)  # the dtype of numpy's q
    assert sizes.recent.keys.dtype == sizes.far.values.dtype == jnp.float32


@pytest.mark.parametrize("x64", [False, True])
def test_float64_in_a_feature_map_does_not_widen_the_state(x64):
    def scaled(arrays, x, scale):
        return log_elu_plus_one(None, x, scale) * jnp.broadcast_to(arrays, x.shape)

    def run():
        return linear_attention(Q, K, V, feature_map=scaled, feature_arrays=np.ones((2, 16)), return_state=True)

    with jax.enable_x64(x64), jax.numpy_dtype_promotion("standard"):
        out, state = jax.jit(run)()
    assert out.dtype == state.far.values.dtype == jnp.float32
    np.testing.assert_allclose(out, linear_attention(Q, K, V), atol=1e-4)
