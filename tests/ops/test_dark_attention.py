"""What `dark_attention` has beyond every linear attention: a geometry, a window and sinks, weights, gains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax import dark_attention, draw_projections
from darkformer_jax.errors import UserError
from darkformer_jax.ops.theory.proposals import transform_projections
from tests.ops.linear_attentions import (
    HYBRID,
    PURE,
    Inputs,
    assert_like_float64,
    assert_rows_close,
    attend,
    documents,
    draw,
    fresh,
    jitted,
    oracle,
)

PRETRAINED = HYBRID | {"window_kernel": "softmax"}


@pytest.mark.parametrize(
    ("length", "shape", "segments", "options"),
    [
        (1, {}, None, HYBRID),
        (63, {"heads": (4, 2)}, None, {"chunk_size": 7, "window": 14, "num_sinks": 2}),
        (500, {"heads": (4, 2)}, (100, 1, 250, 149), {"chunk_size": 16, "window": 32, "num_sinks": 3}),
        (1024, {}, None, {"chunk_size": 128, "window": 128}),
        (300, {"heads": (4, 2), "gain": True}, (100, 1, 199), PRETRAINED),
    ],
)
def test_outputs_and_gradients_of_hybrids_against_float64(length, shape, segments, options):
    assert_like_float64("dark", length, shape, segments, options)


def with_arrays(x, **changes):
    return x._replace(arrays=x.arrays | changes)


def test_scale_low_rank_geometry_and_shared_projections():
    x, options = draw("dark", 40, heads=(4, 2)), {"chunk_size": 16, "scale": 0.4}
    shared = np.asarray(draw_projections(jax.random.key(3), 32, 5))
    low = with_arrays(x, geometry=x.arrays["geometry"][:, :5], projections=shared)
    want = oracle("dark", with_arrays(low, projections=np.stack([shared, shared])), **options)
    assert_rows_close(attend("dark", low, **options), want, 1e-4)
    want = oracle("dark", with_arrays(x, geometry=np.stack([np.eye(16)] * 2)), chunk_size=16, scale=0.25)
    assert_rows_close(attend("dark", with_arrays(x, geometry=None), chunk_size=16), want, 1e-4)


@pytest.mark.parametrize("options", [PURE, HYBRID])
def test_projections_of_another_law_with_their_weights(options):
    x = draw("dark", 60, heads=(4, 2))
    covariance = np.stack([np.diag(np.linspace(0.7, 2.0, 16, dtype=np.float32))] * 2)
    w, log_weights = transform_projections(jnp.asarray(x.arrays["projections"]), covariance)
    x = with_arrays(x, projections=w)
    weighted = with_arrays(x, log_weights=log_weights)
    want = oracle("dark", weighted, **options)
    assert_rows_close(attend("dark", weighted, **options), want, 1e-4)
    assert np.max(np.abs(attend("dark", x, **options) - want)) > 1e-2


def test_without_projections_only_window_and_sinks_are_seen():
    x, ids = with_arrays(draw("dark", 80), projections=None), documents(50, 30)
    assert_rows_close(attend("dark", x, ids, **HYBRID), oracle("dark", x, ids, **HYBRID), 1e-4)


@pytest.mark.parametrize("options", [{"chunk_size": 128}, {"chunk_size": 128, "window": 128}])
def test_backward_memory_is_that_of_the_chunk_states(options):
    features, dim, length = 512, 8, 16_384

    shapes = {"projections": (1, features, dim), "geometry": (1, dim, dim)}
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    x = Inputs(*(jax.ShapeDtypeStruct((1, length, 1, dim), jnp.float32),) * 3, arrays)
    run = jitted(dark_attention, True, tuple(options.items()))
    temporary = run.lower(x, None, x.v).compile().memory_analysis().temp_size_in_bytes
    states = 4 * (length // 128) * features * (dim + 2)  # c, z and S between chunks
    chunk = 4 * 128 * features  # the features of one chunk
    tokens = 4 * length * (4 * dim + 4)  # q, k, v, out and a few numbers of each token, cut into chunks
    assert states < temporary < states + 12 * chunk + 3 * tokens
    assert temporary < 4 * length * features / 2  # half of one array of every token's features


X = draw("dark", 4, heads=(4, 2))
Q, K, V = X[:3]
W, M = X.arrays["projections"], X.arrays["geometry"]
BAD_INPUTS = [
    ({"q": Q[0]}, r"q has shape \(4, 4, 16\); expected \[batch, length, heads, size\]"),
    ({"v": V[0]}, r"v has shape \(4, 2, 8\)"),
    ({"k": K[:, :3]}, r"k \(1, 3, 2, 16\) and v .* do not fit"),
    ({"k": K[..., :8]}, r"k \(1, 4, 2, 8\) and v .* do not fit"),
    ({"v": V[:, :, :1]}, r"v \(1, 4, 1, 8\) do not fit"),
    ({"q": Q[:, :, :3]}, "3 query heads are not a multiple of 2 key/value heads"),
    ({"k": K[:, :, :0], "v": V[:, :, :0]}, "4 query heads are not a multiple of 0 key/value heads"),
    ({"q": Q[..., :0], "k": K[..., :0]}, r"q has shape \(1, 4, 4, 0\): the size of a head must be at least 1"),
    ({"scale": -1}, "scale = -1: allowed: finite and at least 0"),
    ({"scale": np.float32(-0.5), **HYBRID}, "scale = -0.5: allowed: finite and at least 0"),
    ({"scale": np.inf}, "scale = inf: allowed: finite"),
    ({"scale": float("nan")}, "scale = nan: allowed: finite"),
    ({"scale": np.ones(1)}, r"scale has shape \(1,\); expected one number"),
    ({"scale": "a"}, "scale = .a.: expected one real number"),
    ({"scale": 2 + 1j}, r"scale = \(2\+1j\): expected one real number"),
    ({"chunk_size": 16.0}, "chunk_size = 16.0: allowed: an integer, static under jit"),
    ({"window": 16.0, "chunk_size": 16}, "window = 16.0: allowed: an integer"),
    ({**HYBRID, "num_sinks": 2.0}, "num_sinks = 2.0: allowed: an integer"),
    ({"segment_ids": np.ones((1, 4))}, "segment_ids have dtype float32; allowed: integers or bool"),
    ({"log_decay": -0.1}, r"log_decay has shape \(\); expected \(2,\)"),
    ({"log_decay": np.array([0, 1])}, "log_decay has 1; allowed: at most 0"),
    ({"q": Q.astype(jnp.bfloat16)}, "dtypes bfloat16, float32 and float32; they must share one of"),
    ({name: x.astype(np.float16) for name, x in zip("qkv", X[:3], strict=True)}, "float16, .*what float16 holds"),
    ({name: x.astype(np.int32) for name, x in zip("qkv", X[:3], strict=True)}, "dtypes int32, int32 and int32"),
    ({"segment_ids": np.ones((1, 5), np.int32)}, r"segment_ids have shape \(1, 5\); expected \(1, 4\)"),
    ({"chunk_size": 0}, "chunk_size = 0 must be positive"),
    ({"window": -16}, "window = -16 must be 0 or a multiple of chunk_size = 128"),
    ({"window": 24, "chunk_size": 16}, "window = 24 must be 0 or a multiple of chunk_size = 16"),
    ({"num_sinks": 4}, "num_sinks = 4 with window = 0: sinks need a window"),
    ({"num_sinks": -1}, "num_sinks = -1"),
    ({"window_kernel": "softmax"}, "they need window > 0"),
    ({"log_gain": np.zeros(4, np.float32)}, "they need window > 0"),
    ({"far_horizon": 8}, "they need window > 0"),
    ({"far_horizon": -1, **HYBRID}, "far_horizon = -1: must be a whole number, 0 or more"),
    ({"far_horizon": 8.0, **HYBRID}, "far_horizon = 8.0: must be a whole number, 0 or more"),
    ({"log_gain": np.zeros(2, np.float32), **HYBRID}, r"log_gain has shape \(2,\); expected .* \(4,\)"),
    ({"log_weights": np.zeros((2, 31), np.float32)}, r"log_weights have shape \(2, 31\); expected \(2, 32\)"),
    ({"window_kernel": "exact", **HYBRID}, "window_kernel = 'exact': allowed: dark, softmax"),
    ({"causal": False, **HYBRID}, "causal=False works with features everywhere"),
    ({"causal": False, "return_state": True}, "causal=False works with features everywhere"),
    ({"causal": False, "state": fresh("dark", X, PURE)}, "causal=False works with features everywhere"),
    ({"state": fresh("dark", X, PURE), **HYBRID}, "another window or chunk_size than 16 and 16"),
    ({"state": fresh("dark", X, HYBRID), **PURE}, "another window or chunk_size than 0 and 16"),
    ({"state": fresh("dark", X, HYBRID), **HYBRID, "num_sinks": 1}, "another batch or num_sinks than 1 and 1"),
    (
        {"state": fresh("dark", draw("dark", 4, heads=(4, 2), batch=3), PURE), **PURE},
        "another batch or num_sinks than 1 and 0",
    ),
    ({"geometry": M[..., :9]}, r"geometry has shape \(2, 16, 9\); expected \[r, 16\] or \[2, r, 16\]"),
    ({"geometry": np.stack([M[0]] * 3)}, "geometry is for 3 heads; there are 2 key/value heads"),
    ({"geometry": M[0, 0]}, r"geometry has shape \(16,\)"),
    ({"projections": None}, "projections=None: a query then sees only the window, so window must be > 0"),
    ({"projections": W[..., :9]}, r"projections have shape \(2, 32, 9\); expected \[m, 16\] or \[2, m, 16\]"),
    ({"projections": W[:, :0]}, r"projections have shape \(2, 0, 16\)"),
    ({"projections": W[0, 0]}, r"projections have shape \(16,\)"),
    ({"projections": np.stack([W[0]] * 3)}, "projections are for 3 heads; there are 2 key/value heads"),
    (
        {"state": fresh("dark", X._replace(arrays={"projections": W[:, :8]}), PURE), **PURE},
        r"the state was made for .* \(2, 8, 8\); these inputs have \(2, 32, 8\)",
    ),
    (
        {"state": fresh("dark", draw("dark", 4, heads=(4, 1)), PURE), **PURE},
        r"the state was made for .* \(1, 32, 8\); these inputs have \(2, 32, 8\)",
    ),
]


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(("changes", "message"), BAD_INPUTS)
def test_what_does_not_fit_is_refused(changes, message):
    arguments = {"q": Q, "k": K, "v": V, "projections": W, "geometry": M} | changes
    with pytest.raises(UserError, match=message):
        dark_attention(**arguments)
