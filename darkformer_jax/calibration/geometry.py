"""The geometry M, and identities of the kernel, from the moments of a pretrained model's queries and keys."""

from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from darkformer_jax.calibration.moments import Moments
from darkformer_jax.errors import UserError
from darkformer_jax.ops.identities import Identity
from darkformer_jax.ops.proposals import head_name

ScalePolicy = Literal["literal", "inverse_sqrt_dim", "temperature", "unit_norm"]


def identity_geometry(moments: Moments) -> Float[np.ndarray, "*layers hkv d d"]:
    """M = I for every head: the softmax kernel."""
    return np.broadcast_to(np.eye(moments.mean_k.shape[-1]), moments.second_k.shape).copy()


def whitening_geometry(
    moments: Moments, *, scale: float, policy: ScalePolicy = "temperature", shrinkage: float = 0.0, where: str = ""
) -> Float[np.ndarray, "*layers hkv d d"]:
    """M = c Lam^(-1/2), Lam = (E[q q^T] + E[k k^T]) / 2: queries and keys get isotropic second moments.

    The result is another kernel, exp(scale q^T M^T M k), which the directions of large variance no longer dominate.
    c decides the second moment of x' = sqrt(scale) M x, on which the variance of random features depends:

    * `literal`: I, which is the paper's equation M Lam M^T = I for x scaled by d^(-1/4). On Gaussian data the kernel
      itself, and so every estimate of it, then has infinite variance.
    * `inverse_sqrt_dim`: d^(-1/2) I. M Lam M^T = I for unscaled x, then softmax's temperature d^(-1/4) on each side
      (where scale = d^-0.5); a logit of independent q and k has variance 1. Isotropic features have finite variance
      from d = 37 on, Theorem 3.2's from d = 5 on.
    * `temperature`: (scale tr Lam / d) I. E|M x|^2 = E|x|^2, so that the mean logit of a point with itself is that of
      the pretrained kernel; M = I for data that are already isotropic.
    * `unit_norm`: I / d. E|x'|^2 = 1. Isotropic features have finite variance from d = 7 on.

    Args:
      moments: those of q and k as the mechanism gets them (after RoPE and QK-norm, not scaled).
      scale: of the logits; softmax attention has d^-0.5.
      policy: see above.
      shrinkage: a in [0, 1]: Lam becomes (1 - a) Lam + a (tr Lam / d) I; 1 gives a multiple of the identity.
      where: begins the message of an error, for example "layer 3".

    Raises:
      UserError: for an unknown policy, a shrinkage outside [0, 1], too few tokens, and singular second moments.
    """
    if policy not in get_args(ScalePolicy):
        raise UserError(f"scale policy {policy!r} is unknown; allowed: {', '.join(get_args(ScalePolicy))}")
    eigenvalues, vectors = _eigh(moments.pooled_second, moments, shrinkage, where, "q and k")
    dim = eigenvalues.shape[-1]
    squared = {
        "literal": 1 / scale,
        "inverse_sqrt_dim": dim**-0.5 / scale,
        "temperature": np.mean(eigenvalues, axis=-1)[..., None],
        "unit_norm": 1 / (scale * dim),
    }[policy]
    return np.einsum("...ij,...j,...kj->...ik", vectors, np.sqrt(squared / eigenvalues), vectors)


def centring(moments: Moments) -> Identity:
    """mu_q = E[q], mu_k = E[k], B1 = B2 = I."""
    eye = identity_geometry(moments)
    return Identity(moments.mean_q, moments.mean_k, eye, eye)


def balance(moments: Moments, *, shrinkage: float = 0.0, where: str = "") -> Identity:
    """Centring, and B1 and B2 that give queries and keys the same diagonal second moments s.

    With eigh of the centred second moments, M1 = Q1 L1 Q1^T of q and M2 = Q2 L2 Q2^T of k, and
    svd(L1^1/2 Q1^T Q2 L2^1/2) = U s V^T: B1 = s^1/2 U^T L1^-1/2 Q1^T, B2 = s^1/2 V^T L2^-1/2 Q2^T.

    Args:
      moments: those of q and k as the mechanism gets them.
      shrinkage: of M1 and M2, as in `whitening_geometry`. The identity is exact with any shrinkage, the balance is not.
      where: begins the message of an error, for example "layer 3".

    Raises:
      UserError: for a shrinkage outside [0, 1], too few tokens, and second moments that are singular.
    """
    values1, vectors1 = _eigh(moments.covariance_q, moments, shrinkage, where, "centred q")
    values2, vectors2 = _eigh(moments.covariance_k, moments, shrinkage, where, "centred k")
    transposed1, transposed2 = np.swapaxes(vectors1, -1, -2), np.swapaxes(vectors2, -1, -2)
    u, s, vt = np.linalg.svd(np.sqrt(values1)[..., :, None] * (transposed1 @ vectors2) * np.sqrt(values2)[..., None, :])
    root = np.sqrt(s)[..., :, None]
    b1 = root * (np.swapaxes(u, -1, -2) @ (transposed1 / np.sqrt(values1)[..., :, None]))
    b2 = root * (vt @ (transposed2 / np.sqrt(values2)[..., :, None]))
    return Identity(moments.mean_q, moments.mean_k, b1, b2)


def rewritten_moments(moments: Moments, identity: Identity) -> Moments:
    """The moments of B1 (q - mu_q) and B2 (k - mu_k)."""
    mu_q, mu_k, b1, b2 = (np.asarray(constant, np.float64) for constant in identity)
    return moments.transformed(b1, b2, mu_q, mu_k)


def _eigh(
    second: np.ndarray, moments: Moments, shrinkage: float, where: str, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (ascending, positive) and eigenvectors of a second moment that is shrunk towards the isotropic."""
    if not 0 <= shrinkage <= 1:
        raise UserError(f"shrinkage = {shrinkage} must be between 0 and 1")
    if not shrinkage:
        moments.require_full_rank(where)
    dim = second.shape[-1]
    values, vectors = np.linalg.eigh(second)
    values = (1 - shrinkage) * values + shrinkage * np.mean(values, axis=-1, keepdims=True)
    # Below this share of the largest, an eigenvalue is the rounding of float32 data.
    smallest_share = dim * np.finfo(np.float32).eps ** 2
    for index in np.ndindex(values.shape[:-1]):
        smallest, largest = values[index][0], values[index][-1]
        if not smallest > smallest_share * largest:
            raise UserError(
                f"{head_name(index, where)}the second moment of {name} is singular: its smallest eigenvalue is "
                f"{smallest:.3g}, its largest {largest:.3g}; calibrate on more varied text, or with shrinkage > 0"
            )
    return values, vectors
