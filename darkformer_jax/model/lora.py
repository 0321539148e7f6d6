"""Low-rank updates (LoRA, arXiv 2106.09685): y = x W + (x A) B, of the attention's projections to q, k, v and out.

The scale of the update is 1 (alpha = rank). A starts as N(0, 1 / inputs) and B as zero, so at the start the updates
change nothing. Once they are merged into W + A B, they cost nothing.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

LORA_A, LORA_B = "lora_A", "lora_B"


def is_lora(path: Sequence[str]) -> bool:
    """Whether the parameter at a path is a factor of a low-rank update."""
    return path[-1] in (LORA_A, LORA_B)


def merge_lora(params: dict) -> dict:
    """The same model with its low-rank updates merged: W + A B in place of W, in W's dtype, and neither A nor B.

    Args:
      params: parameters of a `Network`, or any subtree that holds W, A and B together.
    """
    flat = flatten_dict(params)
    merged = {path: leaf for path, leaf in flat.items() if not is_lora(path)}
    for path, A in flat.items():
        if path[-1] == LORA_A:
            kernel = (*path[:-1], "kernel")
            merged[kernel] = _merge(flat[kernel], A, flat[(*path[:-1], LORA_B)])
    new: dict = unflatten_dict(merged)
    return new


def _merge(kernel: Float[Array, "l ..."], A: Float[Array, "l ... r"], B: Float[Array, "l r ..."]) -> Array:
    layers, rank = B.shape[:2]
    wide = (x.astype(jnp.float32) for x in (A.reshape(layers, -1, rank), B.reshape(layers, rank, -1)))
    update = jnp.matmul(*wide, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + update.reshape(kernel.shape)).astype(kernel.dtype)
