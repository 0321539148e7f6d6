"""Computations on each token by itself, with matrices that all tokens share: each device does its own tokens."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from darkformer_jax.distributed.gather import scattered
from darkformer_jax.distributed.sharding import RULES, axes_that_split, axis_size, constrain

Tokens = TypeVar("Tokens")
Shared = TypeVar("Shared")
Out = TypeVar("Out")
Sums = TypeVar("Sums")


def map_tokens(
    function: Callable[[Tokens, Shared], tuple[Out, Sums]], rows: tuple[int, ...], tokens: Tokens, shared: Shared
) -> tuple[Out, Sums]:
    """`function(tokens, shared)` on the current mesh.

    Without a mesh, and where it does not divide the batch, this is a plain call, which the compiler splits. Elsewhere
    the sums of the devices are added once, after `function`. The compiler would add them up after every product. Where
    `fsdp` or `context` splits the matrix, they are scattered at once: the whole sum would be a second matrix in memory.

    Args:
      function: it returns arrays of its tokens, and sums over them: matrices [vocab, embed].
      rows: the shape [b, n] of the batch.
      tokens: a tree of arrays [b, n, ...]. Each device gets its own rows and places.
      shared: a tree of matrices [vocab, ...] that every device gets whole, but for what `tensor` splits.

    Returns:
      Arrays [b, n, ...], split as the tokens are, and the sums, split as a matrix of parameters is.
    """
    if _ways(rows) == (1, 1):
        return function(tokens, shared)
    axes = (*RULES["batch"], *RULES["sequence"])
    split_by = lambda matrix: axes_that_split("embed", matrix.shape[1])

    def add(part: Array) -> Array:
        scattered_over = split_by(part)
        others = tuple(name for name in axes if name not in scattered_over)
        return constrain(jax.lax.psum(scattered(part.T, scattered_over).T, others), "vocab", None)

    def of_device(tokens: Tokens, shared: Shared) -> tuple[Out, Sums]:
        out, sums = function(tokens, jax.lax.pcast(shared, axes, to="varying"))
        return out, jax.tree.map(add, sums)

    split = P(RULES["batch"], RULES["sequence"])
    _, sums = jax.eval_shape(function, tokens, shared)
    of_sums = jax.tree.map(lambda matrix: P(None, split_by(matrix) or None), sums)
    mapped = jax.shard_map(of_device, in_specs=(split, P()), out_specs=(split, of_sums), axis_names=set(axes))
    out, sums = mapped(tokens, shared)
    return out, jax.tree.map(lambda whole: constrain(whole, "vocab", "embed"), sums)


def tokens_per_device(rows: tuple[int, ...]) -> int:
    """How many tokens of a batch [b, n] `map_tokens` gives to one device."""
    return rows[0] * rows[1] // int(np.prod(_ways(rows)))


def vocab_per_device(vocab_size: int) -> int:
    """How many of a vocabulary's ids one device has on the current mesh."""
    return -(-vocab_size // axis_size("vocab"))


def _ways(rows: tuple[int, ...]) -> tuple[int, int]:
    """Among how many devices the mesh splits a batch's rows and its places; (1, 1) where it does not divide both."""
    ways = axis_size("batch"), axis_size("sequence")
    return ways if rows[0] % ways[0] == 0 and rows[1] % ways[1] == 0 else (1, 1)
