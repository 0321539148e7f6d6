"""Other laws to draw projections from, for the same kernel: importance sampling of positive random features.

Everything here is in the coordinates x' = sqrt(scale) M x in which the kernel is exp(q' . k'). Moments that a proposal
is made of must be those of q' and k', not of q and k (`calibration.moments.Moments.in_coordinates` maps them).

Proposals and closed forms are computed on the host, in float64, from moments with any leading axes ([heads, ...] or
[layers, heads, ...]); `transform_projections` runs on the device, where projections are redrawn.
"""

from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from darkformer_jax.errors import UserError
from darkformer_jax.ops.features import matmul
from darkformer_jax.ops.second_moments import head_name

ProposalKind = Literal["isotropic", "optimal", "log_variance", "log_variance_isotropic"]


def proposal_covariance(
    kind: ProposalKind,
    *,
    mean_q: Float[np.ndarray, "*heads r"],
    mean_k: Float[np.ndarray, "*heads r"],
    second_q: Float[np.ndarray, "*heads r r"],
    second_k: Float[np.ndarray, "*heads r r"],
    where: str = "",
) -> Float[np.ndarray, "*heads r r"]:
    """The covariance P of the proposal `kind`, made from the moments of q' and k'.

    * `isotropic`: I.
    * `optimal`: Theorem 3.2 of DARKFormer (arXiv 2603.04127), with (E[q'q'^T] + E[k'k'^T]) / 2; see
      `optimal_covariance`.
    * `log_variance`: exists for any data; see `log_variance_covariance`.
    * `log_variance_isotropic`: the best multiple of I by the same measure (FAVOR++ / OPRF, Likhosherstov et al.,
      arXiv 2205.15317).

    Args:
      kind: see above.
      mean_q, mean_k: E[q'] and E[k'].
      second_q, second_k: E[q'q'^T] and E[k'k'^T], not centred.
      where: begins the message of an error, for example "layer 3".

    Raises:
      UserError: for an unknown kind, and where `optimal` does not exist.
    """
    if kind not in get_args(ProposalKind):
        raise UserError(f"proposal {kind!r} is unknown; allowed: {', '.join(get_args(ProposalKind))}")
    second_q = np.asarray(second_q, np.float64)
    dim = second_q.shape[-1]
    if kind == "isotropic":
        return np.broadcast_to(np.eye(dim), second_q.shape).copy()
    if kind == "optimal":
        return optimal_covariance((second_q + second_k) / 2, where)
    cross = np.einsum("...i,...j->...ij", mean_q, mean_k)
    sum_second = second_q + second_k + cross + np.swapaxes(cross, -1, -2)
    if kind == "log_variance_isotropic":
        sum_second = np.trace(sum_second, axis1=-2, axis2=-1)[..., None, None] / dim * np.eye(dim)
    return log_variance_covariance(sum_second)


def optimal_covariance(second: Float[np.ndarray, "*heads r r"], where: str = "") -> Float[np.ndarray, "*heads r r"]:
    """P* = (I + 2 Lam) (I - 2 Lam)^-1: the least second moment for q', k' iid N(0, Lam) (arXiv 2603.04127, Thm 3.2).

    Raises:
      UserError: naming layer, head and eigenvalue where one of Lam is not below 1/2: no minimum exists there.
    """
    eigenvalues, vectors = np.linalg.eigh(np.asarray(second, np.float64))
    for index in np.ndindex(eigenvalues.shape[:-1]):
        largest = eigenvalues[index][-1]
        if not largest < 0.5:
            raise UserError(
                f"{head_name(index, where)}the optimal proposal (Theorem 3.2) needs second moments of "
                f"sqrt(scale) M x with every eigenvalue below 0.5; the largest is {largest:.4g}: use a smaller M"
            )
    return _from_eigenvalues(vectors, (1 + 2 * eigenvalues) / (1 - 2 * eigenvalues))


def log_variance_covariance(sum_second: Float[np.ndarray, "*heads r r"]) -> Float[np.ndarray, "*heads r r"]:
    """P = I - 4 A: the least mean of log E_w[estimate^2] over pairs (q', k'); it exists for any data.

    With M3 = E[q'q'^T] + E[k'k'^T] + E[q']E[k']^T + E[k']E[q']^T = Q diag(L) Q^T, the second moment of q' + k' for
    independent q' and k': A = Q diag((1 - 2 L - sqrt((2 L + 1)^2 + 8 L)) / 16) Q^T <= 0. These are the dense
    exponential features of FAVOR# (Likhosherstov et al., arXiv 2302.00787) written as importance sampling.

    Args:
      sum_second: M3.
    """
    eigenvalues, vectors = np.linalg.eigh(np.asarray(sum_second, np.float64))
    eigenvalues = np.maximum(eigenvalues, 0)  # a singular M3's zeros, rounded
    a = (1 - 2 * eigenvalues - np.sqrt((2 * eigenvalues + 1) ** 2 + 8 * eigenvalues)) / 16
    return _from_eigenvalues(vectors, 1 - 4 * a)


def transform_projections(
    projections: Float[Array, "*heads m r"], covariance: Float[np.ndarray | Array, "*heads r r"]
) -> tuple[Float[Array, "*heads m r"], Float[Array, "*heads m"]]:
    """Standard normal projections made into draws of N(0, P), and the weights that keep the kernel the same.

    w_i = S z_i with the Cholesky factor S of P, and log_weights_i = (log N(w_i; 0, I) - log N(w_i; 0, P)) / 2
    = (|z_i|^2 - |w_i|^2) / 4 + log det P / 4: half of the importance weight, for each of l_i(q) and l_i(k); see
    `log_positive_features`. Unbiased for any P > 0 and for every law of z with standard normal rows, so for orthogonal
    projections too. Their joint law does not depend on which factor S is taken: it is invariant under rotations.

    The rows of w are neither orthogonal nor of chi norms, and must not be made so: the weights are those of w as it is.

    Args:
      projections: z, rows drawn from N(0, I); see `draw_projections`.
      covariance: P, symmetric and positive definite.

    Returns:
      (w, log_weights) in the dtype of `projections`.
    """
    factor = jnp.linalg.cholesky(jnp.asarray(covariance, projections.dtype))
    transformed = matmul("...mr,...sr->...ms", projections, factor, projections.dtype)
    # A sum of (z - w)(z + w) and not a difference of sums: small weights keep their digits.
    squares = jnp.sum((projections - transformed) * (projections + transformed), axis=-1)
    log_determinant = 2 * jnp.sum(jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1)), axis=-1)
    return transformed, (squares + log_determinant[..., None]) / 4


def log_second_moment(
    eigenvalues: Float[np.ndarray, "*heads r"], proposal: Float[np.ndarray, "*heads r"] | None = None
) -> Float[np.ndarray, "*heads"] | np.float64:
    """log E[estimate^2] of one feature's kernel estimate, over w ~ N(0, P) and q', k' iid N(0, Lam), in nats.

    Sum over eigenvalues lam of Lam and s of P, in one eigenbasis, of
    log s / 2 - log(1 + 2 lam) - log(2 - 1/s - 8 lam / (1 + 2 lam)) / 2. Infinite where that has no real value; for
    P = I it is -log[(1 - 6 lam)(1 + 2 lam)] / 2, finite below lam = 1/6.

    Args:
      eigenvalues: lam. With a geometry and no weights, those of scale M Lam M^T.
      proposal: s, in the same order; None for P = I.
    """
    eigenvalues = np.asarray(eigenvalues, np.float64)
    s = np.ones_like(eigenvalues) if proposal is None else np.asarray(proposal, np.float64)
    if not np.all(s > 0):
        raise UserError(f"a proposal's eigenvalues must be positive; the smallest is {np.min(s):.4g}")
    remainder = 2 - 1 / s - 8 * eigenvalues / (1 + 2 * eigenvalues)
    return np.sum(np.log(s) / 2 - np.log1p(2 * eigenvalues) - _log_or_minus_infinity(remainder) / 2, axis=-1)


def log_optimal_second_moment(eigenvalues: Float[np.ndarray, "*heads r"]) -> Float[np.ndarray, "*heads"] | np.float64:
    """The least that `log_second_moment` can be, Theorem 3.2's: -sum log(1 - 2 lam); infinite from lam = 1/2 on."""
    return -np.sum(_log_or_minus_infinity(1 - 2 * np.asarray(eigenvalues, np.float64)), axis=-1)


def log_kernel_second_moment(eigenvalues: Float[np.ndarray, "*heads r"]) -> Float[np.ndarray, "*heads"] | np.float64:
    """log E[exp(q' . k')^2] for q', k' iid N(0, Lam): -sum log(1 - 4 lam^2) / 2, infinite from lam = 1/2 on.

    No estimator's second moment is lower. With m independent features the estimate's variance, averaged over pairs, is
    (exp(log_second_moment) - exp(log_kernel_second_moment)) / m.
    """
    lam = np.asarray(eigenvalues, np.float64)
    return -np.sum((_log_or_minus_infinity(1 - 2 * lam) + np.log1p(2 * lam)) / 2, axis=-1)


def _from_eigenvalues(vectors: np.ndarray, eigenvalues: np.ndarray) -> np.ndarray:
    return np.einsum("...ij,...j,...kj->...ik", vectors, eigenvalues, vectors)


def _log_or_minus_infinity(x: np.ndarray) -> np.ndarray:
    return np.log(x, out=np.full_like(x, -np.inf), where=x > 0)
