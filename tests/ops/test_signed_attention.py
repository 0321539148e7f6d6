"""Signed linear attention with a decay, against every pair of tokens in float64, and against itself."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.errors import UserError
from darkformer_jax.ops.oracle import signed_attention_oracle
from darkformer_jax.ops.signed_attention import init_signed_state, signed_attention

LONG = 65_536


def draw(length, heads=(1, 1, 2), batch=1, dim=8, value_dim=5, seed=0):
    """(q, k, v, log_decay): heads with long, short and endless memory; now and then a token forgets everything."""
    random = np.random.default_rng(seed)
    sizes = zip(heads, (dim, dim, value_dim), strict=True)
    q, k, v = (random.standard_normal((batch, length, count, size)) for count, size in sizes)
    decays = np.resize([0.02, 1.0, 0.0], heads[2]) * random.exponential(size=(batch, length, heads[2]))
    decays[random.random(decays.shape) < 0.02] = 50
    return tuple(x.astype(np.float32) for x in (q, k, v, -decays))


@functools.cache
def jitted(attention, chunk_size):
    options = {} if chunk_size is None else {"chunk_size": chunk_size}

    def run(inputs, segment_ids, state=None):
        more = {} if state is None else {"state": state}
        return attention(*inputs, segment_ids=segment_ids, **options, **more)

    return jax.jit(run)


def attend(inputs, segment_ids=None, state=None, chunk_size=16):
    return jitted(signed_attention, chunk_size)(inputs, segment_ids, state)


@functools.cache
def pulled(attention, chunk_size):
    run = jitted(attention, chunk_size)

    def with_gradients(inputs, segment_ids, cotangent):
        first = lambda inputs: jax.tree.leaves(run(inputs, segment_ids))[0]
        out, pull = jax.vjp(first, inputs)
        return out, *pull(cotangent)[0]

    return jax.jit(with_gradients)


def oracle(inputs, segment_ids, cotangent):
    with jax.enable_x64(True):
        wide = tuple(np.asarray(x, np.float64) for x in (*inputs, cotangent))
        return jax.tree.map(np.asarray, pulled(signed_attention_oracle, None)(wide[:4], segment_ids, wide[4]))


def assert_close(got, want, limit=1e-5):
    """Errors relative to the largest entry."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    error = np.max(np.abs(got - want)) / np.max(np.abs(want))
    print(f"{error:.1e}")
    assert np.all(np.isfinite(got)) and error <= limit


def documents(*lengths):
    return np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)[None]


def cotangent_of(inputs, seed=1):
    shape = (*inputs[0].shape[:2], max(inputs[0].shape[2], inputs[2].shape[2]), inputs[2].shape[3])
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("heads", "length", "chunk_size", "segments"),
    [
        ((2, 2, 2), 1, 16, None),
        ((4, 2, 2), 63, 16, None),
        ((1, 1, 4), 100, 7, (37, 1, 62)),
        ((2, 2, 6), 201, 64, (100, 1, 90, 10)),
        ((4, 2, 2), 50, 1, (20, 30)),
    ],
)
def test_outputs_and_every_gradient_against_float64(heads, length, chunk_size, segments):
    inputs = draw(length, heads, batch=2)
    ids = None if segments is None else np.tile(documents(*segments), (2, 1))
    cotangent = cotangent_of(inputs)
    got = pulled(signed_attention, chunk_size)(inputs, ids, cotangent)
    for ours, reference in zip(got, oracle(inputs, ids, cotangent), strict=True):
        if length > 1 or np.any(reference):  # a single token has no decay before it
            assert_close(ours, reference, 1e-4)


def test_the_oracle_is_the_recurrence():
    q, k, v, decays = (np.asarray(x[0], np.float64) for x in draw(40, (4, 2, 2)))
    S, want = np.zeros((2, 8, 5)), np.empty((1, 40, 4, 5))
    for n in range(40):
        S = np.exp(decays[n])[:, None, None] * S + k[n][:, :, None] * v[n][:, None, :]
        want[0, n] = np.einsum("hd,hde->he", q[n], S.repeat(2, axis=0))
    got = oracle(draw(40, (4, 2, 2)), None, np.zeros((1, 40, 4, 5)))[0]
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def test_one_decay_per_head_is_that_of_every_token():
    q, k, v, _ = draw(50)
    slopes = -np.array([0.1, 2.0], np.float32)
    every = np.tile(slopes, (1, 50, 1))
    np.testing.assert_array_equal(attend((q, k, v, slopes))[0], attend((q, k, v, every))[0])


def test_later_tokens_change_nothing():
    inputs = draw(100)
    before = np.asarray(attend(inputs)[0])
    for t in (0, 15, 16, 50, 98):
        later = (np.arange(100) > t)[None, :, None]
        changed = [np.where(later[..., None], -10 * x, x) for x in inputs[:3]]
        after = np.asarray(attend((*changed, np.where(later, -3.0, inputs[3]).astype(np.float32)))[0])
        np.testing.assert_allclose(after[:, : t + 1], before[:, : t + 1], atol=1e-6 * np.abs(before).max())
        assert np.abs(after[:, t + 1 :] - before[:, t + 1 :]).max() > 1


def test_packed_is_separate_and_padding_leaves_no_trace():
    lengths = (37, 64, 1, 98)
    inputs, ids = draw(200), documents(*lengths)
    spaced = np.insert(ids, np.repeat((37, 101), 5), 0, axis=1)  # padding between documents, and it holds NaN
    with_nan = tuple(np.insert(x, np.repeat((37, 101), 5), np.nan, axis=1) for x in inputs)
    cotangent = np.insert(cotangent_of(inputs), np.repeat((37, 101), 5), 1, axis=1)
    out, *gradients = pulled(signed_attention, 16)(with_nan, spaced, cotangent)
    real = spaced[0] != 0
    np.testing.assert_array_equal(out[:, ~real], 0)
    for got, want in zip(
        (out, *gradients), pulled(signed_attention, 16)(inputs, ids, cotangent_of(inputs)), strict=True
    ):
        assert_close(got[:, real], want)
        assert np.all(np.isfinite(got))
    start = 0
    for length in lengths:
        alone = tuple(x[:, start : start + length] for x in inputs)
        assert_close(out[:, real][:, start : start + length], attend(alone)[0])
        start += length


@pytest.mark.parametrize("heads", [(4, 2, 2), (2, 2, 6)])
def test_resumed_is_unbroken_by_pieces_and_by_tokens(heads):
    inputs = draw(90, heads)
    whole, last = attend(inputs)
    state, pieces = init_signed_state(1, heads[2], 8, 5, jnp.float32), []
    cuts = [0, 20, 53, *range(54, 91)]  # then one token at a time
    for start, stop in itertools.pairwise(cuts):
        out, state = attend(tuple(x[:, start:stop] for x in inputs), None, state)
        pieces.append(out)
    assert_close(np.concatenate(pieces, axis=1), whole)
    assert_close(state.values, last.values)
    assert state.segment == last.segment == 1


def test_a_state_is_read_by_its_own_segment_alone():
    inputs, ids = draw(60), documents(20, 40)
    whole, _ = attend(inputs, ids)
    _, state = attend(tuple(x[:, :30] for x in inputs), ids[:, :30])
    _, same = attend(tuple(x[:, :1] for x in inputs), np.zeros((1, 1), np.int32), state)
    assert_close(same.values, state.values)
    assert same.segment == 2
    out, _ = attend(tuple(x[:, 30:] for x in inputs), ids[:, 30:], same)
    assert_close(out, whole[:, 30:])
    other, _ = attend(tuple(x[:, 30:] for x in inputs), 0 * ids[:, 30:] + 3, same)
    assert_close(other, attend(tuple(x[:, 30:] for x in inputs))[0])


@pytest.mark.parametrize("strong", [-50.0, -1e4, -np.inf])
def test_a_decay_that_forgets_at_once_gives_no_nan(strong):
    q, k, v, _ = draw(100)
    decays = np.full((1, 100, 2), strong, np.float32)
    got = pulled(signed_attention, 16)((q, k, v, decays), None, cotangent_of((q, k, v)))
    assert all(np.all(np.isfinite(x)) for x in got)
    alone = np.einsum("bnhd,bnhd->bnh", q, k)[..., None] * v
    assert_close(got[0], alone)


def test_bfloat16_inputs_keep_a_float32_state():
    inputs = draw(200)
    narrow = (*(jnp.asarray(x, jnp.bfloat16) for x in inputs[:3]), inputs[3])
    out, state = attend(narrow)
    assert out.dtype == jnp.bfloat16 and state.values.dtype == jnp.float32
    rounded = (*(np.asarray(x, np.float32) for x in narrow[:3]), inputs[3])
    want = np.asarray(attend(rounded)[0], np.float64)
    assert np.linalg.norm(np.asarray(out, np.float64) - want) < 1e-2 * np.linalg.norm(want)


def test_a_long_sequence_keeps_its_precision():
    slopes = -np.array([1e-5, 3e-3], np.float32)
    q, k, v, _ = draw(LONG, dim=4, value_dim=3)
    out, state = attend((q, k, v, slopes), chunk_size=128)
    decay = np.exp(slopes.astype(np.float64))[:, None, None]
    S, want = np.zeros((2, 4, 3)), np.empty((LONG, 2, 3))
    for n in range(LONG):
        S = decay * S + k[0, n, :, :, None].astype(np.float64) * v[0, n, :, None, :]
        want[n] = np.einsum("d,hde->he", q[0, n, 0].astype(np.float64), S)
    for head in range(2):
        assert_close(out[0, -1000:, head], want[-1000:, head], 1e-4)
        assert_close(state.values[0, head], S[head], 1e-4)


def test_nothing_gives_nothing():
    out, state = attend(tuple(x[:, :0] for x in draw(4)))
    assert out.shape == (1, 0, 2, 5) and not np.any(state.values)


Q, K, V, DECAYS = draw(4, (2, 2, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": Q[0]}, "q has shape .*; expected"),
        ({"k": K[:, :3]}, "do not fit"),
        ({"q": np.tile(Q, (1, 1, 3, 1))}, "q, k and v have 6, 2 and 4 heads: .* and one of them equal to it"),
        ({"v": V[:, :, :3]}, "q, k and v have 2, 2 and 3 heads: Hq and Hv must be multiples of Hk"),
        ({"v": V.astype(np.float16)}, "dtypes float32, float32 and float16"),
        ({"log_decay": DECAYS[:, :3]}, "log_decay has shape"),
        ({"log_decay": -DECAYS}, "log_decay has .*; allowed: at most 0"),
        ({"segment_ids": np.ones((1, 3), np.int32)}, "segment_ids have shape"),
        ({"chunk_size": 0}, "chunk_size = 0 must be positive"),
        ({"state": init_signed_state(1, 4, 8, 3, jnp.float32)}, r"the state was made for .* \(1, 4, 8, 3\); these"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message, unchecked_types):
    arguments = {"q": Q, "k": K, "v": V, "log_decay": DECAYS} | changes
    arrays = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    with pytest.raises(UserError, match=message):
        signed_attention(**arrays)
