"""`dark_attention` in float32 and bfloat16 against its definition in float64 (ops/oracle.py), and against itself."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax import dark_attention, draw_projections
from darkformer_jax.errors import UserError
from darkformer_jax.ops.dark_attention import init_state
from darkformer_jax.ops.features import log_positive_features
from darkformer_jax.ops.oracle import dark_attention_oracle
from darkformer_jax.ops.proposals import transform_projections

PURE = {"chunk_size": 16}
HYBRID = {"chunk_size": 16, "window": 16, "num_sinks": 3}
PRETRAINED = HYBRID | {"window_kernel": "softmax"}


class Inputs(NamedTuple):
    q: Any  # [b, n, hq, d]
    k: Any  # [b, n, hkv, d]
    v: Any  # [b, n, hkv, dv]
    w: Any  # [hkv, m, d]
    M: Any  # [hkv, d, d]
    gain: Any = None  # [hq]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw_projections(seed, features, dim, num_heads):
    return draw_projections(jax.random.key(seed), features, dim, num_heads=num_heads)


def draw(
    length,
    *,
    heads=(2, 1),
    dim=16,
    value_dim=8,
    features=32,
    batch=1,
    squared_norm=None,
    antipodal=False,
    gain=False,
    seed=0,
):
    """Gaussian inputs. `squared_norm`: |M x|^2 of every scaled query and key; `antipodal`: a query is minus its key."""
    random = np.random.default_rng(seed)
    group = heads[0] // heads[1]
    q = random.standard_normal((batch, length, heads[0], dim))
    k = random.standard_normal((batch, length, heads[1], dim))
    v = random.standard_normal((batch, length, heads[1], value_dim))
    geometry = np.eye(dim) + 0.1 * random.standard_normal((heads[1], dim, dim))
    if antipodal:
        q = -np.repeat(k, group, axis=2)
    if squared_norm is not None:
        for x, m in ((q, np.repeat(geometry, group, axis=0)), (k, geometry)):
            norm = np.linalg.norm(np.einsum("hrd,bnhd->bnhr", m, x), axis=-1, keepdims=True) * dim**-0.25
            x *= math.sqrt(squared_norm) / norm
    w = _draw_projections(seed, features, dim, heads[1])
    inputs = Inputs(*(np.asarray(x, np.float32) for x in (q, k, v, w, geometry)))
    return inputs._replace(gain=random.standard_normal(heads[0]).astype(np.float32)) if gain else inputs


def draw_cotangent(x, seed=1):
    return np.random.default_rng(seed).standard_normal((*x.q.shape[:3], x.v.shape[3])).astype(np.float32)


def documents(*lengths):
    """Segment ids [1, sum(lengths)] of consecutive documents."""
    return np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)[None]


@functools.cache
def _jitted(attention, gradients, options):
    def run(x, segment_ids):
        arrays = {"projections": x.w, "geometry": x.M, "log_gain": x.gain}
        return attention(x.q, x.k, x.v, **arrays, segment_ids=segment_ids, **dict(options))

    def run_with_gradients(x, segment_ids, cotangent):
        out, pull = jax.vjp(lambda y: run(y, segment_ids), x)
        return out, pull(cotangent)[0]

    return jax.jit(run_with_gradients if gradients else run)


def attend(x, segment_ids=None, **options):
    return _jitted(dark_attention, False, tuple(options.items()))(x, segment_ids)


def with_gradients(x, cotangent, segment_ids=None, **options):
    """The output, and the gradients of sum(out * cotangent) as Inputs."""
    return _jitted(dark_attention, True, tuple(options.items()))(x, segment_ids, cotangent)


def widen(x):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), x)


def oracle(x, segment_ids=None, cotangent=None, **options):
    """The same two in float64."""
    with jax.enable_x64(True):
        run = _jitted(dark_attention_oracle, cotangent is not None, tuple(options.items()))
        more = () if cotangent is None else (widen(cotangent),)
        return jax.tree.map(np.asarray, run(widen(x), segment_ids, *more))


def assert_rows_close(got, want, limit):
    """Relative error of the whole (Frobenius) and of the worst row under `limit`, no row zero or NaN."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    size = np.linalg.norm(want, axis=-1)
    error = np.linalg.norm(got - want, axis=-1)
    assert np.all(np.isfinite(got)) and np.all(np.linalg.norm(got, axis=-1) > 0)
    print(f"outputs: {np.linalg.norm(error) / np.linalg.norm(size):.1e}, worst row {np.max(error / size):.1e}")
    assert np.linalg.norm(error) <= limit * np.linalg.norm(size)
    assert np.max(error / size) <= limit


def assert_gradients_close(got, want, limit, names=Inputs._fields):
    """Likewise for each gradient. Rows of a gradient may vanish: a row counts at least as the root mean square row.

    Where the whole gradient vanishes (one token; weightless far keys) `limit` is absolute: cotangents have size one.
    """
    for name, ours, reference in zip(names, got, want, strict=True):
        if reference is None:  # no such input
            continue
        ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
        assert np.all(np.isfinite(ours)), name
        size = np.linalg.norm(reference, axis=-1)
        error = np.linalg.norm(ours - reference, axis=-1)
        typical = np.sqrt(np.mean(size**2))
        if typical < 1e-9:
            assert np.max(error) < limit, name
            continue
        worst = np.max(error / np.maximum(size, typical))
        print(f"gradient of {name}: {np.linalg.norm(error) / np.linalg.norm(size):.1e}, worst row {worst:.1e}")
        assert np.linalg.norm(error) <= limit * np.linalg.norm(size), name
        assert worst <= limit, name


@pytest.mark.parametrize(
    ("length", "shape", "segments", "options"),
    [
        (1, {}, None, PURE),
        (1, {}, None, HYBRID),
        (63, {"heads": (4, 2)}, None, {"chunk_size": 7, "window": 14, "num_sinks": 2}),
        (63, {"heads": (4, 2), "batch": 2}, None, PURE),
        (500, {}, (100, 1, 250, 149), {"chunk_size": 128}),
        (500, {"heads": (4, 2)}, (100, 1, 250, 149), {"chunk_size": 16, "window": 32, "num_sinks": 3}),
        (500, {}, (100, 1, 250, 149), {"chunk_size": 32, "causal": False}),
        (192, {"dim": 64, "features": 256}, None, {"chunk_size": 64}),
        (1024, {}, None, {"chunk_size": 64}),
        (1024, {}, None, {"chunk_size": 128, "window": 128}),
        (300, {"heads": (4, 2), "gain": True}, (100, 1, 199), PRETRAINED),
    ],
)
def test_outputs_and_gradients_against_float64(length, shape, segments, options):
    ids = None if segments is None else documents(*segments)
    for data, limit in (
        ({}, 1e-4),
        ({"squared_norm": 500}, 1e-3),
        ({"squared_norm": 500, "antipodal": True}, 1e-3),
    ):
        x = draw(length, **shape, **data)
        if ids is not None:
            ids = np.tile(ids[:1], (x.q.shape[0], 1))
        cotangent = draw_cotangent(x)
        out, gradients = with_gradients(x, cotangent, ids, **options)
        want, want_gradients = oracle(x, ids, cotangent, **options)
        assert_rows_close(out, want, limit)
        assert_gradients_close(gradients, want_gradients, limit)


@pytest.mark.parametrize("chunk_size", [1, 7, 63, 256, 1000])
def test_chunk_size_changes_nothing(chunk_size):
    x, ids = draw(500, squared_norm=500), documents(63, 400, 37)
    assert_rows_close(attend(x, ids, chunk_size=chunk_size), oracle(x, ids), 1e-3)


def test_scale_low_rank_geometry_and_shared_projections():
    x = draw(40, heads=(4, 2))
    low = x._replace(M=x.M[:, :5], w=np.asarray(draw_projections(jax.random.key(3), 32, 5)))
    want = oracle(low._replace(w=np.stack([low.w, low.w])), chunk_size=16, scale=0.4)
    assert_rows_close(attend(low, chunk_size=16, scale=0.4), want, 1e-4)
    identity = x._replace(M=np.stack([np.eye(16, dtype=np.float32)] * 2))
    assert_rows_close(attend(x._replace(M=None), chunk_size=16), oracle(identity, chunk_size=16, scale=0.25), 1e-4)


@pytest.mark.parametrize("options", [PURE, HYBRID])
def test_projections_of_another_law_with_their_weights(options):
    x = draw(60, heads=(4, 2))
    covariance = np.stack([np.diag(np.linspace(0.7, 2.0, 16, dtype=np.float32))] * 2)
    w, log_weights = transform_projections(x.w, covariance)
    x = x._replace(w=np.asarray(w))
    weighted = functools.partial(dark_attention, log_weights=log_weights)
    with jax.enable_x64(True):
        wide = np.asarray(log_weights, np.float64)
        definition = functools.partial(dark_attention_oracle, log_weights=wide)
        want = np.asarray(_jitted(definition, False, tuple(options.items()))(widen(x), None))
    assert_rows_close(_jitted(weighted, False, tuple(options.items()))(x, None), want, 1e-4)
    assert np.max(np.abs(attend(x, **options) - want)) > 1e-2


def test_without_projections_only_window_and_sinks_are_seen():
    x, ids = draw(80)._replace(w=None), documents(50, 30)
    assert_rows_close(attend(x, ids, **HYBRID), oracle(x, ids, **HYBRID), 1e-4)


@pytest.mark.parametrize("options", [PURE, HYBRID])
def test_bfloat16_inputs(options):
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), draw(500, features=64))
    cotangent = jnp.asarray(draw_cotangent(x), jnp.bfloat16)
    out, gradients = with_gradients(x, cotangent, **options)
    want, want_gradients = oracle(x, None, cotangent, **options)
    assert out.dtype == jnp.bfloat16
    assert np.all(np.linalg.norm(np.asarray(out, np.float32), axis=-1) > 0)
    for got, reference in zip((out, *gradients[:5]), (want, *want_gradients[:5]), strict=True):
        error = np.linalg.norm(np.asarray(got, np.float64) - reference) / np.linalg.norm(reference)
        print(f"bfloat16: {error:.1e}")
        assert error < 2e-2


@pytest.mark.parametrize("options", [PURE, HYBRID])
def test_later_tokens_change_nothing(options):
    x = draw(100, heads=(2, 2), squared_norm=30)
    before = np.asarray(attend(x, **options))
    other = draw(100, heads=(2, 2), seed=5)
    for t in (0, 15, 16, 50, 98):  # in the middle and at the edges of chunks
        later = (np.arange(100) > t)[None, :, None, None]
        changed = x._replace(
            q=np.where(later, other.q, x.q),
            k=np.where(later, 10 * x.k, x.k),
            v=np.where(later, 1000 * other.v, x.v),
        )
        after = np.asarray(attend(changed, **options))
        error = np.linalg.norm(after - before, axis=-1) / np.linalg.norm(before, axis=-1)
        assert np.max(error[:, : t + 1]) <= 1e-6
        assert np.median(error[:, t + 1 :]) > 1e-2


@pytest.mark.parametrize(
    ("lengths", "options"),
    [((37, 64, 1, 98), PURE), ((37, 64, 1, 98), PURE | {"causal": False}), ((48, 64, 16, 72), HYBRID)],
)
def test_packed_is_separate(lengths, options):
    # With a window the chunks are those of the row: a document equals itself alone where it starts with a chunk.
    x, ids = draw(200, heads=(2, 2)), documents(*lengths)
    separate, row_ids = [[leaf[0] for leaf in x[:3]]], [ids[0]]
    for document in range(1, 5):  # one batch of documents, each moved to the front of its row
        order = np.argsort(ids[0] != document, kind="stable")
        separate.append([leaf[0, order] for leaf in x[:3]])
        row_ids.append((np.arange(200) < lengths[document - 1]).astype(np.int32))
    rows = Inputs(*(np.stack(leaves) for leaves in zip(*separate, strict=True)), x.w, x.M)
    packed, *alone = np.asarray(attend(rows, np.stack(row_ids), **options))
    joined = np.concatenate([out[:n] for out, n in zip(alone, lengths, strict=True)])
    assert_rows_close(packed, joined, 1e-5)


def pad(x, before, after):
    """q, k, v with NaN around them, and their segment ids."""
    widths = [(0, 0), (before, after), (0, 0), (0, 0)]
    padded = x._replace(**{name: np.pad(getattr(x, name), widths, constant_values=np.nan) for name in "qkv"})
    ids = np.pad(np.ones(x.q.shape[:2], np.int32), widths[:2])
    return padded, ids


@pytest.mark.parametrize(("options", "before"), [(PURE, 9), (PURE | {"causal": False}, 9), (HYBRID, 16)])
def test_padding_with_nan_is_no_padding(options, before):
    x = draw(53, heads=(2, 2))
    cotangent = draw_cotangent(x)
    padded, ids = pad(x, before, 27)
    inside = slice(before, before + 53)
    padded_cotangent = np.pad(cotangent, [(0, 0), (before, 27), (0, 0), (0, 0)], constant_values=1)
    out, gradients = with_gradients(padded, padded_cotangent, ids, **options)
    want, want_gradients = with_gradients(x, cotangent, **options)
    assert_rows_close(out[:, inside], want, 1e-5)
    outside = np.delete(out, np.arange(before, before + 53), axis=1)
    np.testing.assert_array_equal(outside, 0)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))
    gradients = gradients._replace(**{name: getattr(gradients, name)[:, inside] for name in "qkv"})
    assert_gradients_close(gradients, want_gradients, 1e-5)


def resume(x, state, segment_ids, **options):
    run = _resume(tuple(options.items()))
    return run(x, state, segment_ids)


@functools.cache
def _resume(options):
    def run(x, state, segment_ids):
        return dark_attention(
            *x[:3],
            projections=x.w,
            geometry=x.M,
            log_gain=x.gain,
            segment_ids=segment_ids,
            state=state,
            return_state=True,
            **dict(options),
        )

    return jax.jit(run)


def fresh(x, options, dtype=jnp.float32):
    sizes = {name: options.get(name, 0) for name in ("window", "num_sinks")}
    shape = (x.q.shape[0], x.k.shape[2], x.k.shape[3], x.v.shape[3], x.w.shape[-2])
    return jax.jit(lambda: init_state(*shape, dtype, options["chunk_size"], **sizes))()


def part(x, start, stop):
    return x._replace(q=x.q[:, start:stop], k=x.k[:, start:stop], v=x.v[:, start:stop])


def visible(state):
    """What of a state matters: slots that hold no token may hold anything."""
    state = jax.device_get(state)
    recent, sinks, far = state.recent, state.sinks, state.far
    used = (recent.segments != 0)[:, None, :, None]
    filled = sinks.filled[:, None, :, None]
    return {
        "key_max": far.key_max,
        "normalizer": far.normalizer,
        "values": far.values,
        "segment": far.segment,
        "sinks": (np.where(filled, sinks.keys, 0), np.where(filled, sinks.values, 0), sinks.filled),
        "recent": (np.where(used, recent.keys, 0), np.where(used, recent.values, 0), recent.segments),
        "positions": np.where(recent.segments != 0, recent.positions, 0),
        "counts": (state.fill, state.last_segment, state.document_length),
    }


def assert_states_close(got, want, tolerance=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), visible(got), visible(want)
    )


@pytest.mark.parametrize(
    ("options", "gain"),
    [
        ({"chunk_size": 8}, False),
        ({"chunk_size": 8, "window": 16, "num_sinks": 3}, False),
        ({"chunk_size": 8, "window": 16, "num_sinks": 3, "window_kernel": "softmax"}, True),
    ],
)
def test_split_and_resume_is_whole_and_decode_is_forward(options, gain):
    x, ids = draw(61, heads=(4, 2), gain=gain), documents(27, 34)
    whole, whole_state = resume(x, None, ids, **options)
    random = np.random.default_rng(0)
    # One-token decode, then random orders of a few lengths, which share their compiles.
    splits = [[1] * 61] + [random.permutation([1, 13, 13, 13, 7, 7, 7]) for _ in range(8)]
    for split in splits:
        state, outs, start = fresh(x, options), [], 0
        for length in split:
            piece = part(x, start, start + length)
            out, state = resume(piece, state, ids[:, start : start + length], **options)
            outs.append(out)
            start += length
        assert_rows_close(np.concatenate(outs, axis=1), whole, 2e-5)
        assert_states_close(state, whole_state)


@pytest.mark.parametrize("options", [{"chunk_size": 8}, {"chunk_size": 8, "window": 8, "num_sinks": 2}])
def test_unequal_lengths_in_one_batch_then_decode(options):
    x, lengths, steps = draw(40, heads=(2, 2), batch=4), np.array([3, 8, 17, 24]), 16
    whole = np.asarray(attend(x, **options))
    ids = (np.arange(24) < lengths[:, None]).astype(np.int32)
    prefill = part(x, 0, 24)._replace(k=np.where(ids[:, :, None, None] == 0, np.nan, x.k[:, :24]))
    out, state = resume(prefill, fresh(x, options), ids, **options)
    for row, length in enumerate(lengths):
        assert_rows_close(out[row, :length], whole[row, :length], 2e-5)
    state = jax.device_get(state)
    alone = Inputs(x.q[2:3, :17], x.k[2:3, :17], x.v[2:3, :17], x.w, x.M)
    unpadded = resume(alone, None, ids[2:3, :17], **options)[1]
    assert_states_close(jax.tree.map(lambda leaf: leaf[2:3], state), unpadded)
    places = lengths.copy()
    for step in range(steps):
        real = np.arange(4) != step % 5  # each sequence pauses now and then: a padded token leaves no trace
        token = x._replace(**{name: getattr(x, name)[np.arange(4), places][:, None] for name in "qkv"})
        out, state = resume(token, state, real.astype(np.int32)[:, None], **options)
        assert_rows_close(out[real, 0], whole[np.arange(4), places][real], 2e-5)
        np.testing.assert_array_equal(out[~real], 0)
        places = places + real


@pytest.mark.parametrize("options", [PURE, HYBRID])
def test_gradients_reach_the_past_through_the_state(options):
    @jax.jit
    def run(x, cotangent):
        def suffix(y):
            first, second = part(y, 0, 43), part(y, 43, 80)
            _, state = dark_attention(*first[:3], projections=y.w, geometry=y.M, return_state=True, **options)
            return dark_attention(*second[:3], projections=y.w, geometry=y.M, state=state, **options)

        out, pull = jax.vjp(suffix, x)
        return out, pull(cotangent)[0]

    for data, limit in (({}, 1e-4), ({"squared_norm": 500}, 1e-3)):
        x = draw(80, **data)
        cotangent = draw_cotangent(x)
        cotangent[:, :43] = 0
        out, gradients = run(x, cotangent[:, 43:])
        want, want_gradients = oracle(x, None, cotangent, **options)
        assert_rows_close(out, want[:, 43:], limit)
        assert_gradients_close(gradients, want_gradients, limit)


def test_gradients_of_the_initial_state():
    def definition(z, S, x, c):
        """(z, S) as seen by far keys, and the keys at hand, without any care. One head."""
        log_q, log_k = (log_positive_features(y[0, :, 0], x.w[0], x.M[0], 16**-0.5) for y in (x.q, x.k))
        far, near = log_q + c[None], log_q[:, None] + log_k[None]
        largest = jnp.maximum(far.max(1), near.max((1, 2)))
        far, near = jnp.exp(far - largest[:, None]), jnp.exp(near - largest[:, None, None]).sum(2)
        near = near * np.tri(x.q.shape[1])
        return ((far @ S + near @ x.v[0, :, 0]) / (far @ z + near.sum(1))[:, None])[None, :, None]

    def resumed(x, state, z, S):
        far = state.far._replace(normalizer=z, values=S)
        return dark_attention(*x[:3], projections=x.w, geometry=x.M, state=state._replace(far=far), chunk_size=16)

    @jax.jit
    def run(x, cotangent):
        past, now = part(x, 0, 43), part(x, 43, 80)
        _, state = dark_attention(*past[:3], projections=x.w, geometry=x.M, return_state=True, chunk_size=16)
        out, pull = jax.vjp(lambda z, S: resumed(now, state, z, S), state.far.normalizer, state.far.values)
        return out, pull(cotangent), state

    for data, limit in (({}, 1e-4), ({"squared_norm": 500}, 1e-3)):
        x = draw(80, heads=(1, 1), **data)
        cotangent = draw_cotangent(x)[:, 43:]
        out, gradients, state = run(x, cotangent)
        with jax.enable_x64(True):
            far = [np.asarray(leaf, np.float64)[0, 0] for leaf in state.far[:3]]
            wide = widen(part(x, 43, 80))
            want, pull = jax.vjp(functools.partial(definition, x=wide, c=far[0]), *far[1:])
            want_gradients = jax.tree.map(
                lambda leaf: np.asarray(leaf)[None, None], pull(jnp.asarray(widen(cotangent)))
            )
        assert_rows_close(out, want, limit)
        assert_gradients_close(gradients, want_gradients, limit, names="zS")


@pytest.mark.parametrize("options", [{"chunk_size": 128}, {"chunk_size": 128, "window": 128}])
def test_backward_memory_is_that_of_the_chunk_states(options):
    features, dim, length = 512, 8, 16_384

    x = Inputs(
        *(jax.ShapeDtypeStruct((1, length, 1, dim), jnp.float32),) * 3,
        jax.ShapeDtypeStruct((1, features, dim), jnp.float32),
        jax.ShapeDtypeStruct((1, dim, dim), jnp.float32),
    )
    run = _jitted(dark_attention, True, tuple(options.items()))
    temporary = run.lower(x, None, x.v).compile().memory_analysis().temp_size_in_bytes
    states = 4 * (length // 128) * features * (dim + 2)  # c, z and S between chunks
    chunk = 4 * 128 * features  # the features of one chunk
    tokens = 4 * length * (4 * dim + 4)  # q, k, v, out and a few numbers of each token, cut into chunks
    assert states < temporary < states + 12 * chunk + 3 * tokens
    assert temporary < 4 * length * features / 2  # half of one array of every token's features


X = draw(4, heads=(4, 2))
Q, K, V, W, M = X[:5]
BAD_INPUTS = [
    ({"q": Q[0]}, r"q has shape \(4, 4, 16\); expected \[batch, length, heads, size\]"),
    ({"v": V[0]}, r"v has shape \(4, 2, 8\)"),
    ({"k": K[:, :3]}, r"k \(1, 3, 2, 16\) and v .* do not fit"),
    ({"k": K[..., :8]}, r"k \(1, 4, 2, 8\) and v .* do not fit"),
    ({"v": V[:, :, :1]}, r"v \(1, 4, 1, 8\) do not fit"),
    ({"q": Q[:, :, :3]}, "3 query heads are not a multiple of 2 key/value heads"),
    ({"q": Q[:, :0], "k": K[:, :0], "v": V[:, :0]}, "the sequence is empty"),
    ({"q": Q.astype(jnp.bfloat16)}, "dtypes bfloat16, float32 and float32; they must share one of"),
    ({name: x.astype(np.float16) for name, x in zip("qkv", X[:3], strict=True)}, "float16, .*what float16 holds"),
    ({name: x.astype(np.int32) for name, x in zip("qkv", X[:3], strict=True)}, "dtypes int32, int32 and int32"),
    ({"segment_ids": np.ones((1, 5), np.int32)}, r"segment_ids have shape \(1, 5\); expected \(1, 4\)"),
    ({"chunk_size": 0}, "chunk_size = 0, which must be positive"),
    ({"window": -16}, "window = -16 must be 0 or a multiple of chunk_size = 128"),
    ({"window": 24, "chunk_size": 16}, "window = 24 must be 0 or a multiple of chunk_size = 16"),
    ({"num_sinks": 4}, "num_sinks = 4 with window = 0: sinks need a window"),
    ({"num_sinks": -1}, "num_sinks = -1"),
    ({"window_kernel": "softmax"}, "they need window > 0"),
    ({"log_gain": np.zeros(4, np.float32)}, "they need window > 0"),
    ({"log_gain": np.zeros(2, np.float32), **HYBRID}, r"log_gain has shape \(2,\); expected .* \(4,\)"),
    ({"log_weights": np.zeros((2, 31), np.float32)}, r"log_weights have shape \(2, 31\); expected \(2, 32\)"),
    ({"window_kernel": "exact", **HYBRID}, "window_kernel = 'exact': allowed: dark, softmax"),
    ({"causal": False, **HYBRID}, "causal=False works with features everywhere"),
    ({"causal": False, "return_state": True}, "causal=False works with features everywhere"),
    ({"causal": False, "state": fresh(X, PURE)}, "causal=False works with features everywhere"),
    ({"state": fresh(X, PURE), **HYBRID}, "another window or chunk_size than 16 and 16"),
    ({"state": fresh(X, HYBRID), **PURE}, "another window or chunk_size than 0 and 16"),
    ({"state": fresh(X, HYBRID), **HYBRID, "num_sinks": 1}, "another batch or num_sinks than 1 and 1"),
    ({"state": fresh(draw(4, heads=(4, 2), batch=3), PURE), **PURE}, "another batch or num_sinks than 1 and 0"),
    ({"geometry": M[..., :9]}, r"geometry has shape \(2, 16, 9\); expected \[r, 16\] or \[2, r, 16\]"),
    ({"geometry": np.stack([M[0]] * 3)}, "geometry is for 3 heads; there are 2 key/value heads"),
    ({"geometry": M[0, 0]}, r"geometry has shape \(16,\)"),
    ({"projections": None}, "projections=None leaves only the window to attend to: it needs window > 0"),
    ({"projections": W[..., :9]}, r"projections have shape \(2, 32, 9\); expected \[m, 16\] or \[2, m, 16\]"),
    ({"projections": W[:, :0]}, r"projections have shape \(2, 0, 16\)"),
    ({"projections": W[0, 0]}, r"projections have shape \(16,\)"),
    ({"projections": np.stack([W[0]] * 3)}, "projections are for 3 heads; there are 2 key/value heads"),
    (
        {"state": fresh(X._replace(w=W[:, :8]), PURE), **PURE},
        r"the state was made for .* \(2, 8, 8\); these inputs have \(2, 32, 8\)",
    ),
    (
        {"state": fresh(X._replace(k=K[:, :, :1]), PURE), **PURE},
        r"the state was made for .* \(1, 32, 8\); these inputs have \(2, 32, 8\)",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD_INPUTS)
def test_what_does_not_fit_is_refused(changes, message):
    arguments = {"q": Q, "k": K, "v": V, "projections": W, "geometry": M} | changes
    with pytest.raises(UserError, match=message):
        dark_attention(**arguments)


@pytest.mark.parametrize("options", [PURE, HYBRID])
def test_padding_in_front_of_a_continuation_takes_no_place(options):
    x = draw(60)
    projections = {"projections": x.w, "geometry": x.M, "return_state": True, **options}
    _, state = jax.jit(functools.partial(dark_attention, **projections))(*part(x, 0, 32)[:3])
    rest = part(x, 32, 60)
    whole = attend(x, **options)[:, 32:]
    padded = [np.concatenate([np.full((1, 16, *leaf.shape[2:]), 7, leaf.dtype), leaf], axis=1) for leaf in rest[:3]]
    ids = np.array([[0] * 16 + [1] * 28], np.int32)
    out, after = jax.jit(functools.partial(dark_attention, **projections))(*padded, segment_ids=ids, state=state)
    assert after.document_length.tolist() == [60]
    if options is PURE:
        assert_rows_close(out[:, 16:], whole, 2e-5)
    else:  # chunks are the row's, so other keys are seen exactly; the sinks stay the document's
        assert state.sinks.filled.all()
        np.testing.assert_array_equal(after.sinks.keys, state.sinks.keys)
        np.testing.assert_array_equal(after.sinks.values, state.sinks.values)
