"""Rotary position embeddings."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rope(x: Float[Array, "b n h d"], positions: Int[Array, "b n"], theta: float = 10000.0) -> Float[Array, "b n h d"]:
    """Rotates the pairs (x_i, x_{i + d/2}) by the angle positions * theta^(-2i/d), in float32.

    The half-split layout of Hugging Face's Llama and Gemma. Su et al., arXiv 2104.09864.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies[None, None, None, :]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
