"""Blocks of query rows, which the TPU kernels take through each stage side by side.

The compiler has independent work then while it waits for a result, and the keys that no query of a block sees cost
nothing.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from darkformer_jax.ops.pallas_blocks import LANES
from darkformer_jax.ops.pallas_chunk import Head, OfHead, dot

SIDE_BY_SIDE = 2


class Place(NamedTuple):
    """A block of queries: of which head of the group, and which rows of the chunk. They see no key after `stop`."""

    head: int
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


def places(group: int, size: int) -> list[Place]:
    """All of a chunk, one head of the group after another."""
    height = LANES if size % LANES == 0 else size
    return [Place(head, start, start + height) for head in range(group) for start in range(0, size, height)]


class Sums:
    """Sums over blocks of queries, for each block of keys that they see; keys lie along `axis`."""

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._parts: dict[int, Array] = {}

    def add(self, place: Place, x: Array) -> None:
        """x: of the keys up to `place.stop`, or of more, in whole heights of a block."""
        height = place.stop - place.start
        for start in range(0, x.shape[self._axis], height):
            part = jax.lax.slice_in_dim(x, start, start + height, axis=self._axis)
            self._parts[start] = self._parts[start] + part if start in self._parts else part

    @property
    def is_empty(self) -> bool:
        return not self._parts

    def all(self) -> Array:
        return jnp.concatenate([self._parts[start] for start in sorted(self._parts)], axis=self._axis)


class Learned:
    """Gradients of a head's arrays by those of log features, several at once: the matrix unit sums up products."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._pending: list[tuple[Array, Array]] = []
        self._directions: list[Array] = []
        self._log_weights: list[Array] = []
        self._geometry: list[Array] = []

    def add_geometry(self, of_geometry: Float[Array, "r d"] | None) -> None:
        """None: the head has none."""
        self._geometry += [] if of_geometry is None else [of_geometry]

    def add(self, x: Float[Array, "n d"], of_logs: Float[Array, "n m"]) -> None:
        """x: queries or keys."""
        self._pending.append((x, of_logs.astype(x.dtype)))
        if (of_log_weights := self._head.of_log_weights(of_logs)) is not None:
            self._log_weights.append(of_log_weights)

    def sum_up(self) -> None:
        """Needs no more of what was added: of many query heads, it would fill much VMEM."""
        if self._pending:
            x, of_logs = (jnp.concatenate(parts, axis=0) for parts in zip(*self._pending, strict=True))
            self._directions.append(dot(x, of_logs, (0, 0), x.dtype))
            self._pending = []

    def all(self) -> OfHead:
        """The sums."""
        self.sum_up()
        total: Callable[[list[Array]], Any] = lambda parts: functools.reduce(jnp.add, parts) if parts else None
        return OfHead(total(self._directions), total(self._geometry), total(self._log_weights))


def side_by_side(blocks: Sequence[Place]) -> list[Sequence[Place]]:
    """Blocks that go through the stages together."""
    return [blocks[first : first + SIDE_BY_SIDE] for first in range(0, len(blocks), SIDE_BY_SIDE)]


def through(blocks: Sequence[Place], *stages: Callable[..., Any]) -> list[Any]:
    """Each stage in turn, for all blocks; a stage gets what the one before it returned."""
    arguments: list[Any] = [(place,) for place in blocks]
    for stage in stages:
        arguments = [stage(*given) for given in arguments]
    return arguments
