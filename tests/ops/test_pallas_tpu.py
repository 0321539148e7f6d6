"""The TPU kernel, its steps computed by XLA on this machine, against the definition in float64 and against the scan."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from darkformer_jax import dark_attention
from darkformer_jax.aot.topology import topology_devices
from darkformer_jax.errors import UserError
from darkformer_jax.ops import pallas_fast
from darkformer_jax.ops.attend import normalize
from darkformer_jax.ops.dark_attention import feature_kernel
from darkformer_jax.ops.decay import decay_per_token
from darkformer_jax.ops.linear import Tokens
from darkformer_jax.ops.pallas_blocks import Inputs as KernelInputs
from darkformer_jax.ops.pallas_blocks import Sizes
from darkformer_jax.ops.pallas_forward import forward
from darkformer_jax.ops.pallas_tpu import attend_features
from darkformer_jax.ops.scan import scan_feature_chunks, scan_features
from darkformer_jax.ops.state import init_state
from tests.ops.linear_attentions import (
    Inputs,
    assert_gradients_close,
    assert_rows_close,
    documents,
    draw,
    draw_cotangent,
    map_tokens,
    oracle,
)

CHUNK = 16
DOCUMENTS = np.tile(documents(3, 27, 15), (2, 1))  # whose ends lie within chunks


FORMS = ("dark", "dark with slopes", "dark with gates")


def draw_inputs(op="dark", **data):
    """Inputs of one shape: what is compiled for it serves many tests. Chunks do not divide the length."""
    return draw(op, 45, heads=(4, 2), batch=2, **data)


def call(x, segment_ids=None, far=None, scale=None):
    """(kernel, state, tokens) as `dark_attention` hands them to the scan."""
    batch, length, num_heads, dim = x.q.shape
    heads = x.k.shape[2]
    arrays = {"geometry": None, "log_weights": None} | x.arrays
    log_decay = arrays.pop("log_decay", None)
    kernel = feature_kernel(x.q, x.k, **arrays, scale=scale, window=0, window_kernel="dark", log_gain=None)
    state = init_state(batch, heads, dim, x.v.shape[3], kernel.arrays.features.projections.shape[1], x.q.dtype)
    state = state if far is None else state._replace(far=far)
    ids = jnp.ones((batch, length), jnp.int32) if segment_ids is None else jnp.asarray(segment_ids)
    queries = x.q.reshape(batch, length, heads, num_heads // heads, dim)
    decays = None if log_decay is None else decay_per_token(log_decay, batch, length, x.q.dtype)
    decays = None if decays is None else jnp.where((ids != 0)[:, :, None], decays, 0)
    return kernel, state, Tokens(queries, x.k, x.v, ids, jnp.zeros_like(ids), decays)


def _by_kernel(x, ids, far, chunk_size):
    state, out = attend_features(*call(x, ids, far), chunk_size=chunk_size, interpret=True)
    return state.far, out.reshape(*x.q.shape[:3], -1)


def _by_scan(x, ids, far, chunk_size):
    state, sums = scan_features(*call(x, ids, far), chunk_size=chunk_size, causal=True, over_chunks=scan_feature_chunks)
    out = normalize(sums.numerator, sums.denominator).astype(x.v.dtype)
    return state.far, out.reshape(*x.q.shape[:3], -1)


@functools.partial(jax.jit, static_argnames=("form", "chunk_size"))
def run(form, x, ids, far, chunk_size):
    return form(x, ids, far, chunk_size)


def by(form, x, segment_ids=None, far=None, chunk_size=CHUNK):
    """(far state, out) from arguments that differ in values only, so that each form is compiled once."""
    x = jax.tree.map(jnp.asarray, x)
    ids = np.ones(x.q.shape[:2], np.int32) if segment_ids is None else segment_ids
    return run(form, x, ids, call(x)[1].far if far is None else far, chunk_size)


by_kernel = functools.partial(by, _by_kernel)
by_scan = functools.partial(by, _by_scan)


def op(x, **options):
    x = jax.tree.map(jnp.asarray, x)
    return dark_attention(*x[:3], **x.arrays, **{"chunk_size": CHUNK, "backend": "pallas_interpret"} | options)


def assert_far_close(got, want, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want)


@pytest.mark.parametrize("op", FORMS)
@pytest.mark.parametrize("ids", [np.ones_like(DOCUMENTS), DOCUMENTS], ids=["one document", "three"])
def test_outputs_are_those_of_the_definition_and_states_those_of_the_scan(ids, op):
    x = draw_inputs(op)
    far, out = by_kernel(x, ids)
    assert_rows_close(out, oracle(op, x, ids), 1e-4)
    assert_far_close(far, by_scan(x, ids)[0])


@functools.partial(jax.jit, static_argnames=("form", "chunk_size"))
def _pull(form, x, ids, far, cotangents, chunk_size):
    (_, out), pull = jax.vjp(lambda x, far: form(x, ids, far, chunk_size), x, far)
    return out, *pull(cotangents)


def with_gradients(form, x, segment_ids, cotangent, far=None, of_far=None, chunk_size=CHUNK):
    """(out, gradients of x, of the far state before), by cotangents of out and, if there is one, of the state after."""
    x = jax.tree.map(jnp.asarray, x)
    far = call(x)[1].far if far is None else far
    of_far = jax.tree.map(jnp.zeros_like, far) if of_far is None else of_far
    of_far = of_far._replace(segment=np.zeros(far.segment.shape, jax.dtypes.float0))
    return _pull(form, x, segment_ids, far, (of_far, cotangent.astype(x.v.dtype)), chunk_size)


@pytest.mark.parametrize("size", [1.0, 1e-7])
@pytest.mark.parametrize(
    ("op", "data", "limit"),
    [
        ("dark", {}, 1e-4),
        ("dark", {"extreme": 1.0}, 1e-4),
        ("dark", {"extreme": 1.0, "antipodal": True}, 1e-4),
        ("dark", {"extreme": (1157 / 500) ** 0.5}, 5e-4),
        ("dark with slopes", {}, 1e-4),
        ("dark with gates", {}, 1e-4),
        ("dark with gates", {"extreme": 1.0}, 1e-4),
    ],
)
def test_gradients_are_those_of_the_definition(op, data, limit, size):
    x = draw_inputs(op, **data)
    cotangent = draw_cotangent(x)
    _, got, _ = with_gradients(_by_kernel, x, DOCUMENTS, size * cotangent)
    got = jax.tree.map(lambda leaf: np.float64(leaf) / size, got)
    assert_gradients_close(got, oracle(op, x, DOCUMENTS, cotangent)[1], limit)


@pytest.mark.parametrize("op", FORMS)
def test_gradients_pass_through_states_as_in_the_scan(op):
    x, far = draw_inputs(op), by_scan(draw_inputs(op, seed=1))[0]
    random = np.random.default_rng(2)
    of_far = far._replace(**{n: random.standard_normal(far._asdict()[n].shape, np.float32) for n in far._fields[:3]})
    ids = np.where(np.arange(45) < 40, DOCUMENTS, 0)
    got, want = (with_gradients(form, x, ids, draw_cotangent(x), far, of_far) for form in (_by_kernel, _by_scan))
    assert_gradients_close(got[1], want[1], 1e-4)
    for name in far._fields[:3]:
        assert np.abs(getattr(want[2], name)).max() > 0.01
        np.testing.assert_allclose(getattr(got[2], name), getattr(want[2], name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("antipodal", [False, True])
@pytest.mark.parametrize("squared_norm", [500, 1157])
def test_no_row_is_lost_of_points_far_from_the_origin(squared_norm, antipodal):
    x = draw_inputs(extreme=(squared_norm / 500) ** 0.5, antipodal=antipodal)
    out = by_kernel(x)[1]
    assert_rows_close(out, by_scan(x)[1], 1e-3)
    if squared_norm == 500:
        assert_rows_close(out, oracle("dark", x, np.ones_like(DOCUMENTS)), 1e-3)


def share_done_safely(x, segment_ids):
    """Of the chunks."""
    kernel, state, tokens = call(jax.tree.map(jnp.asarray, x), segment_ids)
    inputs = KernelInputs(kernel.arrays.features, state.far, *tokens[:3], None)
    saved = forward(Sizes(float(kernel.scale), CHUNK, True), inputs, tokens.segments, save=True)[2]
    inverses = np.asarray(saved.inverses)
    return np.mean(inverses.reshape(*inverses.shape[:3], -1, CHUNK) == 0)


@pytest.mark.parametrize(
    ("squared_norm", "ids", "least", "most"),
    [
        (1, np.ones_like(DOCUMENTS), 0, 0),
        (40, np.ones_like(DOCUMENTS), 0, 0),
        (40, DOCUMENTS, 0, 0),  # though the keys of a document that begins say nothing of those to come
        (40, np.where(np.arange(45) < 20, DOCUMENTS, 0), 0, 0),  # with a chunk of padding alone,
        (250, DOCUMENTS, 0.1, 0.9),
        (1157, DOCUMENTS, 1, 1),
    ],
)
def test_chunks_are_done_again_only_where_float32_does_not_hold_one_scale_per_feature(squared_norm, ids, least, most):
    x = draw_inputs(extreme=(squared_norm / 500) ** 0.5)
    assert least <= share_done_safely(x, ids) <= most
    got, want = by_kernel(x, ids)[1], oracle("dark", x, ids)
    assert_rows_close(got[:, ids[0] != 0], want[:, ids[0] != 0], 2e-4)


def two_features(log_decay=None):
    """Three chunks of one number per token, with features of exp(5 x) and exp(-5 x)."""
    random = np.random.default_rng(0)
    zeros = np.zeros((1, 48, 1, 1), np.float32)
    arrays = {"projections": np.array([[[5.0], [-5.0]]], np.float32)}
    v = random.standard_normal((1, 48, 1, 2)).astype(np.float32)
    return Inputs(zeros.copy(), zeros.copy(), v, arrays | ({} if log_decay is None else {"log_decay": log_decay}))


def a_document_far_below_the_last():
    """In its second feature, which is what the queries of its second chunk look for."""
    x, ids = two_features(), np.repeat([1, 2, 2], 16)[None].astype(np.int32)
    x.q[:, 16:32], x.k[:, 16:], x.q[:, 32:] = 9.5, 9.5, -12.0
    x.k[0, 16:32, 0, 0] += np.linspace(-0.2, 0.2, 16, dtype=np.float32)
    return x, ids


def keys_that_decay_to_nothing():
    """But for the chunk's last one, whose features are smaller still."""
    decay = np.zeros((1, 48, 1), np.float32)
    decay[:, 31] = -110
    x, ids = two_features(decay), np.repeat([1, 2, 2], 16)[None].astype(np.int32)
    x.q[:, 31], x.k[:, 31] = 30.0, 30.0
    return x, ids


@pytest.mark.parametrize("case", [a_document_far_below_the_last, keys_that_decay_to_nothing])
def test_a_state_whose_features_fall_keeps_them(case):
    x, ids = case()
    for last in (0, 2):  # padding after them returns the state at once
        ids = np.where(np.arange(48) < 32, ids, last).astype(np.int32)
        assert_far_close(by_kernel(x, ids)[0], by_scan(x, ids)[0], 1e-4)
    cotangent = draw_cotangent(x)
    got, want = (with_gradients(form, x, ids, cotangent) for form in (_by_kernel, _by_scan))
    assert_rows_close(got[0], want[0], 1e-4)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)  # those of q are rounding alone
    jax.tree.map(close, got[1], want[1])


def test_any_number_names_a_document():
    x = draw_inputs()
    np.testing.assert_array_equal(by_kernel(x, -DOCUMENTS)[1], by_kernel(x, DOCUMENTS)[1])


@pytest.mark.parametrize("op", FORMS)
def test_the_safe_way_is_right_for_what_takes_the_fast_one(op, monkeypatch):
    monkeypatch.setattr(pallas_fast, "MOST_ABOVE", -np.inf)
    x = draw_inputs(op)
    if op == "dark":
        assert share_done_safely(x, DOCUMENTS) == 1
    cotangent = draw_cotangent(x)
    want, of_x = oracle(op, x, DOCUMENTS, cotangent)
    out, got, _ = with_gradients(
        lambda *call: _by_kernel(*call), x, DOCUMENTS, cotangent
    )  # a form that is not compiled
    assert_rows_close(out, want, 1e-4)
    assert_gradients_close(got, of_x, 1e-4)


@pytest.mark.parametrize("op", ["dark", "dark with gates"])
def test_blocks_of_a_chunk_that_see_more_and_more_keys(op):
    x, ids = draw(op, 300, heads=(2, 1)), documents(130, 150, 20)
    cotangent = draw_cotangent(x)
    want, of_x = oracle(op, x, ids, cotangent)
    out, got, _ = with_gradients(_by_kernel, x, ids, cotangent, chunk_size=256)
    assert_rows_close(out, want, 1e-4)
    assert_gradients_close(got, of_x, 1e-4)


def test_padding_leaves_no_trace_in_the_state_and_reads_zero():
    x = draw_inputs()
    ids = np.where(np.arange(45) < 21, 1, 0)[None].repeat(2, axis=0).astype(np.int32)
    far, out = by_kernel(x, ids)
    assert np.all(np.asarray(out)[:, 21:] == 0)
    np.testing.assert_array_equal(out[:, :21], by_kernel(x)[1][:, :21])
    assert_far_close(far, by_scan(x, ids)[0])
    assert np.asarray(far.segment).tolist() == [1, 1]


@pytest.mark.parametrize("op", FORMS)
def test_a_resumed_sequence_is_the_whole_sequence(op):
    x = draw_inputs(op)
    whole = by_kernel(x)
    far, parts = None, []
    for start, stop in ((0, 13), (13, 45)):  # each part at the front of a row, the rest of which is padding
        moved = map_tokens(lambda leaf, start=start: np.roll(leaf, -start, axis=1), x)
        ids = np.where(np.arange(45) < stop - start, 1, 0)[None].repeat(2, axis=0).astype(np.int32)
        far, out = by_kernel(moved, ids, far)
        parts.append(out[:, : stop - start])
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole[1], rtol=2e-5, atol=2e-5)
    assert_far_close(far, whole[0])


def test_later_tokens_change_nothing():
    x = draw_inputs()
    changed = x._replace(k=x.k.copy(), v=x.v.copy())
    changed.k[:, 25:], changed.v[:, 25:] = 3.0, -5.0
    got, want = (np.asarray(by_kernel(y)[1]) for y in (changed, x))
    np.testing.assert_array_equal(got[:, :25], want[:, :25])
    assert np.abs(got[:, 25:] - want[:, 25:]).max() > 0.1


def test_log_weights_the_identity_as_geometry_and_a_chunk_longer_than_the_text():
    x = draw("dark", 20, heads=(2, 2))
    weights = np.random.default_rng(3).standard_normal(x.arrays["projections"].shape[:2]).astype(np.float32)
    x = x._replace(arrays={"projections": x.arrays["projections"], "log_weights": weights})
    cotangent, ids = draw_cotangent(x), np.ones((1, 20), np.int32)
    want, of_x = oracle("dark", x, ids, cotangent)
    out, got, _ = with_gradients(_by_kernel, x, ids, cotangent, chunk_size=64)
    assert_rows_close(out, want, 1e-4)
    assert_gradients_close(got, of_x, 1e-4)


@pytest.mark.parametrize("op", FORMS)
def test_bfloat16_is_near_to_float64(op):
    x = draw_inputs(op)
    cotangent = draw_cotangent(x)
    want, of_x = oracle(op, x, DOCUMENTS, cotangent)
    rounded = x._replace(q=jnp.bfloat16(x.q), k=jnp.bfloat16(x.k), v=jnp.bfloat16(x.v))
    error = lambda got, want: np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
    out, got, _ = with_gradients(_by_kernel, rounded, DOCUMENTS, cotangent)
    assert out.dtype == jnp.bfloat16 and [leaf.dtype for leaf in got[:3]] == 3 * [jnp.bfloat16]
    assert error(out, want) < 0.02
    for ours, leaf in zip(jax.tree.leaves(got), jax.tree.leaves(of_x), strict=True):
        assert error(ours, leaf) < 0.05


@pytest.mark.parametrize(("length", "kernels"), [(7, 1), (1, 0)])
def test_one_token_after_a_state_takes_the_step_of_the_scan(length, kernels):
    x = draw("dark", length)
    state = init_state(1, 1, 16, 8, 32, jnp.float32, CHUNK)
    traced = jax.make_jaxpr(lambda x, state: op(x, state=state, return_state=True))(x, state)
    assert str(traced).count("pallas_call") == kernels


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "pallas"}, "backend = 'pallas' is a TPU kernel; this program is for a cpu: use 'scan'"),
        ({"causal": False}, "does not cover causal=False: use backend = 'scan'"),
    ],
)
def test_what_the_kernel_does_not_cover_is_one_line(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        op(draw("dark", 8), **options)


def test_a_batch_without_rows_is_no_error():
    x = draw("dark", 8)
    none = x._replace(**{name: getattr(x, name)[:0] for name in "qkv"})
    assert op(none).shape == op(none, backend="scan").shape == (0, 8, 2, 8)


def test_second_derivatives_are_refused_by_name():
    x = draw("dark", 8)
    total = lambda q: jnp.sum(op(x._replace(q=q)) ** 2)
    with pytest.raises(UserError, match="backend = 'pallas' has first derivatives only: use backend = 'scan'"):
        jax.make_jaxpr(jax.grad(lambda q: jnp.sum(jax.grad(total)(q))))(jnp.asarray(x.q))


# Chip, rows and tokens, heads, size of a head, features, dtype, whether there are gates, and whether 64 bits are on:
# each chip and each kind of shape once.
COMPILED = [
    ("v5e:1x1", (1, 1024), (8, 1), 256, 256, jnp.bfloat16, True, False),
    ("v5p:2x2x1", (2048, 256), (9, 3), 64, 64, jnp.float32, False, True),
    ("v6e:1x1", (1, 1024), (8, 8), 128, 256, jnp.bfloat16, True, False),
]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(("topology", "tokens", "heads", "dim", "features", "dtype", "gates", "x64"), COMPILED)
def test_it_compiles_for_tpus_whose_memories_it_fits(
    topology, tokens, heads, dim, features, dtype, gates, x64, without_cache
):
    """The compiler refuses what needs more VMEM than the kernels ask for, or more scalar memory than there is."""
    device = SingleDeviceSharding(topology_devices(topology)[0])
    of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=device)
    q, k = (of(*tokens, count, dim, dtype=dtype) for count in heads)
    arrays = {"projections": of(heads[1], features, dim), "geometry": of(heads[1], dim, dim)}
    arrays |= {"log_decay": of(*tokens, heads[1])} if gates else {}
    loss = lambda x: jnp.sum(attend_features(*call(x))[1].astype(jnp.float32))
    with jax.enable_x64(x64):
        program = jax.jit(jax.grad(loss)).lower(Inputs(q, k, k, arrays)).compile().as_text()
    assert program.count("tpu_custom_call") >= 2  # forward and backward
