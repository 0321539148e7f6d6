"""Every proposal estimates the same kernel, and its second moment is the closed form's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax import draw_projections
from darkformer_jax.errors import UserError
from darkformer_jax.ops.features import log_positive_features
from darkformer_jax.ops.theory.proposals import (
    log_kernel_second_moment,
    log_optimal_second_moment,
    log_second_moment,
    log_variance_covariance,
    optimal_covariance,
    proposal_covariance,
    transform_projections,
)

KINDS = ("isotropic", "optimal", "log_variance", "log_variance_isotropic")
DIM = 6
random = np.random.default_rng(0)
ROTATION = np.linalg.qr(random.standard_normal((DIM, DIM)))[0]
SPREAD = np.array([0.01, 0.02, 0.05, 0.1, 0.2, 0.3])  # eigenvalues of second moments


def rotated(eigenvalues):
    return ROTATION * eigenvalues @ ROTATION.T


def covariance_of(kind, eigenvalues, mean=0.0):
    """The proposal for q and k of second moments with these eigenvalues, and of constant means."""
    means = np.full(DIM, mean)
    second = rotated(eigenvalues)
    return proposal_covariance(kind, mean_q=means, mean_k=means, second_q=second, second_k=second)


def standard_errors_off(sample, truth):
    off = (np.mean(sample) - truth) / (np.std(sample) / np.sqrt(len(sample)))
    print(f"mean of {len(sample)}: {np.mean(sample):.5f}, truth {truth:.5f}, {off:+.1f} standard errors off")
    return off


NUM_FEATURES, DRAWS = 8, 8192  # a block of 6 and part of another
Q, K = 0.35 * random.standard_normal((2, DIM))


@functools.cache
def standard_draws(kind):
    draw = jax.jit(lambda key: draw_projections(key, NUM_FEATURES, DIM, kind, num_heads=DRAWS))
    return draw(jax.random.key(5)).reshape(-1, DIM)


def estimates(projections, log_weights):
    logs = (log_positive_features(jnp.asarray(x, jnp.float32), projections, log_weights=log_weights) for x in (Q, K))
    return np.exp(np.asarray(sum(logs), np.float64)).reshape(DRAWS, NUM_FEATURES).mean(axis=1)


@pytest.mark.parametrize("draw", ["iid", "orthogonal"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_over_draws_is_the_kernel(kind, draw):
    transformed = transform_projections(standard_draws(draw), covariance_of(kind, SPREAD, 0.1))
    assert abs(standard_errors_off(estimates(*transformed), np.exp(Q @ K))) < 4


@pytest.mark.parametrize("draw", ["iid", "orthogonal"])
def test_transformed_rows_made_orthogonal_or_chi_again_fail_the_same_test(draw):
    # The weights are those of w = S z. Rows brought back to the norms or the right angles of z have another law.
    z = standard_draws(draw)
    w, log_weights = transform_projections(z, covariance_of("optimal", SPREAD))
    rescaled = w * (jnp.linalg.norm(z, axis=-1) / jnp.linalg.norm(w, axis=-1))[:, None]
    blocks = np.asarray(w).reshape(DRAWS, NUM_FEATURES, DIM)[:, :DIM]
    directions = np.swapaxes(np.linalg.qr(np.swapaxes(blocks, 1, 2))[0], 1, 2)
    turned = np.asarray(w).reshape(DRAWS, NUM_FEATURES, DIM).copy()
    turned[:, :DIM] = directions * np.linalg.norm(blocks, axis=-1, keepdims=True)
    for wrong in (rescaled, jnp.asarray(turned.reshape(-1, DIM))):
        assert abs(standard_errors_off(estimates(wrong, log_weights), np.exp(Q @ K))) > 8
    assert abs(standard_errors_off(estimates(w, None), np.exp(Q @ K))) > 8  # no weights: another kernel


@functools.cache
def gaussian_draws(count=600_000):
    draw = jax.jit(lambda key: jax.random.normal(key, (3, count, DIM)))
    return draw(jax.random.key(11))


@jax.jit
def squared_estimates(q, k, w, log_weights):
    def log_pair(q, k, w, weight):
        logs = (log_positive_features(x, w[None], log_weights=weight[None]) for x in (q, k))
        return sum(logs)[0]

    return jnp.exp(2 * jax.vmap(log_pair)(q, k, w, log_weights))


# Well inside the domains: near their edges the sample's own variance is infinite (isotropic: from lam = 1/28 on).
SMALL = np.array([0.005, 0.01, 0.015, 0.02, 0.025, 0.03])
LARGER = np.array([0.01, 0.02, 0.03, 0.035, 0.04, 0.045])


@pytest.mark.parametrize(
    ("kind", "eigenvalues"),
    [("isotropic", SMALL), ("optimal", LARGER), ("log_variance", LARGER), ("log_variance_isotropic", LARGER)],
)
def test_second_moments_on_gaussian_data(kind, eigenvalues):
    covariance = covariance_of(kind, eigenvalues)
    root = jnp.asarray(rotated(np.sqrt(eigenvalues)), jnp.float32)
    q, k, z = gaussian_draws()
    w, log_weights = transform_projections(z, covariance)
    squares = np.asarray(squared_estimates(q @ root, k @ root, w, log_weights), np.float64)
    proposal = np.diagonal(ROTATION.T @ covariance @ ROTATION)
    closed_form = np.exp(log_second_moment(eigenvalues, proposal))
    assert abs(standard_errors_off(squares, closed_form)) < 4
    error = np.std(squares) / np.sqrt(len(squares))
    kernel = np.exp(log_kernel_second_moment(eigenvalues))
    assert closed_form - kernel > 20 * error  # the sample is large enough to tell
    if kind == "optimal":
        assert np.exp(log_second_moment(eigenvalues)) - closed_form > 8 * error


def test_the_kernels_own_second_moment_on_gaussian_data():
    root = jnp.asarray(rotated(np.sqrt(LARGER)), jnp.float32)
    q, k, _ = gaussian_draws()
    squares = np.exp(2 * np.einsum("nd,nd->n", q @ root, k @ root, dtype=np.float64))
    assert abs(standard_errors_off(squares, np.exp(log_kernel_second_moment(LARGER)))) < 4


def test_closed_forms_are_those_worked_out_by_hand():
    for dim, lam, figures in (
        (256, 1 / 16, (2.0, 45.1, 34.2)),
        (256, 1 / 32, (0.5, 18.8, 16.5)),
        (64, 1 / 8, (2.1, 37.2, 18.4)),
        (64, 1 / 32, (0.13, 4.7, 4.1)),
        (16, 1 / 16, (0.13, 2.8, 2.1)),
    ):
        eigenvalues = np.full(dim, lam)
        closed = (log_kernel_second_moment, log_second_moment, log_optimal_second_moment)
        for found, figure in zip((form(eigenvalues) for form in closed), figures, strict=True):
            assert found == pytest.approx(figure, abs=0.051 if figure >= 0.5 else 0.0051)
    assert log_second_moment(np.array([0.1])) == pytest.approx(-0.5 * np.log((1 - 0.6) * 1.2))


def test_closed_forms_are_infinite_outside_their_domains():
    inside = np.full((2, 3), 0.01)
    for form, edge in ((log_second_moment, 1 / 6), (log_optimal_second_moment, 0.5), (log_kernel_second_moment, 0.5)):
        eigenvalues = inside.copy()
        eigenvalues[1, 2] = edge + 1e-9
        found = form(eigenvalues)
        assert np.isfinite(found[0]) and found[1] == np.inf
        eigenvalues[1, 2] = edge - 1e-9
        assert np.all(np.isfinite(form(eigenvalues)))


def test_theorem_3_2_beats_every_other_covariance_of_the_eigenbasis():
    optimal = np.linalg.eigvalsh(optimal_covariance(rotated(SPREAD)))  # ascending, as SPREAD is
    least = log_second_moment(SPREAD, optimal)
    assert least == pytest.approx(log_optimal_second_moment(SPREAD), rel=1e-12)
    assert least > log_kernel_second_moment(SPREAD)
    assert log_second_moment(SPREAD) == np.inf  # isotropic: 0.2 is more than 1/6
    assert log_optimal_second_moment(SPREAD / 2) < log_second_moment(SPREAD / 2) < np.inf
    sizes = np.repeat([0.01, 0.1, 0.3, 1.0], 50)[:, None]  # from the neighbourhood to far away
    others = optimal * np.exp(sizes * np.random.default_rng(1).standard_normal((200, DIM)))
    found = log_second_moment(np.broadcast_to(SPREAD, others.shape), others)
    assert np.all(found > least)
    assert np.sum(np.isfinite(found)) > 100


def mean_log_second_moment(covariance, sum_second):
    """Mean over pairs of log E_w[estimate^2], up to a constant of the data; from the integral over w."""
    inner = 2 * np.eye(DIM) - np.linalg.inv(covariance)
    if np.linalg.eigvalsh(inner)[0] <= 0:
        return np.inf
    determinants = np.linalg.slogdet(covariance)[1] - np.linalg.slogdet(inner)[1]
    return determinants / 2 + 2 * np.trace(np.linalg.inv(inner) @ sum_second)


def test_the_log_variance_proposal_has_the_least_mean_log_second_moment():
    generator = np.random.default_rng(2)
    q, k = generator.standard_normal((2, 50, DIM)) @ rotated(np.sqrt(4 * SPREAD)) + np.array([[[0.5]], [[-1.0]]])
    sums = (q[:, None] + k[None]).reshape(-1, DIM)  # every pair: q and k independent
    sum_second = sums.T @ sums / len(sums)
    moments = {"mean_q": np.mean(q, 0), "mean_k": np.mean(k, 0), "second_q": q.T @ q / 50, "second_k": k.T @ k / 50}
    best = proposal_covariance("log_variance", **moments)
    np.testing.assert_allclose(best, log_variance_covariance(sum_second), rtol=1e-10)
    least = mean_log_second_moment(best, sum_second)
    root = np.linalg.cholesky(best)
    for size in (0.01, 0.1, 0.5):
        for _ in range(50):
            step = size * generator.standard_normal((DIM, DIM))
            other = root @ (np.eye(DIM) + step) @ (np.eye(DIM) + step).T @ root.T
            assert mean_log_second_moment(other, sum_second) > least
    isotropic = proposal_covariance("log_variance_isotropic", **moments)
    np.testing.assert_array_equal(isotropic, isotropic[0, 0] * np.eye(DIM))
    of_isotropic = mean_log_second_moment(isotropic, sum_second)
    assert least < of_isotropic < mean_log_second_moment(np.eye(DIM), sum_second)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert mean_log_second_moment(factor * isotropic, sum_second) > of_isotropic


def test_log_weights_are_half_the_log_ratio_of_the_densities_head_by_head():
    covariances = np.stack([covariance_of("optimal", SPREAD), covariance_of("log_variance", 20 * SPREAD)])
    with jax.enable_x64(True):
        z = jnp.asarray(np.random.default_rng(3).standard_normal((2, 5, DIM)))
        w, log_weights = (np.asarray(x) for x in transform_projections(z, covariances))
        for head, covariance in enumerate(covariances):
            alone = transform_projections(z[head], covariance)
            np.testing.assert_allclose(w[head], alone[0], rtol=1e-12)
            exponent = np.einsum("mi,ij,mj->m", w[head], np.linalg.inv(covariance) - np.eye(DIM), w[head])
            wanted = (exponent + np.linalg.slogdet(covariance)[1]) / 4
            np.testing.assert_allclose(log_weights[head], wanted, rtol=1e-10)
    narrow = transform_projections(jnp.asarray(z, jnp.float32), covariances)
    assert all(x.dtype == jnp.float32 for x in narrow)
    np.testing.assert_allclose(narrow[1], log_weights, rtol=1e-4, atol=1e-5)


def test_isotropic_changes_nothing():
    z = standard_draws("orthogonal")[:4]
    w, log_weights = transform_projections(z, covariance_of("isotropic", SPREAD))
    np.testing.assert_array_equal(w, z)
    np.testing.assert_array_equal(log_weights, np.zeros(4))


@pytest.mark.usefixtures("unchecked_types")
def test_mistakes_are_named():
    second = np.tile(rotated(SPREAD), (2, 3, 1, 1))
    second[1, 2] *= 2
    with pytest.raises(UserError, match=r"^layer 1, head 2: the optimal proposal .* below 0.5; the largest is 0.6"):
        optimal_covariance(second)
    with pytest.raises(UserError, match=r"^layer 7, head 2: the optimal"):
        optimal_covariance(second[1], "layer 7")
    with pytest.raises(UserError, match=r"^the optimal proposal"):
        optimal_covariance(second[1, 2])
    with pytest.raises(UserError, match="proposal 'best' is unknown; allowed: isotropic, optimal, log_variance"):
        covariance_of("best", SPREAD)
    with pytest.raises(UserError, match="eigenvalues must be positive; the smallest is -1"):
        log_second_moment(SPREAD, -np.ones(DIM))
    with pytest.raises(UserError, match=r"log_weights have shape \(3,\); expected \(4,\)"):
        log_positive_features(jnp.ones((2, DIM)), jnp.ones((4, DIM)), log_weights=jnp.zeros(3))
