"""Random features estimate the kernel they say they do: mean, variance, second moment. elu + 1 is what it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax import draw_projections
from darkformer_jax.ops.features import apply_geometry, log_elu_plus_one, log_positive_features

DRAWS = 4096


@functools.cache
def draws(kind, num_features, dim):
    return jax.jit(lambda key: draw_projections(key, num_features, dim, kind, num_heads=DRAWS))(jax.random.key(7))


def estimates(kind, num_features, q, k, geometry=None, scale=1.0):
    """The estimate of exp(scale q^T M^T M k) from each of 4,096 draws of m features."""
    rank = q.shape[0] if geometry is None else geometry.shape[0]
    w = draws(kind, num_features, rank).reshape(-1, rank)
    log_q, log_k = (log_positive_features(jnp.asarray(x, jnp.float32), w, geometry, scale) for x in (q, k))
    return np.exp(np.asarray(log_q + log_k, np.float64)).reshape(DRAWS, num_features).mean(axis=1)


def standard_errors_off(sample, truth):
    off = (np.mean(sample) - truth) / (np.std(sample) / np.sqrt(len(sample)))
    print(f"mean over {len(sample)} draws: {np.mean(sample) / truth:.3f} of the kernel, {off:+.1f} standard errors off")
    return off


random = np.random.default_rng(0)
TENTH = np.full(64, 0.1)
UNIT = random.standard_normal((2, 12)) / np.sqrt(12)
CASES = {  # q, k, number of features: a block, part of one, and more than one
    "q = k = 0.1": (TENTH, TENTH, 64),
    "q = k = -0.1": (-TENTH, -TENTH, 64),
    "unrelated": (UNIT[0], UNIT[1], 20),
    "long": (1.5 * UNIT[0], 1.5 * UNIT[0], 12),
    "few features": (UNIT[0], UNIT[1], 5),
    "at the origin": (np.zeros(12), UNIT[1], 12),
}


@pytest.mark.parametrize("kind", ["iid", "orthogonal"])
@pytest.mark.parametrize("case", CASES)
def test_the_mean_over_draws_is_the_kernel(kind, case):
    q, k, num_features = CASES[case]
    sample = estimates(kind, num_features, q, k)
    assert abs(standard_errors_off(sample, np.exp(q @ k))) < 4


def test_geometry_and_scale_are_in_the_kernel():
    q, k = random.standard_normal((2, 12))
    geometry = jnp.asarray(random.standard_normal((5, 12)) / 4, jnp.float32)
    for kind in ("iid", "orthogonal"):
        sample = estimates(kind, 20, q, k, geometry, 0.5)
        assert abs(standard_errors_off(sample, np.exp(0.5 * (geometry @ q) @ (geometry @ k)))) < 4


@pytest.mark.parametrize("sign", [1, -1])
def test_unsigned_orthogonal_draws_fail_the_same_test(sign):
    # Without the sign of R's diagonal QR's Q is not Haar: 0.89 and 1.11 times the kernel.
    q, k, num_features = sign * TENTH, sign * TENTH, 64
    sample = estimates("orthogonal_unsigned", num_features, q, k)
    assert abs(standard_errors_off(sample, np.exp(q @ k))) > 4
    assert abs(np.mean(sample) / np.exp(q @ k) - 1) > 0.05
    signed = estimates("orthogonal", num_features, q, k)
    assert abs(standard_errors_off(signed, np.exp(q @ k))) < 4


@pytest.mark.parametrize("num_features", [12, 20])
@pytest.mark.parametrize("size", [0.25, 0.5])  # of q = k; far longer ones have no measurable variance
def test_orthogonal_draws_have_the_lower_variance(num_features, size):
    x = size * UNIT[0] / np.linalg.norm(UNIT[0])
    iid, orthogonal = (np.var(estimates(kind, num_features, x, x)) for kind in ("iid", "orthogonal"))
    one_feature = np.exp(4 * size**2) * (np.exp(4 * size**2) - 1) * np.exp(-2 * size**2)
    assert iid == pytest.approx(one_feature / num_features, rel=0.15)
    assert orthogonal < 0.95 * iid


def test_the_variance_falls_with_the_number_of_features():
    q, k, _ = CASES["unrelated"]
    one, twenty = (np.var(estimates("iid", count, q, k)) for count in (5, 20))
    assert one / twenty == pytest.approx(4, rel=0.3)


@pytest.mark.parametrize("eigenvalue", [0.01, 0.02, 0.03])
def test_second_moment_on_gaussian_data(eigenvalue):
    # prod [(1 - 6 lam)(1 + 2 lam)]^(-1/2) over eigenvalues. The estimate's own variance is finite under lam = 1/28.
    dim, count = 6, 400_000
    keys = jax.random.split(jax.random.key(3), 3)
    q, k, w = (jax.random.normal(key, (count, dim)) for key in keys)
    q, k = q * eigenvalue**0.5, k * eigenvalue**0.5
    pairwise = jax.jit(jax.vmap(lambda q, k, w: log_positive_features(q, w[None]) + log_positive_features(k, w[None])))
    squares = np.exp(2 * np.asarray(pairwise(q, k, w), np.float64)[:, 0])
    closed_form = ((1 - 6 * eigenvalue) * (1 + 2 * eigenvalue)) ** (-dim / 2)
    assert abs(standard_errors_off(squares, closed_form)) < 4
    assert closed_form > 1 + 8 * np.std(squares) / np.sqrt(count)  # the sample is large enough to tell


def test_dtypes():
    x, w, m = jnp.ones((3, 4), jnp.bfloat16), jnp.ones((5, 4)), jnp.ones((4, 4))
    assert log_positive_features(x, w, m).dtype == jnp.float32
    assert apply_geometry(x, m).dtype == jnp.bfloat16
    with jax.enable_x64(True):
        wide = log_positive_features(jnp.ones((3, 4), jnp.float64), jnp.ones((5, 4)))
        assert wide.dtype == jnp.float64


def test_bfloat16_rounding_moves_the_point_not_the_norm():
    # The norm is that of the rounded M x: at q = -k every feature then says the same, exp(-|M x|^2).
    x = jnp.asarray(random.standard_normal((1, 16)) * 5, jnp.bfloat16)
    w = draw_projections(jax.random.key(0), 32, 16).astype(jnp.bfloat16).astype(jnp.float32)
    m = jnp.asarray(random.standard_normal((16, 16)), jnp.float32)
    total = log_positive_features(x, w, m) + log_positive_features(-x, w, m)
    square = np.sum(np.asarray(apply_geometry(x, m), np.float64) ** 2)
    np.testing.assert_allclose(total[0], -square, rtol=1e-5)


def test_elu_plus_one_and_its_gradient_everywhere():
    x = np.array([-500, -100, -1, -1e-6, 0, 1e-6, 1, 100, 500], np.float32)
    value, gradient = jax.vmap(jax.value_and_grad(lambda x: log_elu_plus_one(None, x[None], 1.0)[0]))(x)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(value, np.where(wide < 0, wide, np.log1p(np.abs(wide))), rtol=1e-6)
    np.testing.assert_allclose(gradient, np.where(wide < 0, 1, 1 / (1 + np.abs(wide))), rtol=1e-6)
    np.testing.assert_allclose(np.exp(value[2:6]), np.where(wide > 0, wide + 1, np.exp(wide))[2:6], rtol=1e-6)
    assert log_elu_plus_one(None, jnp.ones(3, jnp.bfloat16), 1.0).dtype == jnp.float32
    with jax.enable_x64(True):
        assert log_elu_plus_one(None, jnp.ones(3, jnp.float64), 1.0).dtype == jnp.float64
