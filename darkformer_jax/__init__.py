"""DARKFormer in JAX: linear attention with a learned geometry, and everything to train and convert models with it."""

from darkformer_jax.ops.dark_attention import dark_attention
from darkformer_jax.ops.linear_attention import linear_attention
from darkformer_jax.ops.projections import draw_projections

__all__ = ["dark_attention", "draw_projections", "linear_attention"]
