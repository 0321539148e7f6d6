"""`linear_attention` beside formulas that share nothing with it; test_every_linear_attention.py has the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax import dark_attention
from darkformer_jax.errors import UserError
from darkformer_jax.ops.features import RandomFeatures, positive_random_features
from darkformer_jax.ops.linear_attention import init_state, linear_attention
from tests.ops.linear_attentions import PURE, assert_rows_close, draw


def draw_arrays(op, length, **shape):
    return jax.tree.map(jnp.asarray, draw(op, length, **shape))


def elu_by_hand(q, k, v, causal):
    """elu(x) + 1 as it is written, in float64. q and k of as many heads."""
    phi_q, phi_k = (np.where(x > 0, x + 1, np.exp(x)) for x in (np.asarray(q, np.float64), np.asarray(k, np.float64)))
    weights = np.einsum("bnhd,bthd->bhnt", phi_q, phi_k)
    weights = weights * np.tri(q.shape[1]) if causal else weights
    return np.einsum("bhnt,bthv->bnhv", weights / weights.sum(-1, keepdims=True), np.asarray(v, np.float64))


@pytest.mark.parametrize("causal", [True, False])
def test_the_default_is_the_linear_transformer(causal):
    q, k, v, _ = draw_arrays("elu_plus_one", 50, heads=(2, 2), batch=2)
    assert_rows_close(linear_attention(q, k, v, causal=causal, chunk_size=16), elu_by_hand(q, k, v, causal), 1e-5)


def test_random_features_in_the_slot_are_dark_attention_bit_for_bit():
    x = draw_arrays("dark", 50, heads=(4, 2))
    arrays = RandomFeatures(x.arrays["projections"], x.arrays["geometry"])
    out = linear_attention(*x[:3], feature_map=positive_random_features, feature_arrays=arrays, **PURE)
    np.testing.assert_array_equal(out, dark_attention(*x[:3], **x.arrays, scale=1.0, **PURE))


def test_a_key_without_a_common_feature_weighs_nothing_beside_one_that_has_one():
    # The last query and the first key share no feature above e^-400. Within a chunk they count as e^-117, as docs say.
    q = jnp.array([[1.0, 1.0], [1.0, 1.0], [400.0, -400.0]])[None, :, None]
    k = jnp.array([[-400.0, 400.0], [-1.0, 0.0], [-2.0, 3.0]])[None, :, None]
    v = jnp.array([[100.0], [1.0], [2.0]])[None, :, None]
    out = linear_attention(q, k, v)
    assert_rows_close(out, elu_by_hand(q, k, v, True), 1e-5)
    assert 1 < out[0, 2, 0, 0] < 2


Q, K, V, _ = draw_arrays("elu_plus_one", 4, heads=(4, 2))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": K[:, :3]}, r"k \(1, 3, 2, 16\) and v .* do not fit"),
        ({"q": Q.astype(np.float16)}, "dtypes float16, float32 and float32; they must share one of"),
        ({"segment_ids": np.ones((1, 5), np.int32)}, r"segment_ids have shape \(1, 5\); expected \(1, 4\)"),
        ({"chunk_size": 0}, "chunk_size = 0 must be positive"),
        ({"causal": False, "return_state": True}, "causal=False works with features everywhere"),
        ({"sequence_axis": "context", "return_state": True}, "sequence_axis needs causal=True"),
        (
            {"feature_arrays": {"W": np.zeros((2, 5)), "b": [np.zeros((4, 5))]}},
            r"feature_arrays\['b'\]\[0\] has shape \(4, 5\); its first axis must be the 2 key/value heads",
        ),
        ({"feature_arrays": 1.0}, r"feature_arrays has shape \(\)"),
        (
            {"state": init_state(1, 2, 16, 8, 32, jnp.float32)},
            r"made for .* \(2, 32, 8\); these inputs .* \(2, 16, 8\)",
        ),
        ({"state": init_state(3, 2, 16, 8, 16, jnp.float32)}, "made for another batch or num_sinks than 1 and 0"),
        ({"state": init_state(1, 2, 16, 8, 16, jnp.float32, 16, 16)}, "made with another window or chunk_size than 0"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        linear_attention(**{"q": Q, "k": K, "v": V} | changes)


def test_feature_map_is_static_under_jit():
    run = jax.jit(linear_attention, static_argnames=("feature_map", "causal"))
    np.testing.assert_allclose(run(Q, K, V), linear_attention(Q, K, V), rtol=1e-6)

    def relu_like(arrays, x, scale):
        return jnp.log(jax.nn.softplus(x))

    other = run(Q, K, V, feature_map=relu_like)
    assert np.max(np.abs(other - run(Q, K, V))) > 1e-3
