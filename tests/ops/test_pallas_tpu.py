"""The TPU kernel, its steps computed by XLA on this machine, against the definition in float64 and against the scan."""

import functools
import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from darkformer_jax.aot.topology import topology_devices
from darkformer_jax.ops.attend import normalize
from darkformer_jax.ops.dark_attention import feature_kernel
from darkformer_jax.ops.features import log_elu_plus_one
from darkformer_jax.ops.linear import Tokens
from darkformer_jax.ops.pallas_tpu import attend_features, chunk_of, what_is_not_covered
from darkformer_jax.ops.scan import scan_features
from darkformer_jax.ops.state import init_state
from tests.ops.linear_attentions import (
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


@jax.jit
def gradients(x, segment_ids, cotangent):
    return jax.vjp(lambda y: by_kernel(y, segment_ids)[1], x)[1](cotangent)[0]


def assert_far_close(got, want, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want)


@pytest.mark.parametrize(
    ("length", "segments"), [(1, None), (40, None), (37, (5, 20, 12)), (48, (16, 16, 16)), (45, (3, 42))]
)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
def test_outputs_and_gradients_are_those_of_the_definition(length, segments, heads):
    x = draw("dark", length, heads=heads, batch=2)
    ids = None if segments is None else np.tile(documents(*segments), (2, 1))
    cotangent = draw_cotangent(x)
    want, want_gradients = oracle("dark", x, ids, cotangent)
    assert_rows_close(by_kernel(x, ids)[1], want, 1e-4)
    assert_gradients_close(gradients(x, ids, cotangent), want_gradients, 1e-4)


@pytest.mark.parametrize("antipodal", [False, True])
@pytest.mark.parametrize("squared_norm", [500, 1157])
def test_no_row_is_lost_of_points_far_from_the_origin(squared_norm, antipodal):
    x = draw("dark", 64, heads=(2, 1), dim=64, features=64, extreme=(squared_norm / 500) ** 0.5, antipodal=antipodal)
    assert_rows_close(by_kernel(x)[1], by_scan(x)[1], 1e-3)
    if squared_norm == 500:
        assert_rows_close(by_kernel(x)[1], oracle("dark", x), 1e-3)


@pytest.mark.parametrize("segments", [None, (5, 20, 12), (36, 1)])
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


def test_a_resumed_sequence_is_the_whole_one():
    x = draw("dark", 50, heads=(4, 2), batch=2)
    cut = lambda start, stop: x._replace(q=x.q[:, start:stop], k=x.k[:, start:stop], v=x.v[:, start:stop])
    far, first = by_kernel(cut(0, 21))
    state = call(x)[1]._replace(far=far)
    far, second = by_kernel(cut(21, 50), state=state)
    whole_far, whole = by_kernel(x)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, rtol=2e-5, atol=2e-5)
    assert_far_close(far, whole_far)


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


def test_what_the_kernel_does_not_cover_is_named():
    x = draw("dark", 8)
    kernel, state, tokens = call(x)
    assert what_is_not_covered(kernel, state, tokens, causal=True) is None
    assert what_is_not_covered(kernel, state, tokens, causal=False) == "causal=False"
    decayed = tokens._replace(decays=jnp.zeros((1, 8, 1)))
    assert what_is_not_covered(kernel, state, decayed, causal=True) == "log_decay"
    other = kernel._replace(feature_map=log_elu_plus_one)
    assert "another feature map" in what_is_not_covered(other, state, tokens, causal=True)
    with pytest.raises(ValueError, match="does not cover log_decay"):
        attend_features(kernel, state, decayed, interpret=True)
