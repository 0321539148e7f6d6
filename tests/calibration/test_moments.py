"""Moments in one pass over batches are those of all tokens at once."""

import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.calibration.moments import Moments
from darkformer_jax.errors import UserError

HEADS, KV_HEADS, DIM = 6, 2, 5


def tokens(batch=4, length=50, seed=0, offset=3.0):
    random = np.random.default_rng(seed)
    mix = random.standard_normal((DIM, DIM))
    q = random.standard_normal((batch, length, HEADS, DIM)) @ mix + offset
    k = random.standard_normal((batch, length, KV_HEADS, DIM)) - offset
    return q.astype(np.float32), k.astype(np.float32)


def assert_close(found, wanted, rtol=1e-12):
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-12)


def test_the_queries_of_a_group_are_pooled():
    q, k = tokens()
    moments = Moments.of(jnp.asarray(q), jnp.asarray(k))
    assert moments.tokens == 200
    for head in range(KV_HEADS):
        queries = q[:, :, 3 * head : 3 * head + 3].reshape(-1, DIM).astype(np.float64)
        keys = k[:, :, head].reshape(-1, DIM).astype(np.float64)
        np.testing.assert_allclose(moments.mean_q[head], np.mean(queries, axis=0))
        np.testing.assert_allclose(moments.mean_k[head], np.mean(keys, axis=0))
        np.testing.assert_allclose(moments.second_k[head], keys.T @ keys / 200)
        np.testing.assert_allclose(moments.covariance_q[head], np.cov(queries.T, bias=True))
        np.testing.assert_allclose(moments.covariance_k[head], np.cov(keys.T, bias=True))
        both = (queries.T @ queries / 600 + keys.T @ keys / 200) / 2
        np.testing.assert_allclose(moments.pooled_second[head], both)


def test_merged_batches_are_all_tokens_at_once():
    q, k = tokens(batch=6)
    whole = Moments.of(q, k)
    parts = [Moments.of(q[part], k[part]) for part in (slice(0, 1), slice(1, 4), slice(4, 6))]
    none = Moments.of(q[:0], k[:0])
    assert_close(none.merge(parts[0]).merge(parts[1]).merge(parts[2]), whole)
    assert_close(parts[2].merge(parts[1].merge(parts[0])).merge(none), whole)
    assert_close(none.merge(none), none)
    stacked = [Moments.stack([part, Moments.of(-q[:2], k[:2])]) for part in parts]
    merged = stacked[0].merge(stacked[1]).merge(stacked[2])
    assert_close(merged, Moments.stack([whole, Moments.of(-q[:2], k[:2])._replace(tokens=np.asarray(300))]))


def test_masked_tokens_are_as_if_they_were_not_there():
    q, k = tokens()
    mask = np.random.default_rng(1).random(q.shape[:2]) < 0.7
    padded_q, padded_k = q.copy(), k.copy()
    padded_q[~mask], padded_k[~mask] = np.nan, 1e30
    found = Moments.of(jnp.asarray(padded_q), jnp.asarray(padded_k), jnp.asarray(mask))
    assert found.tokens == np.sum(mask)
    assert_close(found, Moments.of(q[mask][None], k[mask][None]))


def test_a_small_spread_beside_a_large_mean_survives():
    # In float32 sums the covariance would be rounding: 1e-4 of variance beside a square of 1e4.
    random = np.random.default_rng(0)
    k = (100 + 0.01 * random.standard_normal((1, 20_000, 1, 3))).astype(np.float32)
    moments = Moments.of(k[:, :10_000], k[:, :10_000]).merge(Moments.of(k[:, 10_000:], k[:, 10_000:]))
    wanted = np.cov(k.reshape(-1, 3).astype(np.float64).T, bias=True)
    np.testing.assert_allclose(moments.covariance_k[0], wanted, atol=1e-4 * wanted[0, 0])
    narrow = k.reshape(-1, 3)
    in_float32 = narrow.T @ narrow / np.float32(20_000) - np.outer(*[np.mean(narrow, axis=0)] * 2)
    assert np.max(np.abs(in_float32 - wanted)) > wanted[0, 0]


def test_bfloat16_is_read_as_it_is():
    q, k = (jnp.asarray(x, jnp.bfloat16) for x in tokens())
    assert_close(Moments.of(q, k), Moments.of(q.astype(jnp.float32), k.astype(jnp.float32)))


def test_transformed_moments_are_those_of_the_transformed_tokens():
    q, k = (x.astype(np.float64) for x in tokens())
    random = np.random.default_rng(2)
    linear_q, linear_k = random.standard_normal((2, KV_HEADS, 4, DIM))
    shift_q, shift_k = random.standard_normal((2, KV_HEADS, DIM))
    grouped = (q.reshape(4, 50, KV_HEADS, 3, DIM) - shift_q[:, None]).astype(np.float64)
    new_q = np.einsum("hrd,bnhgd->bnhgr", linear_q, grouped).reshape(4, 50, HEADS, 4)
    new_k = np.einsum("hrd,bnhd->bnhr", linear_k, k - shift_k)
    moments = Moments.of(q, k)
    assert_close(moments.transformed(linear_q, linear_k, shift_q, shift_k), Moments.of(new_q, new_k), rtol=1e-9)
    geometry = np.stack([2 * np.eye(DIM), np.eye(DIM)])
    scaled = moments.in_coordinates(geometry, 0.25)
    assert_close(scaled, Moments.of(q * np.repeat([1, 0.5], 3)[:, None], k * np.array([1, 0.5])[:, None]), rtol=1e-9)
    assert_close(moments.in_coordinates(None, 1.0), moments, rtol=1e-9)


def test_saved_moments_load_as_they_were(tmp_path):
    moments = Moments.stack([Moments.of(*tokens()), Moments.of(*tokens(seed=1))])
    moments.save(tmp_path / "moments.npz")
    loaded = Moments.load(tmp_path / "moments.npz")
    for one, other in zip(loaded, moments, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_files_that_hold_no_moments_are_named(tmp_path):
    text, other, torn = (tmp_path / name for name in ("text.npz", "other.npz", "torn.npz"))
    text.write_text("no moments")
    np.savez(other, tokens=1)
    Moments.of(*tokens()).save(torn)
    torn.write_bytes(torn.read_bytes()[:-100])
    single = tmp_path / "single.npy"
    np.save(single, np.ones(3))
    for path in (text, other, torn, single, tmp_path / "missing.npz"):
        with pytest.raises(UserError, match=f"^{path} holds no moments"):
            Moments.load(path)


def test_too_few_tokens_for_full_rank_are_named():
    q, k = tokens(batch=1, length=6)
    Moments.of(q, k).require_full_rank()
    few = Moments.of(q[:, :5], k[:, :5])
    with pytest.raises(UserError, match=r"^layer 3: moments of 5 tokens; .* in 5 dimensions need at least 6"):
        few.require_full_rank("layer 3")
    with pytest.raises(UserError, match=r"^layer 1: moments of 5 tokens"):
        Moments.stack([Moments.of(q, k), few]).require_full_rank()
    with pytest.raises(UserError, match=r"^moments of 5 tokens"):
        few.require_full_rank()


def test_mistakes_are_named():
    q, k = tokens()
    with pytest.raises(UserError, match="do not fit"):
        Moments.of(q[:, :, :5], k)
    with pytest.raises(UserError, match="do not fit"):
        Moments.of(q, k[:, 1:])
    with pytest.raises(UserError, match=r"mask has shape \(4, 1\); expected \(4, 50\)"):
        Moments.of(q, k, np.ones((4, 1), bool))
    k[0, 3, 1, 2] = np.inf
    with pytest.raises(UserError, match="k of kv head 1: 1 of 1000 values are not finite"):
        Moments.of(q, k)
    with pytest.raises(UserError, match="do not merge"):
        Moments.of(q, q).merge(Moments.of(q, tokens()[1]))
