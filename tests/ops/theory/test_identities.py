"""The identities leave the kernel as it is, and its features vary less."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax import draw_projections
from darkformer_jax.calibration.moments import Moments
from darkformer_jax.errors import UserError
from darkformer_jax.ops.features import log_positive_features
from darkformer_jax.ops.theory.identities import apply_identity, balance, centring
from tests.anisotropic import DIM, HEADS, KV_HEADS, MOMENTS, SCALE, K, Q, tokens


def balanced(moments, **options):
    return balance(moments.mean_q, moments.mean_k, moments.covariance_q, moments.covariance_k, **options)


def rewritten(moments, identity):
    """The moments of B1 (q - mu_q) and B2 (k - mu_k)."""
    mu_q, mu_k, b1, b2 = identity
    return moments.transformed(b1, b2, mu_q, mu_k)


def logits(q, k):
    """[b, hkv, g, n, n] of q and k as they are."""
    grouped = q.reshape(*q.shape[:2], KV_HEADS, HEADS // KV_HEADS, DIM)
    return np.einsum("bnhgd,bmhd->bhgnm", np.asarray(grouped, np.float64), np.asarray(k, np.float64))


def rewritten_logits(found):
    query_bias = np.asarray(found.query_bias, np.float64).reshape(3, 40, KV_HEADS, HEADS // KV_HEADS)
    key_bias = np.asarray(found.key_bias, np.float64)
    return (
        SCALE * logits(found.q, found.k)
        + np.moveaxis(query_bias, 1, 3)[..., None]
        + np.moveaxis(key_bias, 1, 2)[:, :, None, None, :]
    )


IDENTITIES = {
    "centring": centring(MOMENTS.mean_q, MOMENTS.mean_k),
    "balance": balanced(MOMENTS),
    "shrunk": balanced(MOMENTS, shrinkage=0.3),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities_leave_the_kernel_as_it_is(name):
    kernel = np.exp(SCALE * logits(Q, K))
    with jax.enable_x64(True):
        found = apply_identity(IDENTITIES[name], jnp.asarray(Q), jnp.asarray(K), SCALE)
    np.testing.assert_allclose(np.exp(rewritten_logits(found)), kernel, rtol=1e-10)
    q, k = (jnp.asarray(x, jnp.float32) for x in (Q, K))
    found = apply_identity(IDENTITIES[name], q, k, SCALE)
    assert {leaf.dtype for leaf in found} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(np.exp(rewritten_logits(found)), np.exp(SCALE * logits(q, k)), rtol=1e-5)


def test_identities_of_other_statistics_are_exact_too():
    # The constants may come from another text: they need to fit no data to be exact.
    other = balanced(Moments.of(*tokens(5)))
    with jax.enable_x64(True):
        found = apply_identity(other, jnp.asarray(Q), jnp.asarray(K), SCALE)
    np.testing.assert_allclose(rewritten_logits(found), SCALE * logits(Q, K), atol=1e-9)


def test_bfloat16_stays_bfloat16_and_its_biases_do_not():
    q, k = (jnp.asarray(x, jnp.bfloat16) for x in (Q, K))
    found = apply_identity(IDENTITIES["balance"], q, k, SCALE)
    assert [leaf.dtype for leaf in found] == [jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32]
    wide = apply_identity(IDENTITIES["balance"], q.astype(jnp.float32), k.astype(jnp.float32), SCALE)
    np.testing.assert_array_equal(found.key_bias, wide.key_bias)
    np.testing.assert_array_equal(found.q, wide.q.astype(jnp.bfloat16))


def test_balance_gives_both_sides_the_same_diagonal_moments():
    with jax.enable_x64(True):
        found = apply_identity(IDENTITIES["balance"], jnp.asarray(Q), jnp.asarray(K), SCALE)
        moments = Moments.of(found.q, found.k)
    for one, other in zip(rewritten(MOMENTS, IDENTITIES["balance"]), moments, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)
    np.testing.assert_allclose(moments.mean_q, 0, atol=1e-12)
    np.testing.assert_allclose(moments.mean_k, 0, atol=1e-12)
    np.testing.assert_allclose(moments.second_q, moments.second_k, atol=1e-9)
    diagonal = np.diagonal(moments.second_q, axis1=1, axis2=2)
    np.testing.assert_allclose(moments.second_q, diagonal[:, None, :] * np.eye(DIM), atol=1e-9)


def test_features_of_the_rewritten_pair_estimate_the_same_kernel():
    projections = draw_projections(jax.random.key(0), 20_000, DIM, "iid")

    def estimates(found):
        log_q = log_positive_features(found.q[0, 0, 0], projections, scale=SCALE) + found.query_bias[0, 0, 0]
        log_k = log_positive_features(found.k[0, 1, 0], projections, scale=SCALE) + found.key_bias[0, 1, 0]
        return np.exp(np.asarray(log_q + log_k, np.float64))

    q, k = jnp.asarray(Q, jnp.float32) / 2, jnp.asarray(K, jnp.float32) / 2
    sample = estimates(apply_identity(balanced(Moments.of(q, k)), q, k, SCALE))
    off = np.mean(sample) - np.exp(SCALE * logits(q, k)[0, 0, 0, 0, 1])
    assert abs(off) < 4 * np.std(sample) / np.sqrt(len(sample))


def test_centring_lowers_the_variance_and_balance_lowers_it_more():
    # One isotropic feature's relative variance is exp(scale |q' + k'|^2) - 1: the exponent's mean over all pairs.
    def mean_exponent(moments):
        cross = np.einsum("hi,hi->h", moments.mean_q, moments.mean_k)
        return SCALE * (2 * np.trace(moments.pooled_second, axis1=1, axis2=2) + 2 * cross)

    q = Q.reshape(-1, KV_HEADS, HEADS // KV_HEADS, DIM)[:, 0]
    pairs = q.reshape(-1, 1, DIM) + K[:, :, 0].reshape(1, -1, DIM)
    as_they_are = mean_exponent(MOMENTS)
    assert as_they_are[0] == pytest.approx(SCALE * np.mean(np.sum(pairs**2, axis=-1)))
    centred, balanced = (mean_exponent(rewritten(MOMENTS, IDENTITIES[name])) for name in ("centring", "balance"))
    assert np.all(balanced < centred) and np.all(centred < as_they_are)


def test_balance_of_a_whole_model_is_that_of_its_layers():
    layers = [MOMENTS, Moments.of(*tokens(1))]
    whole = balanced(Moments.stack(layers))
    for index, layer in enumerate(layers):
        for found, wanted in zip(whole, balanced(layer), strict=True):
            np.testing.assert_allclose(found[index], wanted, atol=1e-9)


def test_mistakes_are_named():
    mean = np.zeros((2, 1, DIM))
    covariance = np.tile(np.eye(DIM), (2, 1, 1, 1))
    covariance[1, 0, 5, 5] = 1e-14
    with pytest.raises(UserError, match="^layer 1, head 0: the second moment of centred q is singular"):
        balance(mean, mean, covariance, covariance)
    assert np.all(np.isfinite(balance(mean, mean, covariance, covariance, shrinkage=0.1).b1))
    few = Moments.of(Q[:1, :5], K[:1, :5])  # of 5 tokens
    with pytest.raises(UserError, match="^layer 4, head 0: the second moment of centred . is singular"):
        balanced(few, where="layer 4")
    balanced(few, shrinkage=0.2)
    with pytest.raises(UserError, match="shrinkage = 1.1 must be between 0 and 1"):
        balanced(MOMENTS, shrinkage=1.1)
    one_head = jnp.asarray(K[:, :, :1], jnp.float32)
    with pytest.raises(UserError, match=r"B1 has shape \(2, 6, 6\); expected \(1, 6, 6\)"):
        apply_identity(IDENTITIES["centring"], jnp.asarray(Q, jnp.float32), one_head, SCALE)
