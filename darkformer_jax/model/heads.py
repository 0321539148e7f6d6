"""The head of tasks other than next-token prediction: a few outputs per sequence."""

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from darkformer_jax.mixers.layers import Linear

Pooling = Literal["last", "mean"]


def make_classifier(embed_dim: int, num_outputs: int, rngs: nnx.Rngs) -> Linear:
    """The map y = x W + b in float32, from a pooled hidden state to one output per class, or to one number."""
    return Linear((embed_dim, num_outputs), ("embed", None), use_bias=True, rngs=rngs, dtype="float32")


def pool(
    hidden: Float[Array, "b n embed"], segment_ids: Int[Array, "b n"], pooling: Pooling
) -> Float[Array, "b embed"]:
    """One hidden state per sequence, in float32: that of its last real token, or the mean over its real tokens.

    It is zero for a sequence of padding only. segment_ids: 0 = padding, which stands at the end.
    """
    is_real = (segment_ids != 0).astype(jnp.float32)
    count = jnp.maximum(jnp.sum(is_real, axis=1, keepdims=True), 1.0)
    if pooling == "mean":
        weights = is_real / count
    else:  # weights rather than an index: nothing has to move between devices that share a sequence
        weights = jnp.where(jnp.cumsum(is_real, axis=1) == count, is_real, 0.0)
    return jnp.sum(weights[..., None] * hidden.astype(jnp.float32), axis=1)
