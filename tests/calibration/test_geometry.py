"""What M does to second moments."""

import numpy as np
import pytest

from darkformer_jax.calibration.geometry import whitening_geometry
from darkformer_jax.calibration.moments import Moments
from darkformer_jax.errors import UserError
from tests.anisotropic import DIM, MOMENTS, SCALE, K, Q, tokens


def moments_of(second, mean=0.0):
    """Moments of 100 tokens of one head whose second moments are `second`."""
    means = np.full((1, len(second)), mean)
    return Moments(np.asarray(100), means, means, second[None], second[None])


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("policy", ["literal", "inverse_sqrt_dim", "temperature", "unit_norm"])
def test_whitening_gives_the_second_moment_it_says(policy, shrinkage):
    geometry = whitening_geometry(MOMENTS, scale=SCALE, policy=policy, shrinkage=shrinkage)
    pooled = MOMENTS.pooled_second
    size = np.trace(pooled, axis1=1, axis2=2)[:, None, None] / DIM
    shrunk = (1 - shrinkage) * pooled + shrinkage * size * np.eye(DIM)
    found = SCALE * geometry @ shrunk @ np.swapaxes(geometry, 1, 2)
    wanted = {"literal": 1.0, "inverse_sqrt_dim": DIM**-0.5, "temperature": SCALE * size, "unit_norm": 1 / DIM}
    np.testing.assert_allclose(found, np.broadcast_to(wanted[policy] * np.eye(DIM), found.shape), atol=1e-12)
    np.testing.assert_allclose(geometry, np.swapaxes(geometry, 1, 2), atol=1e-12)
    if shrinkage == 1:
        np.testing.assert_allclose(geometry, geometry[:, :1, :1] * np.eye(DIM), atol=1e-12)


def test_the_norms_that_the_policies_keep():
    def mean_square(policy):
        geometry = whitening_geometry(MOMENTS, scale=SCALE, policy=policy)
        pooled = MOMENTS.in_coordinates(geometry, SCALE).pooled_second
        return np.trace(pooled, axis1=1, axis2=2)

    before = np.trace(MOMENTS.in_coordinates(None, SCALE).pooled_second, axis1=1, axis2=2)
    np.testing.assert_allclose(mean_square("temperature"), before)
    np.testing.assert_allclose(mean_square("unit_norm"), 1)
    np.testing.assert_allclose(mean_square("literal"), DIM)
    isotropic = moments_of(2.5 * np.eye(DIM))
    found = whitening_geometry(isotropic, scale=SCALE, policy="temperature")
    np.testing.assert_allclose(found, np.eye(DIM)[None])


def test_whitening_of_a_whole_model_is_that_of_its_layers():
    layers = [MOMENTS, Moments.of(*tokens(1))]
    whole = whitening_geometry(Moments.stack(layers), scale=SCALE)
    for index, layer in enumerate(layers):
        np.testing.assert_allclose(whole[index], whitening_geometry(layer, scale=SCALE), atol=1e-12)


def test_singular_second_moments_are_named():
    flat = moments_of(np.diag([3.0, 2.0, 1.0, 1.0, 1.0, 1e-14]))
    message = (
        r"^layer 4, head 0: the second moment of q and k is singular: its smallest eigenvalue is 1e-14, its largest 3;"
    )
    with pytest.raises(UserError, match=message):
        whitening_geometry(flat, scale=SCALE, where="layer 4")
    with pytest.raises(UserError, match="^layer 1, head 0: the second moment of q and k is singular"):
        whitening_geometry(Moments.stack([moments_of(np.eye(DIM)), flat]), scale=SCALE)
    with pytest.raises(UserError, match="smallest eigenvalue is 0, its largest 0"):
        whitening_geometry(moments_of(np.zeros((DIM, DIM))), scale=SCALE, shrinkage=0.5)
    assert np.all(np.isfinite(whitening_geometry(flat, scale=SCALE, shrinkage=0.1)))


def test_few_tokens_need_shrinkage():
    few = Moments.of(Q[:1, :5], K[:1, :5])
    with pytest.raises(UserError, match="moments of 5 tokens; .* need at least 7"):
        whitening_geometry(few, scale=SCALE)
    whitening_geometry(few, scale=SCALE, shrinkage=0.2)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="policy 'paper' is unknown; allowed: literal, inverse_sqrt_dim, temperature"):
        whitening_geometry(MOMENTS, scale=SCALE, policy="paper")
    for shrinkage in (-0.1, 1.1, np.nan):
        with pytest.raises(UserError, match="shrinkage = .* must be between 0 and 1"):
            whitening_geometry(MOMENTS, scale=SCALE, shrinkage=shrinkage)
