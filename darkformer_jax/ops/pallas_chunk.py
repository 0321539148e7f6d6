"""What the TPU kernels share: a head's features and their gradients, and the arrays of one chunk."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from darkformer_jax.ops.pallas_blocks import LANES, LOG2E, Has


class OfHead(NamedTuple):
    """Gradients of one head's arrays."""

    directions: Float[Array, "d m"]  # of w M, transposed, over sqrt(scale)
    geometry: Float[Array, "r d"] | None  # of M, as far as it is in |M x|^2
    log_weights: Float[Array, "1 m"] | None

    def arrays(self) -> list[Array]:
        """Those that there are."""
        return [x for x in self if x is not None]

    def plus(self, other: "OfHead") -> "OfHead":
        return jax.tree.map(jnp.add, self, other)


class Head(NamedTuple):
    """References to one head's arrays, each [1, ...]: sqrt(scale) log2(e) w M, and M and the log weights if it has any.

    w M is one matrix, so that a query or key is multiplied once; |M x|^2 needs M besides.
    """

    directions: Any
    geometry: Any
    log_weights: Any
    scale: float

    def project(self, x: Float[Array, "n d"]) -> Float[Array, "n m"]:
        """log2(e) sqrt(scale) w . M x."""
        return dot(x, self.directions[0], (1, 1), x.dtype)

    def point(self, x: Float[Array, "n d"]) -> Float[Array, "n r"]:
        """M x, in float32."""
        return x.astype(jnp.float32) if self.geometry is None else dot(x, self.geometry[0], (1, 1), x.dtype)

    def half_norm(self, x: Float[Array, "n d"]) -> Float[Array, "n 1"]:
        """scale |M x|^2 / 2."""
        point = self.point(x)
        return 0.5 * self.scale * jnp.sum(point * point, axis=1, keepdims=True)

    def log_features(self, x: Float[Array, "n d"]) -> Float[Array, "n m"]:
        """`log_positive_features`."""
        logs = self.project(x) / LOG2E - self.half_norm(x)
        return logs if self.log_weights is None else logs + self.log_weights[0]

    def of_points(self, x: Float[Array, "n d"], of_logs: Float[Array, "n m"]) -> tuple[Float[Array, "n d"], OfHead]:
        """The gradients of queries or keys, and of the head's arrays, by that of their log features."""
        of_norm, of_geometry = self.of_norm(x, of_logs)
        of_head = OfHead(dot(x, of_logs, (0, 0), x.dtype), of_geometry, self.of_log_weights(of_logs))
        return self.of_projected(of_logs, x.dtype) + of_norm, of_head

    def of_projected(self, of_logs: Float[Array, "n m"], dtype: Any) -> Float[Array, "n d"]:
        """The part of the gradient of queries or keys that comes through w M."""
        return dot(of_logs, self.directions[0], (1, 0), dtype) / LOG2E

    def of_norm(
        self, x: Float[Array, "n d"], of_logs: Float[Array, "n m"]
    ) -> tuple[Float[Array, "n d"], Float[Array, "r d"] | None]:
        """The part that comes through `half_norm`, and `OfHead.geometry`."""
        of_point = -self.scale * jnp.sum(of_logs, axis=1, keepdims=True) * self.point(x)
        if self.geometry is None:
            return of_point, None
        return dot(of_point, self.geometry[0], (1, 0), x.dtype), dot(of_point, x, (0, 0), x.dtype)

    def of_log_weights(self, of_logs: Float[Array, "n m"]) -> Float[Array, "1 m"] | None:
        return None if self.log_weights is None else jnp.sum(of_logs, axis=0, keepdims=True)


class Decay(NamedTuple):
    """The running log decay of a chunk's tokens, in the two parts of a `RunningSum`.

    Each part is subtracted by itself; see there.
    """

    row: Float[Array, "2 c"]
    columns: tuple[Float[Array, "c lanes"], Float[Array, "c lanes"]]

    @classmethod
    def of(cls, row: Float[Array, "2 c"]) -> "Decay":
        return cls(row, (as_column(row[:1]), as_column(row[1:])))

    def since_start(self, rows: slice = slice(None)) -> Float[Array, "n lanes"]:
        """From the chunk's start to each token."""
        return self.columns[0][rows] + self.columns[1][rows]

    def pairs(self, rows: slice, stop: int) -> Float[Array, "n t"]:
        """From each of the first tokens, up to `stop`, to each of those in `rows`."""
        whole, rest = (lanes(column[rows], stop) for column in self.columns)
        return (whole - self.row[:1, :stop]) + (rest - self.row[1:, :stop])

    def to_end(self) -> Float[Array, "c lanes"]:
        """From each token to the chunk's end."""
        whole, rest = (part[:, -1:] for part in (self.row[:1], self.row[1:]))
        return (whole - self.columns[0]) + (rest - self.columns[1])

    @property
    def whole_chunk(self) -> Float[Array, "1 1"]:
        """From its start to its end."""
        return self.row[:1, -1:] + self.row[1:, -1:]


class ChunkRefs(NamedTuple):
    """References to a chunk's arrays."""

    q: Any  # [1, 1, g, c, d]
    k: Any  # [1, 1, c, d]
    v: Any
    column: Any  # [1, c, 1]: the segments
    row: Any  # [1, 1, c]
    decays: Any  # [1, 1, 2, c], or None

    def decay(self) -> Decay | None:
        return None if self.decays is None else Decay.of(self.decays[0, 0])


def take_refs(refs: Sequence[Any], scale: float, has: Has) -> tuple[Head, ChunkRefs, list]:
    """(the head, its chunk, the references that are left) of those to `Blocks.tokens` and `Blocks.per_head`."""
    q, k, v, column, row, *rest = refs
    decays = rest.pop(0) if has.decays else None
    directions = rest.pop(0)
    head = Head(directions, rest.pop(0) if has.geometry else None, rest.pop(0) if has.log_weights else None, scale)
    return head, ChunkRefs(q, k, v, column, row, decays), rest


class State(NamedTuple):
    """The far state of one head."""

    c: Float[Array, "1 m"]
    z: Float[Array, "1 m"]
    S: Float[Array, "dv m"]


class OfChunk(NamedTuple):
    """Gradients of a chunk's arrays and of the state before it, in float32."""

    q: Float[Array, "gc d"]
    k: Float[Array, "c d"]
    v: Float[Array, "c dv"]
    z: Float[Array, "1 m"]
    S: Float[Array, "dv m"]
    head: OfHead
    decays: Float[Array, "1 c"] | None


class Segments(NamedTuple):
    """Of the far state before a chunk, and the chunk's last (0: padding only)."""

    far: Any
    own: Any

    @property
    def same(self) -> Any:
        """Whether what is in the far state stays there."""
        return (self.own == self.far) | (self.own == 0)


def as_row(column: Float[Array, "c w"]) -> Float[Array, "1 c"]:
    """The numbers of a column, of which there may be several equal ones. Whole tiles are what a TPU transposes."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def lanes(column: Array, width: int) -> Array:
    """[n, LANES] of equal columns -> [n, width]."""
    whole = jnp.concatenate([column] * -(-width // LANES), axis=1) if width > LANES else column
    return whole[:, :width]


def wide(column: Float[Array, "n 1"]) -> Float[Array, "n lanes"]:
    """[n, LANES], as a reduction leaves it in registers: a slice of one column would have to be spread again."""
    return jnp.broadcast_to(column, (column.shape[0], LANES))


def as_column(row: Float[Array, "1 n"]) -> Float[Array, "n lanes"]:
    """`wide` of a row."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def row_sum(x: Float[Array, "n t"]) -> Float[Array, "n 1"]:
    """Of each row."""
    return jnp.sum(x, axis=1, keepdims=True)


def reciprocal(x: Float[Array, "n lanes"]) -> Float[Array, "n lanes"]:
    """1 / x of normal numbers, to float32's precision: a division would look for infinities and zeros."""
    guess = pl.reciprocal(x, approx=True)
    for _ in range(2):
        guess = guess * (2.0 - x * guess)
    return guess


def dot(a: Array, b: Array, axes: tuple[int, int], dtype: Any) -> Float[Array, "i j"]:
    """The product over one axis of each, operands rounded to `dtype`, in float32; as `ops.features.matmul`."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    contract = (((axes[0],), (axes[1],)), ((), ()))
    a, b = a.astype(dtype), b.astype(dtype)
    return jax.lax.dot_general(a, b, contract, precision=precision, preferred_element_type=jnp.float32)


def of_decay(
    of_keys: Float[Array, "1 c"], of_folded: Float[Array, "c 1"], kept: Float[Array, "1 m"]
) -> Float[Array, "1 c"]:
    """The gradient of the running decay G: -G_j is in what key j weighs, and the last G in the state; see ops/decay.py.

    of_keys, of_folded: of the logs of what each key weighs for the chunk's queries, and in the state after it.
    kept: of the log of what is left there of the state before, by features.
    """
    of_state = jnp.sum(of_folded, axis=0, keepdims=True) + jnp.sum(kept, axis=1, keepdims=True)
    is_last = jax.lax.broadcasted_iota(jnp.int32, of_keys.shape, 1) == of_keys.shape[1] - 1
    return jnp.where(is_last, of_state, 0.0) - of_keys - as_row(of_folded)


def of_denominator(
    weights: Float[Array, "n t"],
    by_key: Float[Array, "n t"],
    far_weights: Float[Array, "n m"],
    by_feature: Float[Array, "n m"],
) -> Float[Array, "n 1"]:
    """e D, from the very products that it is subtracted from: those of the rounded output would leave a remainder.

    What a row's keys get sums to zero, and values or keys with a mean of their own multiply what does not.
    """
    return row_sum(weights * by_key) + row_sum(far_weights * by_feature)
