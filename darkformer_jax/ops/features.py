"""Positive random features of the DARK kernel exp(q^T M^T M k), in log space."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """Full float32 for float32 operands (accelerators would round them to bfloat16 or tf32), the default otherwise."""
    return jax.lax.Precision.DEFAULT if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST


def accumulator_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """What sums, logits and states of inputs of `dtype` are kept in: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def apply_geometry(x: Float[Array, "*batch d"], geometry: Float[Array, "r d"] | None) -> Float[Array, "*batch r"]:
    """x~ = M x in x's dtype, accumulated in float32; the identity when `geometry` is None."""
    if geometry is None:
        return x
    return jnp.einsum(
        "...d,rd->...r",
        x,
        geometry.astype(x.dtype),
        precision=matmul_precision(x.dtype),
        preferred_element_type=accumulator_dtype(x.dtype),
    ).astype(x.dtype)


def log_positive_features(
    x: Float[Array, "*batch d"],
    projections: Float[Array, "m r"],
    geometry: Float[Array, "r d"] | None = None,
    scale: float = 1.0,
) -> Float[Array, "*batch m"]:
    """l_i(x) = sqrt(scale) w_i . M x - scale |M x|^2 / 2, so that E_w[exp(l_i(q) + l_i(k))] = exp(scale q^T M^T M k).

    Positive random features (Choromanski et al., arXiv 2009.14794, Lemma 1) in the geometry M of DARKFormer (arXiv
    2603.04127). The 1/m of the mean over features is the caller's.

    Args:
      x: queries or keys.
      projections: w, rows drawn from N(0, I_r); see `draw_projections`.
      geometry: M, or None for the identity (the softmax kernel: Performer).
      scale: of the logits; softmax attention has d^-0.5.

    Returns:
      float32 (float64 for float64 x). The matmul operands have x's dtype.
    """
    point = apply_geometry(x, geometry)
    wide = accumulator_dtype(x.dtype)
    projected = jnp.einsum(
        "...r,mr->...m",
        point,
        projections.astype(x.dtype),
        precision=matmul_precision(x.dtype),
        preferred_element_type=wide,
    )
    # The norm of the very numbers that were projected: rounding x~ then moves the point, not the estimator's mean.
    # (einsum, because XLA's CPU backend is several times slower on the sum of a product.)
    point = point.astype(wide)
    squared_norm = jnp.einsum("...r,...r->...", point, point, precision=jax.lax.Precision.HIGHEST)[..., None]
    return scale**0.5 * projected - 0.5 * scale * squared_norm
