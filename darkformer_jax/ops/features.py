"""Feature maps of linear attention, whose kernel is sum_i phi_i(q) phi_i(k), in log space: l_i(x) = log phi_i(x)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from darkformer_jax.errors import UserError
from darkformer_jax.ops.lowering import target_platform

# (arrays, x [..., d], scale) -> l(x) [..., m] of one head, finite, in float32 (float64 for float64 x). `arrays` is a
# pytree: what the map reads besides x. `scale` is of the logits; a map whose kernel has none ignores it.
FeatureMap = Callable[[Any, Array, float], Array]


def accumulator_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype of sums, logits and states for inputs of `dtype`: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def matmul(spec: str, a: Array, b: Array, dtype: jax.typing.DTypeLike) -> Array:
    """einsum(spec, a, b) with operands rounded to `dtype` and a float32 result (float64 for float64).

    float32 operands keep their precision: by default accelerators would round them to bfloat16 or tf32.
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
    2603.04127). The caller divides by m.

    Args:
      x: queries or keys.
      projections: w, rows drawn from N(0, I_r); see `draw_projections`.
      geometry: M, or None for the identity (the softmax kernel: Performer).
      scale: of the logits; softmax attention has d^-0.5.
      log_weights: added to l_i(x): half the log importance weight of each w_i that is not drawn from N(0, I); see
        `theory.proposals.transform_projections`.

    Returns:
      float32 (float64 for float64 x). The matmul operands have x's dtype.

    Raises:
      UserError: where log_weights has not one entry per row of projections.
    """
    point = apply_geometry(x, geometry)
    projected = matmul("...r,mr->...m", point, projections, x.dtype)
    # The norm is that of x~ as it was rounded for the product: rounding moves the point, not the estimator's mean.
    # (einsum, because XLA's CPU backend is several times slower on the sum of a product.)
    point = point.astype(accumulator_dtype(x.dtype))
    squared_norm = jnp.einsum("...r,...r->...", point, point, precision=jax.lax.Precision.HIGHEST)[..., None]
    log_features = scale**0.5 * projected - 0.5 * scale * squared_norm
    if log_weights is None:
        return log_features
    if log_weights.shape != projections.shape[:1]:
        raise UserError(f"log_weights have shape {log_weights.shape}; expected {projections.shape[:1]}")
    return log_features + jnp.expand_dims(log_weights.astype(log_features.dtype), tuple(range(log_features.ndim - 1)))


class RandomFeatures(NamedTuple):
    """What `positive_random_features` reads; see `log_positive_features`."""

    projections: Float[Array, "*hkv m r"]  # w; m = 0: nothing is seen through features
    geometry: Float[Array, "*hkv r d"] | None = None  # M; None is the identity
    log_weights: Float[Array, "*hkv m"] | None = None  # of w that was not drawn from N(0, I)


def positive_random_features(
    arrays: RandomFeatures, x: Float[Array, "*batch d"], scale: float
) -> Float[Array, "*batch m"]:
    """`log_positive_features` as a `FeatureMap`: DARK attention, and Performer."""
    return log_positive_features(x, arrays.projections, arrays.geometry, scale, arrays.log_weights)


def log_elu_plus_one(arrays: None, x: Float[Array, "*batch d"], scale: float) -> Float[Array, "*batch d"]:
    """l_i(x) = x_i where x_i < 0, else log(1 + x_i): the linear transformer's phi(x) = elu(x) + 1, so m = d.

    (Katharopoulos et al., arXiv 2006.16236.) It reads no arrays and no scale.
    """
    x = x.astype(accumulator_dtype(x.dtype))
    # Where x_i < 0, log1p gets 0: of x_i <= -1 it and its gradient would be NaN. jnp.maximum(x, 0) would halve the
    # gradient at x_i = 0, where elu has slope 1.
    return jnp.where(x < 0, x, jnp.log1p(jnp.where(x < 0, 0, x)))


def log_two_sided(arrays: None, x: Float[Array, "*batch d"], scale: float) -> Float[Array, "*batch m"]:
    """l(x) = [x, -x], so m = 2 d: phi(x) = [exp(x), exp(-x)] of Hedgehog (Zhang et al., arXiv 2402.04347).

    It reads no arrays and no scale.
    """
    x = x.astype(accumulator_dtype(x.dtype))
    return jnp.concatenate([x, -x], axis=-1)


def log_relu(arrays: None, x: Float[Array, "*batch d"], scale: float) -> Float[Array, "*batch d"]:
    """l_i(x) = log max(x_i, 1e-6): phi(x) = relu(x), but for its zeros, which have no logarithm.

    With much smaller numbers in their place, `feature_scores` would round what keys without a feature in common weigh.
    It reads no arrays and no scale.
    """
    return jnp.log(jnp.maximum(x.astype(accumulator_dtype(x.dtype)), 1e-6))
