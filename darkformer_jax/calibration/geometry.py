"""The geometry M, and coordinates for it, from the moments of a pretrained model's queries and keys."""

from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float

from darkformer_jax.calibration.moments import Moments
from darkformer_jax.errors import UserError
from darkformer_jax.ops.second_moments import shrunk_eigh

_SMALLEST_SHARE = 1e-6  # of the mean variance, added in every direction

ScalePolicy = Literal["literal", "inverse_sqrt_dim", "temperature", "unit_norm"]


def whitening_geometry(
    moments: Moments, *, scale: float, policy: ScalePolicy = "temperature", shrinkage: float = 0.0, where: str = ""
) -> Float[np.ndarray, "*layers hkv d d"]:
    """M = c Lam^(-1/2), Lam = (E[q q^T] + E[k k^T]) / 2: queries and keys get isotropic second moments.

    The kernel changes to exp(scale q^T M^T M k), which the directions of large variance no longer dominate. c decides
    the second moment of x' = sqrt(scale) M x, on which the variance of random features depends:

    * `literal`: I, the paper's equation M Lam M^T = I taken for x scaled by d^(-1/4). On Gaussian data the kernel
      itself, and so every estimate of it, then has infinite variance.
    * `inverse_sqrt_dim`: d^(-1/2) I. M Lam M^T = I for unscaled x, then softmax's temperature d^(-1/4) on each side
      (where scale = d^-0.5); a logit of independent q and k has variance 1. Isotropic features have finite variance
      from d = 37 on, Theorem 3.2's from d = 5 on.
    * `temperature`: (scale tr Lam / d) I. E|M x|^2 = E|x|^2, so the mean logit of a point with itself is that of the
      pretrained kernel. Data that are already isotropic give M = I.
    * `unit_norm`: I / d. E|x'|^2 = 1. Isotropic features have finite variance from d = 7 on.

    Args:
      moments: of q and k as the mechanism gets them (after RoPE and QK-norm, not scaled).
      scale: of the logits; softmax attention has d^-0.5.
      policy: see above.
      shrinkage: a in [0, 1]: Lam becomes (1 - a) Lam + a (tr Lam / d) I; 1 gives a multiple of the identity.
      where: begins the message of an error, for example "layer 3".

    Raises:
      UserError: the policy is unknown, the shrinkage is outside [0, 1], there are too few tokens, or the second moments
        are singular.
    """
    if policy not in get_args(ScalePolicy):
        raise UserError(f"scale policy {policy!r} is unknown; allowed: {', '.join(get_args(ScalePolicy))}")
    if not shrinkage:
        moments.require_full_rank(where)
    eigenvalues, vectors = shrunk_eigh(moments.pooled_second, shrinkage, name="q and k", where=where)
    dim = eigenvalues.shape[-1]
    squared = {
        "literal": 1 / scale,
        "inverse_sqrt_dim": dim**-0.5 / scale,
        "temperature": np.mean(eigenvalues, axis=-1)[..., None],
        "unit_norm": 1 / (scale * dim),
    }[policy]
    return np.einsum("...ij,...j,...kj->...ik", vectors, np.sqrt(squared / eigenvalues), vectors)


class BalancedMaps(NamedTuple):
    """q' = A q and k' = B (k - b) for each key/value head; see `mixers.coordinates`."""

    query_map: Float[np.ndarray, "*layers hkv d d"]
    key_map: Float[np.ndarray, "*layers hkv d d"]
    key_center: Float[np.ndarray, "*layers hkv d"]


def balanced_maps(moments: Moments, where: str = "") -> BalancedMaps:
    """Coordinates in which queries and centred keys have the same second moments, a diagonal matrix.

    Of all A and B with A^T B = I, these make E|q'|^2 + E|k'|^2 smallest: twice the sum of the Hankel singular values
    sqrt(eigenvalue_i(Cov[k] E[q q^T])). This is the balanced realisation of control theory (Moore, IEEE TAC 26, 1981)
    with these moments in the place of Gramians. With Cov[k] = L L^T and L^T E[q q^T] L = U diag(s) U^T,

        A = diag(s)^(-1/4) U^T L^T,    B = diag(s)^(1/4) U^T L^-1,    b = E[k].

    A millionth of the mean variance is added in every direction, so that no coordinate is scaled without bound
    where queries or keys do not vary.

    Args:
      moments: of q and k as the mechanism gets them.
      where: begins the message of an error, for example "layer 3".

    Raises:
      UserError: there are too few tokens for second moments of full rank.
    """
    moments.require_full_rank(where)
    second_q, covariance_k = (_with_floor(second) for second in (moments.second_q, moments.covariance_k))
    factor = np.linalg.cholesky(covariance_k)
    squared, vectors = np.linalg.eigh(np.swapaxes(factor, -1, -2) @ second_q @ factor)
    scales, turned = squared[..., None] ** 0.25, np.swapaxes(vectors, -1, -2)
    query_map = turned @ np.swapaxes(factor, -1, -2) / scales
    return BalancedMaps(query_map, scales * (turned @ np.linalg.inv(factor)), moments.mean_k)


def _with_floor(second: Float[np.ndarray, "*layers d d"]) -> Float[np.ndarray, "*layers d d"]:
    mean = np.trace(second, axis1=-2, axis2=-1)[..., None, None] / second.shape[-1]
    return second + _SMALLEST_SHARE * mean * np.eye(second.shape[-1])
