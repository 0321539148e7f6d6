"""Computations on each token by itself, with arrays that all tokens share: every device does those of its own tokens."""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from darkformer_jax.distributed.sharding import RULES, constrain

Tokens = TypeVar("Tokens")
Shared = TypeVar("Shared")
Out = TypeVar("Out")
Sums = TypeVar("Sums")


def map_tokens(
    function: Callable[[Tokens, Shared], tuple[Out, Sums]], rows: tuple[int, int], tokens: Tokens, shared: Shared
) -> tuple[Out, Sums]:
    """`function(tokens, shared)` on the current mesh; without a mesh, a plain call.

    Args:
      function: it returns arrays of its tokens, and sums over them: matrices [vocab, embed].
      rows: the shape [b, n] of the batch.
      tokens: a tree of arrays [b, n, ...]. Each device gets its own rows and places.
      shared: a tree of arrays that every device gets whole, but for what `tensor` splits.

    Returns:
      Arrays [b, n, ...], split as the tokens are, and the sums over all devices, split over the width by `fsdp`. The
      devices' parts are added once, after `function`. Where the compiler splits the tokens, it adds up after every
      product.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(tokens, shared)
    names = [tuple(RULES[axis]) if fits else () for axis, fits in _fitting(rows, mesh).items()]
    axes = sum(names, ())

    def of_device(tokens: Tokens, shared: Shared) -> tuple[Out, Sums]:
        out, sums = function(tokens, jax.lax.pcast(shared, axes, to="varying"))
        return out, jax.tree.map(lambda part: constrain(jax.lax.psum(part, axes), "vocab", None), sums)

    split = P(*(entry or None for entry in names))
    mapped = jax.shard_map(of_device, in_specs=(split, P()), out_specs=(split, P()), axis_names=set(axes))
    out, sums = mapped(tokens, shared)
    return out, jax.tree.map(lambda whole: constrain(whole, "vocab", "embed"), sums)


def tokens_per_device(rows: tuple[int, int]) -> int:
    """How many tokens of a batch [b, n] one device has on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    count = rows[0] * rows[1]
    if mesh.empty:
        return count
    for axis, fits in _fitting(rows, mesh).items():
        count //= _ways(axis, mesh) if fits else 1
    return count


def vocab_per_device(vocab_size: int) -> int:
    """How many of a vocabulary's ids one device has on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return vocab_size if mesh.empty else -(-vocab_size // _ways("vocab", mesh))


def _fitting(rows: tuple[int, int], mesh: AbstractMesh) -> dict[str, bool]:
    """Whether the mesh divides each dimension of a batch; the compiler splits those that it does not."""
    return {axis: size % _ways(axis, mesh) == 0 for axis, size in zip(("batch", "sequence"), rows, strict=True)}


def _ways(axis: str, mesh: AbstractMesh) -> int:
    ways = 1
    for name in RULES[axis]:
        ways *= mesh.shape[name]
    return ways
