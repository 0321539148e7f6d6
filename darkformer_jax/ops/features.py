"""Positive random features of the DARK kernel exp(q^T M^T M k), in log space."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from darkformer_jax.errors import UserError
from darkformer_jax.ops.lowering import target_platform


def accumulator_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """What sums, logits and states of inputs of `dtype` are kept in: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def matmul(spec: str, a: Array, b: Array, dtype: jax.typing.DTypeLike) -> Array:
    """einsum(spec, a, b) with operands rounded to `dtype` and a float32 result (float64 for float64).

    float32 operands are multiplied in full: accelerators would round them to bfloat16 or tf32.
    """
    a, b, wide = a.astype(dtype), b.astype(dtype), accumulator_dtype(dtype)
    if dtype != wide and target_platform() == "cpu":
        a, b = a.astype(wide), b.astype(wide)  # the CPU backend lacks some products of bfloat16 with a float32 result
    precision = jax.lax.Precision.HIGHEST if a.dtype == wide else jax.lax.Precision.DEFAULT
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=wide)


def apply_geometry(x: Float[Array, "*batch d"], geometry: Float[Array, "r d"] | None) -> Float[Array, "*batch r"]:
    """x~ = M x in x's dtype, accumulated in float32; the identity when `geometry` is None."""
    if geometry is None:
        return x
    return matmul("...d,rd->...r", x, geometry, x.dtype).astype(x.dtype)


def log_positive_features(
    x: Float[Array, "*batch d"],
    projections: Float[Array, "m r"],
    geometry: Float[Array, "r d"] | None = None,
    scale: float = 1.0,
    log_weights: Float[Array, "m"] | None = None,
) -> Float[Array, "*batch m"]:
    """l_i(x) = sqrt(scale) w_i . M x - scale |M x|^2 / 2, so that E_w[exp(l_i(q) + l_i(k))] = exp(scale q^T M^T M k).

    Positive random features (Choromanski et al., arXiv 2009.14794, Lemma 1) in the geometry M of DARKFormer (arXiv
    2603.04127). The 1/m of the mean over features is the caller's.

    Args:
      x: queries or keys.
      projections: w, rows drawn from N(0, I_r); see `draw_projections`.
      geometry: M, or None for the identity (the softmax kernel: Performer).
      scale: of the logits; softmax attention has d^-0.5.
      log_weights: added to l_i(x), where w is not drawn from N(0, I): half the log importance weight of each w_i; see
        `proposals.transform_projections`.

    Returns:
      float32 (float64 for float64 x). The matmul operands have x's dtype.

    Raises:
      UserError: where log_weights are not one for each row of projections.
    """
    point = apply_geometry(x, geometry)
    projected = matmul("...r,mr->...m", point, projections, x.dtype)
    # The norm of the very numbers that were projected: rounding x~ then moves the point, not the estimator's mean.
    # (einsum, because XLA's CPU backend is several times slower on the sum of a product.)
    point = point.astype(accumulator_dtype(x.dtype))
    squared_norm = jnp.einsum("...r,...r->...", point, point, precision=jax.lax.Precision.HIGHEST)[..., None]
    log_features = scale**0.5 * projected - 0.5 * scale * squared_norm
    if log_weights is None:
        return log_features
    if log_weights.shape != projections.shape[:1]:
        raise UserError(f"log_weights have shape {log_weights.shape}; expected {projections.shape[:1]}")
    return log_features + jnp.expand_dims(log_weights.astype(log_features.dtype), tuple(range(log_features.ndim - 1)))
