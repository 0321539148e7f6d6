import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.attention.positions import rope

random = np.random.default_rng(0)
X = random.standard_normal((2, 5, 3, 8)).astype(np.float32)


def by_hand(x, positions, theta):
    """Each pair (i, i + d/2) as a complex number, turned by positions * theta^(-2i/d)."""
    half = x.shape[-1] // 2
    z = x[..., :half].astype(np.float64) + 1j * x[..., half:]
    turned = z * np.exp(1j * positions[..., None, None] * theta ** (-2 * np.arange(half) / x.shape[-1]))
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize(("start", "theta", "tolerance"), [(0, 1e4, 1e-5), (1000, 5e5, 2e-4), (65_000, 1e4, 2e-2)])
def test_pairs_are_turned_by_the_position(start, theta, tolerance):
    # An angle of 65,000 radians is a float32 number with a spacing of 0.008.
    positions = np.arange(start, start + 5, dtype=np.int32)[None].repeat(2, axis=0)
    np.testing.assert_allclose(rope(X, positions, theta), by_hand(X, positions, theta), atol=tolerance)


def test_position_zero_is_the_identity_and_rows_have_their_own_positions():
    positions = np.array([[0, 0, 0, 0, 0], [4, 0, 1, 2, 9]], np.int32)
    turned = rope(X, positions)
    np.testing.assert_array_equal(turned[0], X[0])
    np.testing.assert_array_equal(turned[1, 1], X[1, 1])
    np.testing.assert_allclose(turned, by_hand(X, positions, 1e4), atol=1e-5)


def test_products_depend_on_the_distance_only():
    q, k = X[:1, :1].repeat(4, axis=1), X[1:, 1:2].repeat(4, axis=1)
    starts = np.array([[0, 3, 17, 200]], np.int32)
    products = np.sum(np.asarray(rope(q, starts + 5)) * np.asarray(rope(k, starts)), axis=-1)
    np.testing.assert_allclose(products, products[:, :1].repeat(4, axis=1), atol=1e-4)
    assert not np.allclose(products, np.sum(q * k, axis=-1), atol=1e-2)


def test_bfloat16_stays_bfloat16_and_is_turned_in_float32():
    positions = np.arange(500, 505, dtype=np.int32)[None].repeat(2, axis=0)
    turned = rope(jnp.asarray(X, jnp.bfloat16), positions)
    assert turned.dtype == jnp.bfloat16
    exact = by_hand(np.asarray(jnp.asarray(X, jnp.bfloat16), np.float32), positions, 1e4)
    np.testing.assert_allclose(np.asarray(turned, np.float32), exact, rtol=2**-8, atol=2e-4)
