"""What holds for every linear attention in `OPS`: each is compared with its definition in float64, and with itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from darkformer_jax.distributed.sharding import make_mesh
from tests.ops.linear_attentions import (
    DARK,
    FORMS,
    HYBRID,
    OPS,
    PURE,
    Inputs,
    assert_gradients_close,
    assert_like_float64,
    assert_rows_close,
    assert_states_close,
    attend,
    documents,
    draw,
    draw_cotangent,
    fresh,
    map_tokens,
    oracle,
    over_tokens,
    part,
    resume,
    widen,
    with_gradients,
)

every_form = pytest.mark.parametrize(("op", "options"), FORMS)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("length", "shape", "segments", "options"),
    [
        (1, {}, None, PURE),
        (63, {"heads": (4, 2), "batch": 2}, None, PURE),
        (500, {}, (100, 1, 250, 149), {"chunk_size": 128}),
        (500, {}, (100, 1, 250, 149), {"chunk_size": 32, "causal": False}),
        (192, {"dim": 64, "features": 256}, None, {"chunk_size": 64}),
        (1024, {}, None, {"chunk_size": 64}),
    ],
)
def test_outputs_and_gradients_against_float64(op, length, shape, segments, options):
    assert_like_float64(op, length, shape, segments, options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("chunk_size", [1, 7, 63, 256, 1000])
def test_chunk_size_changes_nothing(op, chunk_size):
    x, ids = draw(op, 500, extreme=1.0), documents(63, 400, 37)
    assert_rows_close(attend(op, x, ids, chunk_size=chunk_size), oracle(op, x, ids), 1e-3)


@every_form
def test_bfloat16_inputs(op, options):
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), draw(op, 500, features=64))
    cotangent = jnp.asarray(draw_cotangent(x), jnp.bfloat16)
    out, gradients = with_gradients(op, x, cotangent, **options)
    want, want_gradients = oracle(op, x, None, cotangent, **options)
    assert out.dtype == jnp.bfloat16
    assert np.all(np.linalg.norm(np.asarray(out, np.float32), axis=-1) > 0)
    pairs = zip(jax.tree.leaves((out, gradients)), jax.tree.leaves((want, want_gradients)), strict=True)
    for got, reference in pairs:
        error = np.linalg.norm(np.asarray(got, np.float64) - reference) / np.linalg.norm(reference)
        print(f"bfloat16: {error:.1e}")
        assert error < 2e-2


@every_form
def test_a_small_loss_has_the_gradients_of_a_large_one(op, options):
    """A mean over a million tokens gives each of them little, and float32 has no normal numbers below 1e-38."""
    scale = 2.0**-30
    for data, limit in (({}, 1e-5), ({"extreme": 1.0}, 1e-4)):
        x = draw(op, 80, heads=(2, 2), **data)
        cotangent = draw_cotangent(x)
        _, wanted = with_gradients(op, x, cotangent, **options)
        _, small = with_gradients(op, x, scale * cotangent, **options)
        assert_gradients_close(jax.tree.map(lambda leaf: leaf / scale, small), wanted, limit)


@every_form
def test_later_tokens_change_nothing(op, options):
    x = draw(op, 100, heads=(2, 2), extreme=0.25)
    before = np.asarray(attend(op, x, **options))
    other = draw(op, 100, heads=(2, 2), seed=5)
    other = other._replace(v=1000 * other.v)
    for t in (0, 15, 16, 50, 98):  # in the middle and at the edges of chunks
        later = (np.arange(100) > t)[None]
        changed = map_tokens(lambda leaf, new, later=later: np.where(over_tokens(later, leaf), new, leaf), x, other)
        changed = changed._replace(k=np.where(later[..., None, None], 10 * x.k, x.k))
        after = np.asarray(attend(op, changed, **options))
        error = np.linalg.norm(after - before, axis=-1) / np.linalg.norm(before, axis=-1)
        assert np.max(error[:, : t + 1]) <= 1e-6
        assert np.median(error[:, t + 1 :]) > 1e-2


@pytest.mark.parametrize(("op", "options"), [*FORMS, *((op, PURE | {"causal": False}) for op in OPS)])
def test_packed_is_separate(op, options):
    # With a window the chunks are those of the row: a document equals itself alone where it starts with a chunk.
    lengths = (48, 64, 16, 72) if "window" in options else (37, 64, 1, 98)
    x, ids = draw(op, 200, heads=(2, 2), value_dim=16), documents(*lengths)  # rows of 8 may nearly cancel
    separate, row_ids = [x], [ids[0]]
    for document in range(1, 5):  # one batch of documents, each moved to the front of its row
        order = np.argsort(ids[0] != document, kind="stable")
        separate.append(map_tokens(lambda leaf, order=order: leaf[:, order], x))
        row_ids.append((np.arange(200) < lengths[document - 1]).astype(np.int32))
    rows = map_tokens(lambda *leaves: np.concatenate(leaves), *separate)
    packed, *alone = np.asarray(attend(op, rows, np.stack(row_ids), **options))
    joined = np.concatenate([out[:n] for out, n in zip(alone, lengths, strict=True)])
    assert_rows_close(packed, joined, 1e-5)


def pad(x, before, after):
    """The tokens with NaN around them, and their segment ids."""
    widths = [(0, 0), (before, after), (0, 0), (0, 0)]
    padded = map_tokens(lambda leaf: np.pad(leaf, widths[: leaf.ndim], constant_values=np.nan), x)
    ids = np.pad(np.ones(x.q.shape[:2], np.int32), widths[:2])
    return padded, ids


@pytest.mark.parametrize(("op", "options"), [*FORMS, *((op, PURE | {"causal": False}) for op in OPS)])
def test_padding_with_nan_is_no_padding(op, options):
    before = 16 if "window" in options else 9
    x = draw(op, 53, heads=(2, 2))
    cotangent = draw_cotangent(x)
    padded, ids = pad(x, before, 27)
    inside = slice(before, before + 53)
    padded_cotangent = np.pad(cotangent, [(0, 0), (before, 27), (0, 0), (0, 0)], constant_values=1)
    out, gradients = with_gradients(op, padded, padded_cotangent, ids, **options)
    want, want_gradients = with_gradients(op, x, cotangent, **options)
    assert_rows_close(out[:, inside], want, 1e-5)
    outside = np.delete(out, np.arange(before, before + 53), axis=1)
    np.testing.assert_array_equal(outside, 0)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))
    gradients = map_tokens(lambda leaf: leaf[:, inside], gradients)
    # The gradient of a head's decay sums over all pairs of tokens, with much cancellation.
    of_heads = {"log_decay"} if OPS[op].decay == "head" else set()
    for names, limit in ((want_gradients.arrays.keys() - of_heads, 1e-5), (of_heads, 1e-4)):
        got, want = (g._replace(arrays={name: g.arrays[name] for name in names}) for g in (gradients, want_gradients))
        assert_gradients_close(got, want, limit)


SMALL_CHUNKS = {"chunk_size": 8, "window": 16, "num_sinks": 3}


@pytest.mark.parametrize(
    ("op", "options", "gain"),
    [
        *((op, {"chunk_size": 8}, False) for op in OPS),
        *((op, SMALL_CHUNKS, False) for op in DARK),
        ("dark", SMALL_CHUNKS | {"window_kernel": "softmax"}, True),
    ],
)
def test_split_and_resume_is_whole_and_decode_is_forward(op, options, gain):
    x, ids = draw(op, 61, heads=(4, 2), gain=gain), documents(27, 34)
    whole, whole_state = resume(op, x, None, ids, **options)
    random = np.random.default_rng(0)
    # One-token decode, then random orders of a few lengths, which share their compiles.
    splits = [[1] * 61] + [random.permutation([1, 13, 13, 13, 7, 7, 7]) for _ in range(8)]
    for split in splits:
        state, outs, start = fresh(op, x, options), [], 0
        for length in split:
            piece = part(x, start, start + length)
            out, state = resume(op, piece, state, ids[:, start : start + length], **options)
            outs.append(out)
            start += length
        assert_rows_close(np.concatenate(outs, axis=1), whole, 2e-5)
        assert_states_close(state, whole_state)


@pytest.mark.parametrize(
    ("op", "options"),
    [*((op, {"chunk_size": 8}) for op in OPS), *((op, {"chunk_size": 8, "window": 8, "num_sinks": 2}) for op in DARK)],
)
def test_unequal_lengths_in_one_batch_then_decode(op, options):
    x, lengths, steps = draw(op, 40, heads=(2, 2), batch=4), np.array([3, 8, 17, 24]), 16
    whole = np.asarray(attend(op, x, **options))
    ids = (np.arange(24) < lengths[:, None]).astype(np.int32)
    prefill = part(x, 0, 24)._replace(k=np.where(ids[:, :, None, None] == 0, np.nan, x.k[:, :24]))
    out, state = resume(op, prefill, fresh(op, x, options), ids, **options)
    for row, length in enumerate(lengths):
        assert_rows_close(out[row, :length], whole[row, :length], 2e-5)
    state = jax.device_get(state)
    alone = map_tokens(lambda leaf: leaf[2:3, :17], x)
    unpadded = resume(op, alone, None, ids[2:3, :17], **options)[1]
    assert_states_close(jax.tree.map(lambda leaf: leaf[2:3], state), unpadded)
    places = lengths.copy()
    for step in range(steps):
        real = np.arange(4) != step % 5  # each sequence pauses now and then: a padded token leaves no trace
        token = map_tokens(lambda leaf, places=places: leaf[np.arange(4), places][:, None], x)
        out, state = resume(op, token, state, real.astype(np.int32)[:, None], **options)
        assert_rows_close(out[real, 0], whole[np.arange(4), places][real], 2e-5)
        np.testing.assert_array_equal(out[~real], 0)
        places = places + real


@every_form
def test_gradients_reach_the_past_through_the_state(op, options):
    attention = functools.partial(OPS[op].attention, **options)

    @jax.jit
    def run(x, cotangent):
        def suffix(y):
            first, second = part(y, 0, 43), part(y, 43, 80)
            _, state = attention(*first[:3], **first.arrays, return_state=True)
            return attention(*second[:3], **second.arrays, state=state)

        out, pull = jax.vjp(suffix, x)
        return out, pull(cotangent)[0]

    for data, limit in (({}, 1e-4), ({"extreme": 1.0}, 1e-3)):
        x = draw(op, 80, **data)
        cotangent = draw_cotangent(x)
        cotangent[:, :43] = 0
        out, gradients = run(x, cotangent[:, 43:])
        want, want_gradients = oracle(op, x, None, cotangent, **options)
        assert_rows_close(out, want[:, 43:], limit)
        assert_gradients_close(gradients, want_gradients, limit)


@pytest.mark.parametrize(
    ("op", "options"),
    [*((op, {"chunk_size": 4}) for op in OPS), *((op, {"chunk_size": 4, "window": 4, "num_sinks": 2}) for op in DARK)],
)
def test_gradients_of_one_token_steps_against_float64(op, options):
    attention = functools.partial(OPS[op].attention, **options, return_state=True)

    @jax.jit
    def run(x, cotangent, state):
        def decode(y):
            def step(state, place):
                token = map_tokens(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, place, 1, axis=1), y)
                out, state = attention(*token[:3], **token.arrays, state=state)
                return state, out[:, 0]

            _, out = jax.lax.scan(step, state, jnp.arange(21))
            return jnp.moveaxis(out, 0, 1)

        out, pull = jax.vjp(decode, x)
        return out, pull(cotangent)[0]

    for data, limit in (({}, 1e-4), ({"extreme": 1.0}, 1e-3)):
        x = draw(op, 21, heads=(4, 2), **data)
        cotangent = draw_cotangent(x)
        out, gradients = run(x, cotangent, fresh(op, x, options))
        want, want_gradients = oracle(op, x, None, cotangent, **options)
        assert_rows_close(out, want, limit)
        assert_gradients_close(gradients, want_gradients, limit)


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_the_initial_state(op):
    def definition(z, S, x, c):
        """(z, S) as seen by far keys, and the keys at hand, without any care. One head."""
        arrays = jax.tree.map(lambda leaf: leaf[0], x.arrays)
        log_q, log_k = (OPS[op].log_features(y[0, :, 0], arrays) for y in (x.q, x.k))
        elapsed = jnp.cumsum(jnp.broadcast_to(arrays.get("log_decay", jnp.zeros(1)).reshape(-1), x.q.shape[1]))
        far, near = log_q + c[None] + elapsed[:, None], log_q[:, None] + log_k[None]
        near = near + (elapsed[:, None] - elapsed[None])[..., None]
        near = jnp.where(np.tri(x.q.shape[1], dtype=bool)[..., None], near, -jnp.inf)
        largest = jnp.maximum(far.max(1), near.max((1, 2)))
        far, near = jnp.exp(far - largest[:, None]), jnp.exp(near - largest[:, None, None]).sum(2)
        return ((far @ S + near @ x.v[0, :, 0]) / (far @ z + near.sum(1))[:, None])[None, :, None]

    def resumed(x, state, z, S):
        far = state.far._replace(normalizer=z, values=S)
        return OPS[op].attention(*x[:3], **x.arrays, state=state._replace(far=far), **PURE)

    @jax.jit
    def run(x, cotangent):
        past, now = part(x, 0, 43), part(x, 43, 80)
        _, state = OPS[op].attention(*past[:3], **past.arrays, return_state=True, **PURE)
        out, pull = jax.vjp(lambda z, S: resumed(now, state, z, S), state.far.normalizer, state.far.values)
        return out, pull(cotangent), state

    for data, limit in (({}, 1e-4), ({"extreme": 1.0}, 1e-3)):
        x = draw(op, 80, heads=(1, 1), **data)
        cotangent = draw_cotangent(x)[:, 43:]
        out, gradients, state = run(x, cotangent)
        with jax.enable_x64(True):
            far = [np.asarray(leaf, np.float64)[0, 0] for leaf in state.far[:3]]
            wide = jax.tree.map(jnp.asarray, widen(part(x, 43, 80)))
            want, pull = jax.vjp(functools.partial(definition, x=wide, c=far[0]), *far[1:])
            want_gradients = jax.tree.map(
                lambda leaf: np.asarray(leaf)[None, None], pull(jnp.asarray(widen(cotangent)))
            )
        assert_rows_close(out, want, limit)
        assert_gradients_close(gradients, want_gradients, limit)


@every_form
def test_padding_in_front_of_a_continuation_takes_no_place(op, options):
    x = draw(op, 60)
    _, state = resume(op, part(x, 0, 32), None, None, **options)
    rest = part(x, 32, 60)
    whole = attend(op, x, **options)[:, 32:]
    padded = map_tokens(
        lambda leaf: np.concatenate([np.full((1, 16, *leaf.shape[2:]), -7, leaf.dtype), leaf], axis=1), rest
    )
    ids = np.array([[0] * 16 + [1] * 28], np.int32)
    out, after = resume(op, padded, state, ids, **options)
    assert after.document_length.tolist() == [60]
    if "window" in options:  # chunks are the row's, so other keys are seen exactly; the sinks stay the document's
        assert state.sinks.filled.all()
        np.testing.assert_array_equal(after.sinks.keys, state.sinks.keys)
        np.testing.assert_array_equal(after.sinks.values, state.sinks.values)
    else:
        assert_rows_close(out[:, 16:], whole, 2e-5)


def without_heads(x):
    """Without query, key and value heads."""
    last = {"log_decay": lambda leaf: leaf[..., :0]}
    arrays = {name: last.get(name, lambda leaf: leaf[:0])(leaf) for name, leaf in x.arrays.items()}
    return Inputs(*(leaf[:, :, :0] for leaf in x[:3]), arrays)


MORE_FORMS = [("dark with gates", PURE | {"causal": False})]
MORE_FORMS += [("dark with gates", form | {"backend": "parallel"}) for form in (PURE, HYBRID)]
EMPTY = {
    "sequences": lambda x: map_tokens(lambda leaf: leaf[:0], x),
    "tokens": lambda x: part(x, 0, 0),
    "query heads": lambda x: x._replace(q=x.q[:, :, :0]),
    "heads": without_heads,
}


@pytest.mark.parametrize("none", EMPTY)
@pytest.mark.parametrize(("op", "options"), [*FORMS, *MORE_FORMS])
def test_without_sequences_tokens_or_heads_the_output_is_empty_as_that_of_jax(op, options, none):
    x = EMPTY[none](draw(op, 40, heads=(4, 2), value_dim=16, batch=2, gain="window" in options and none == "tokens"))
    out, gradients = with_gradients(op, x, draw_cotangent(x), **options)
    if none == "heads":  # of which JAX cannot say how many share one of the keys'
        assert out.shape == x.q.shape
    else:
        assert out.shape == jax.nn.dot_product_attention(*map(jnp.asarray, x[:3])).shape
    assert out.dtype == jnp.float32 and out.size == 0
    for gradient, leaf in zip(jax.tree.leaves(gradients), jax.tree.leaves(x), strict=True):
        np.testing.assert_array_equal(gradient, np.zeros_like(leaf))


@every_form
def test_a_call_without_tokens_or_query_heads_leaves_the_state_as_it_should_be(op, options):
    x = draw(op, 40, heads=(4, 2))
    _, before = resume(op, part(x, 0, 20), None, None, **options)
    _, same = resume(op, part(x, 0, 0), before, np.ones((1, 0), np.int32), **options)
    jax.tree.map(np.testing.assert_array_equal, same, before)
    rest = part(x, 20, 40)
    _, after = resume(op, rest, same, None, **options)
    _, without_queries = resume(op, EMPTY["query heads"](rest), same, None, **options)
    assert_states_close(without_queries, after)


@every_form
def test_no_sequences_can_be_split_over_devices(op, options):
    x = jax.tree.map(jnp.asarray, EMPTY["sequences"](draw(op, 32, heads=(4, 2))))
    attention = functools.partial(OPS[op].attention, **x.arrays, **options, sequence_axis="context")
    tokens, mesh = P(None, "context"), make_mesh({"context": 1}, jax.devices()[:1])
    split = jax.shard_map(attention, mesh=mesh, in_specs=(tokens,) * 3, out_specs=tokens, axis_names={"context"})
    assert jax.jit(split)(*x[:3]).shape == (0, 32, 4, 8)
