"""The TPU kernel, its steps computed by XLA on this machine, against the definition in float64 and against the scan."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import SingleDeviceSharding

from darkformer_jax import dark_attention
from darkformer_jax.aot.topology import topology_devices
from darkformer_jax.errors import UserError
from darkformer_jax.ops.attend import normalize
from darkformer_jax.ops.dark_attention import feature_kernel
from darkformer_jax.ops.linear import Tokens
from darkformer_jax.ops.pallas_tpu import attend_features
from darkformer_jax.ops.scan import scan_features
from darkformer_jax.ops.state import init_state
from tests.ops.linear_attentions import (
    Inputs,
    assert_gradients_close,
    assert_rows_close,
    documents,
    draw,
    draw_cotangent,
    oracle,
)

CHUNK = 16


def call(x, segment_ids=None, state=None, log_decay=None, scale=None):
    """(kernel, state, tokens) as `dark_attention` hands them to the scan."""
    batch, length, num_heads, dim = x.q.shape
    heads = x.k.shape[2]
    arrays = {"geometry": None, "log_weights": None} | x.arrays
    kernel = feature_kernel(x.q, x.k, **arrays, scale=scale, window=0, window_kernel="dark", log_gain=None)
    if state is None:
        features = kernel.arrays.features.projections.shape[1]
        state = init_state(batch, heads, dim, x.v.shape[3], features, x.q.dtype)
    ids = jnp.ones((batch, length), jnp.int32) if segment_ids is None else jnp.asarray(segment_ids)
    queries = x.q.reshape(batch, length, heads, num_heads // heads, dim)
    return kernel, state, Tokens(queries, x.k, x.v, ids, jnp.zeros_like(ids), log_decay)


@functools.partial(jax.jit, static_argnames="chunk_size")
def by_kernel(x, segment_ids=None, state=None, chunk_size=CHUNK):
    state, out = attend_features(*call(x, segment_ids, state), chunk_size=chunk_size, interpret=True)
    return state.far, out.reshape(*x.q.shape[:3], -1)


@jax.jit
def by_scan(x, segment_ids=None, state=None):
    state, sums = scan_features(*call(x, segment_ids, state), chunk_size=CHUNK, causal=True)
    out = normalize(sums.numerator, sums.denominator).astype(x.v.dtype)
    return state.far, out.reshape(*x.q.shape[:3], -1)


def op(x, **options):
    x = jax.tree.map(jnp.asarray, x)
    return dark_attention(*x[:3], **x.arrays, **{"chunk_size": CHUNK, "backend": "pallas_interpret"} | options)


def assert_far_close(got, want, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want)


@pytest.mark.parametrize(
    ("length", "segments", "heads"), [(1, None, (2, 2)), (40, None, (2, 1)), (45, (3, 42), (6, 2))]
)
def test_outputs_are_those_of_the_definition(length, segments, heads):
    x = draw("dark", length, heads=heads)
    ids = None if segments is None else documents(*segments)
    assert_rows_close(by_kernel(x, ids)[1], oracle("dark", x, ids), 1e-4)


def test_gradients_are_those_of_the_definition():
    x, ids = draw("dark", 37, heads=(4, 2)), documents(5, 20, 12)
    cotangent = draw_cotangent(x)
    got = jax.jit(lambda x: jax.vjp(lambda y: op(y, segment_ids=jnp.asarray(ids)), x)[1](cotangent)[0])(x)
    assert_gradients_close(got, oracle("dark", x, ids, cotangent)[1], 1e-4)


@pytest.mark.parametrize("antipodal", [False, True])
@pytest.mark.parametrize("squared_norm", [500, 1157])
def test_no_row_is_lost_of_points_far_from_the_origin(squared_norm, antipodal):
    x = draw("dark", 64, heads=(2, 1), dim=64, features=64, extreme=(squared_norm / 500) ** 0.5, antipodal=antipodal)
    assert_rows_close(by_kernel(x)[1], by_scan(x)[1], 1e-3)
    if squared_norm == 500:
        assert_rows_close(by_kernel(x)[1], oracle("dark", x), 1e-3)


@pytest.mark.parametrize("segments", [None, (5, 20, 12)])
def test_the_state_at_the_end_is_the_scans(segments):
    x = draw("dark", 37, heads=(4, 2), batch=2)
    ids = None if segments is None else np.tile(documents(*segments), (2, 1))
    assert_far_close(by_kernel(x, ids)[0], by_scan(x, ids)[0])


def test_padding_leaves_no_trace_in_the_state_and_reads_zero():
    x = draw("dark", 40)
    ids = np.where(np.arange(40) < 21, 1, 0)[None].astype(np.int32)
    far, out = by_kernel(x, ids)
    assert np.all(np.asarray(out)[:, 21:] == 0)
    assert_far_close(far, by_scan(x, ids)[0])
    assert np.asarray(far.segment).tolist() == [1]


def test_a_resumed_sequence_and_single_tokens_are_the_whole_sequence():
    x = draw("dark", 25, heads=(4, 2))
    cut = lambda start, stop: x._replace(q=x.q[:, start:stop], k=x.k[:, start:stop], v=x.v[:, start:stop])
    whole, whole_state = op(x, return_state=True)
    state, parts = None, []
    for start, stop in ((0, 13), (13, 24), (24, 25)):
        out, state = op(cut(start, stop), state=state, return_state=True)
        parts.append(out)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=2e-5, atol=2e-5)
    assert_far_close(state.far, whole_state.far)


def test_the_chunk_changes_nothing():
    x = draw("dark", 50, heads=(4, 2))
    np.testing.assert_allclose(by_kernel(x, chunk_size=8)[1], by_kernel(x, chunk_size=64)[1], rtol=2e-5, atol=2e-5)


def test_later_tokens_change_nothing():
    x = draw("dark", 40)
    changed = x._replace(k=x.k.copy(), v=x.v.copy())
    changed.k[:, 25:], changed.v[:, 25:] = 3.0, -5.0
    got, want = (np.asarray(by_kernel(y)[1]) for y in (changed, x))
    np.testing.assert_array_equal(got[:, :25], want[:, :25])
    assert np.abs(got[:, 25:] - want[:, 25:]).max() > 0.1


def test_log_weights_and_the_identity_as_geometry():
    x = draw("dark", 40, heads=(2, 2))
    weights = np.random.default_rng(3).standard_normal(x.arrays["projections"].shape[:2]).astype(np.float32)
    x = x._replace(arrays={"projections": x.arrays["projections"], "log_weights": weights})
    assert_rows_close(by_kernel(x)[1], oracle("dark", x), 1e-4)


def test_bfloat16_is_as_near_to_float64_as_the_scan():
    x = draw("dark", 64, heads=(4, 2), dim=32)
    want = oracle("dark", x)
    rounded = x._replace(q=jnp.bfloat16(x.q), k=jnp.bfloat16(x.k), v=jnp.bfloat16(x.v))
    error = lambda out: np.linalg.norm(np.asarray(out, np.float64) - want) / np.linalg.norm(want)
    far, out = by_kernel(rounded)
    assert out.dtype == jnp.bfloat16 and far.values.dtype == jnp.float32
    assert error(out) <= 1.1 * error(by_scan(rounded)[1]) < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "pallas"}, "backend = 'pallas' is a TPU kernel; this program is for a cpu: use 'scan'"),
        ({"window": 16}, "backend = 'pallas_interpret' does not cover window = 16: use backend = 'scan'"),
        ({"causal": False}, "does not cover causal=False: use backend = 'scan'"),
        ({"log_decay": jnp.full(1, -0.1)}, "does not cover log_decay: use backend = 'scan'"),
    ],
)
def test_what_the_kernel_does_not_cover_is_one_line(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        op(draw("dark", 8), **options)


TOPOLOGIES = ["v5e:1x1", "v5p:2x2x1", "v6e:1x1"]
SHAPES = [((8, 8), 128, 256), ((8, 1), 256, 256), ((9, 3), 64, 64)]


@pytest.fixture
def without_cache():
    """Programs for a TPU that is not attached cannot be read back from the cache."""
    compilation_cache.reset_cache()
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_it_compiles_for_tpus_whose_vmem_it_fits(topology, without_cache):
    """The compiler refuses what needs more VMEM than a kernel may have, 16 MiB."""
    device = SingleDeviceSharding(topology_devices(topology)[0])
    for (num_heads, heads), dim, features in SHAPES:
        for dtype in (jnp.bfloat16, jnp.float32) if dim == 128 else (jnp.bfloat16,):
            of = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=device)
            q, k = of(1, 1024, num_heads, dim), of(1, 1024, heads, dim)
            arrays = {"projections": of(heads, features, dim), "geometry": of(heads, dim, dim)}
            arrays = {
                name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=device) for name, leaf in arrays.items()
            }

            def attend(x):
                kernel, state, tokens = call(x)
                return attend_features(kernel, state, tokens)[1]

            program = jax.jit(attend).lower(Inputs(q, k, k, arrays)).compile().as_text()
            assert program.count("tpu_custom_call") >= 1
