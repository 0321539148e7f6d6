"""What the forward and the backward TPU kernel share: their blocks of arrays, and what a chunk sees.

A program of the grid (B, Hkv, chunks) treats one chunk of one key/value head and all its query heads. Its queries are
rows [G C, ...], the group's heads one after another.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from darkformer_jax.errors import UserError
from darkformer_jax.ops.decay import RunningSum
from darkformer_jax.ops.features import RandomFeatures
from darkformer_jax.ops.linear import HEADROOM, LOG_FLOOR
from darkformer_jax.ops.state import NEG, FarState

LANES = 128
VMEM_BYTES = 48 * 2**20  # that a kernel may have: the backward one of many query heads needs more than the usual 16


class Sizes(NamedTuple):
    """What a compiled kernel depends on besides shapes."""

    scale: float
    chunk: int
    interpret: bool


class Inputs(NamedTuple):
    """What has gradients."""

    features: RandomFeatures
    far: FarState
    queries: Float[Array, "b n h g d"]
    keys: Float[Array, "b n h d"]
    values: Float[Array, "b n h dv"]
    decays: RunningSum | None  # [b, h, t], of whole chunks; each chunk's sum begins with its first token


class Has(NamedTuple):
    """Which arrays a call has, of those that it need not have."""

    decays: bool
    geometry: bool
    log_weights: bool


class Blocks:
    """How the arrays of a call are cut into blocks. Heads are in front of tokens, and whole chunks of them.

    Args:
      sizes, inputs: `Sizes` and `Inputs`, or those of `pallas_window`.
      last_first: whether the chunks come in reverse.
    """

    def __init__(self, sizes: Any, inputs: Any, *, last_first: bool) -> None:
        self.sizes, self.inputs = sizes, inputs
        self.batch, length, self.heads, self.group, self.dim = inputs.queries.shape
        self.value_dim, self.features = inputs.values.shape[-1], inputs.features.projections.shape[1]
        self.chunks = -(-length // sizes.chunk)
        self.length = self.chunks * sizes.chunk
        self.last_first = last_first

    def in_front(self, x: Float[Array, "b n *heads d"]) -> Float[Array, "b *heads t d"]:
        """[b, n, heads, d] -> [b, heads, tokens of whole chunks, d]."""
        return jnp.moveaxis(jnp.pad(x, [(0, 0), (0, self.length - x.shape[1])] + [(0, 0)] * (x.ndim - 2)), 1, -2)

    def back(self, x: Float[Array, "b *heads t d"], length: int) -> Float[Array, "b n *heads d"]:
        """The inverse."""
        return jnp.moveaxis(x, -2, 1)[:, :length]

    @property
    def per_head(self) -> list[Array]:
        """w, and M and the log weights if there are any."""
        w, geometry, log_weights = self.inputs.features
        dtype = self.inputs.queries.dtype
        arrays = [w.astype(dtype)]
        arrays += [] if geometry is None else [geometry.astype(dtype)]
        return arrays + ([] if log_weights is None else [log_weights.astype(jnp.float32)[:, None]])

    @property
    def static(self) -> dict[str, Any]:
        """What `body` gets besides references."""
        _, geometry, log_weights = self.inputs.features
        has = Has(self.inputs.decays is not None, geometry is not None, log_weights is not None)
        return {"scale": self.sizes.scale, "has": has}

    @property
    def state_shapes(self) -> list[tuple[int, int]]:
        """c, z and S^T of one head."""
        return [(1, self.features), (1, self.features), (self.value_dim, self.features)]

    def tokens(self, segments: Int[Array, "b n"]) -> list[tuple[Array, pl.BlockSpec]]:
        """q, k, v, the segments, as a column and as a row, and the decays likewise, with their blocks."""
        q, k, v = map(self.in_front, self.inputs[2:5])
        column = pl.BlockSpec((1, self.sizes.chunk, 1), lambda b, h, n, *_: (b, self._place(n), 0))
        row = pl.BlockSpec((1, 1, self.sizes.chunk), lambda b, h, n, *_: (b, 0, self._place(n)))
        return [
            (q, self.of_queries(self.dim)),
            (k, self.of_keys(self.dim)),
            (v, self.of_keys(self.value_dim)),
            (segments[:, :, None], column),
            (segments[:, None, :], row),
            *self._decays(),
        ]

    def _decays(self) -> list[tuple[Array, pl.BlockSpec]]:
        if self.inputs.decays is None:
            return []
        whole, rest, _ = self.inputs.decays
        row = jnp.stack([whole, rest], axis=2)
        return [(jnp.swapaxes(row, 2, 3), self.of_keys(2)), (row, self.of_keys_in_a_row(2))]

    def of_queries(self, width: int) -> pl.BlockSpec:
        shape = (1, 1, self.group, self.sizes.chunk, width)
        return pl.BlockSpec(shape, lambda b, h, n, *_: (b, h, 0, self._place(n), 0))

    def of_keys(self, width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, self.sizes.chunk, width), lambda b, h, n, *_: (b, h, self._place(n), 0))

    def of_keys_in_a_row(self, height: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, height, self.sizes.chunk), lambda b, h, n, *_: (b, h, 0, self._place(n)))

    def of_chunk(self, shape: tuple[int, ...]) -> pl.BlockSpec:
        """Of an array [b, h, chunks, *shape]."""
        return pl.BlockSpec((1, 1, 1, *shape), lambda b, h, n, *_: (b, h, self._place(n), 0, 0))

    def of_row(self, shape: tuple[int, ...]) -> pl.BlockSpec:
        """Of an array [b, h, *shape], which stays while the chunks pass."""
        return pl.BlockSpec((1, 1, *shape), lambda b, h, n, *_: (b, h, *len(shape) * (0,)))

    def of_head(self, shape: tuple[int, ...]) -> pl.BlockSpec:
        """Of an array [h, *shape]."""
        return pl.BlockSpec((1, *shape), lambda b, h, n, *_: (h, *len(shape) * (0,)))

    def _place(self, n: Any) -> Any:
        return self.chunks - 1 - n if self.last_first else n

    def call(
        self,
        body: Callable[..., None],
        scalars: Sequence[Array],
        inputs: Sequence[tuple[Array, pl.BlockSpec]],
        outputs: Sequence[tuple[tuple[int, ...], Any, pl.BlockSpec]],
        scratch: Sequence[tuple[int, ...]],
    ) -> Any:
        """`body` for every chunk.

        Args:
          scalars: [b, chunks]. `body` gets them flat: of two axes, a TPU's scalar memory takes 128 numbers per row.
          inputs: arrays with blocks.
          outputs: shapes, dtypes and blocks.
          scratch: shapes.
        """
        kind = jax.typeof(self.inputs.keys).manual_axis_type
        grid = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(self.batch, self.heads, self.chunks),
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, _, spec in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        )
        # XLA computes a kernel's steps, or within a shard_map, whose types it does not know there, a simulated TPU.
        interpreter: Any = pltpu.InterpretParams() if kind.varying else True
        kernel = pl.pallas_call(
            functools.partial(body, **self.static),
            grid_spec=grid,
            out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind) for shape, dtype, _ in outputs],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
            ),
            interpret=interpreter if self.sizes.interpret else False,
        )
        once = jax.custom_jvp(kernel)
        once.defjvp(_refuse_derivatives)
        with jax.enable_x64(False):  # or the kernel's constants would be float64, which a TPU lacks
            return once(*(x.ravel() for x in scalars), *(x for x, _ in inputs))


def _refuse_derivatives(*_: Any) -> Any:
    """Of a kernel: those of attention, which has another kernel for them, are asked for a second time."""
    raise UserError("backend = 'pallas' has first derivatives only: use backend = 'scan'")


def segments_of_chunks(
    segments: Int[Array, "b n"], first: Int[Array, "b"], chunk: int
) -> tuple[Int[Array, "b c"], Int[Array, "b c"], Int[Array, "b"]]:
    """Per chunk, its last segment (0: padding only) and that of the far state before it; and the last far state's."""
    of_chunk = last_segments(segments, chunk)
    return of_chunk, *held_segments(of_chunk, first)


def last_segments(segments: Int[Array, "b n"], chunk: int) -> Int[Array, "b c"]:
    """Each chunk's last segment; 0 where it is padding only."""
    ids = segments.reshape(segments.shape[0], -1, chunk)
    places = jnp.where(ids != 0, jnp.arange(chunk, dtype=jnp.int32)[None, None], -1)
    last = jnp.argmax(places, axis=-1, keepdims=True)  # the first one where all are padding, which is 0
    return jnp.take_along_axis(ids, last, axis=-1)[..., 0]


def held_segments(of_chunk: Int[Array, "b c"], first: Int[Array, "b"]) -> tuple[Int[Array, "b c"], Int[Array, "b"]]:
    """The far state's segment before each chunk, and after the last: the newest that entered it, `first` before any."""
    known = jnp.concatenate([first[:, None], of_chunk], axis=1)
    newest = jax.lax.cummax(jnp.where(known != 0, jnp.arange(known.shape[1], dtype=jnp.int32)[None], 0), axis=1)
    held = jnp.take_along_axis(known, newest, axis=1)
    return held[:, :-1], held[:, -1]


class Head(NamedTuple):
    """References to w, M and log weights of one head, each [1, ...]."""

    w: Any
    geometry: Any
    log_weights: Any
    scale: float

    def point(self, x: Float[Array, "n d"]) -> Float[Array, "n r"]:
        """M x, in x's dtype."""
        return x if self.geometry is None else dot(x, self.geometry[0], (1, 1), x.dtype).astype(x.dtype)

    def log_features(self, x: Float[Array, "n d"]) -> Float[Array, "n m"]:
        """`log_positive_features`."""
        point = self.point(x)
        projected = dot(point, self.w[0], (1, 1), x.dtype)
        point = point.astype(jnp.float32)
        logs = self.scale**0.5 * projected - 0.5 * self.scale * jnp.sum(point * point, axis=1, keepdims=True)
        return logs if self.log_weights is None else logs + self.log_weights[0]


class Decay(NamedTuple):
    """Log decays within a chunk: from its start to each token, from token j to token i, and from each to its end."""

    since_start: Float[Array, "c 1"]
    pairs: Float[Array, "c c"]
    to_end: Float[Array, "c 1"]
    whole_chunk: Float[Array, "1 1"]

    @classmethod
    def of(cls, column: Float[Array, "c 2"], row: Float[Array, "2 c"]) -> "Decay":
        """Of the two parts of a `RunningSum`, each of which is subtracted by itself; see there."""
        difference = lambda a, b: (a[0] - b[0]) + (a[1] - b[1])
        column_parts, row_parts = (column[:, :1], column[:, 1:]), (row[:1], row[1:])
        end = [part[:, -1:] for part in row_parts]
        return cls(
            column_parts[0] + column_parts[1],
            difference(column_parts, row_parts),
            difference(end, column_parts),
            end[0] + end[1],
        )


class Chunk(NamedTuple):
    """A chunk's own arrays."""

    q: Float[Array, "gc d"]
    k: Float[Array, "c d"]
    v: Float[Array, "c dv"]
    column: Int[Array, "c 1"]  # the segments
    row: Int[Array, "1 c"]
    log_q: Float[Array, "gc m"]
    log_k: Float[Array, "c m"]
    decay: Decay | None


def take_refs(refs: Sequence[Any], scale: float, has: Has) -> tuple[Head, Chunk, list]:
    """(the head, its chunk, the references that are left) of those to `Blocks.tokens` and `Blocks.per_head`."""
    q, k, v, column, row, *rest = refs
    decay = Decay.of(rest.pop(0)[0, 0], rest.pop(0)[0, 0]) if has.decays else None
    w = rest.pop(0)
    head = Head(w, rest.pop(0) if has.geometry else None, rest.pop(0) if has.log_weights else None, scale)
    queries = q[0, 0].reshape(-1, q.shape[-1])
    log_q, log_k = head.log_features(queries), head.log_features(k[0, 0])
    return head, Chunk(queries, k[0, 0], v[0, 0], column[0], row[0], log_q, log_k, decay), rest


class Seen(NamedTuple):
    """What the queries see. weights: exp(s - r), with r the largest of a row; far_weights: exp(a - r).

    s = log P + lift, where P is the product of the two sides' features, each scaled to a maximum of e^HEADROOM.
    """

    weights: Float[Array, "gc c"]
    far_weights: Float[Array, "gc m"]
    denominator: Float[Array, "gc 1"]  # 1 where nothing is seen
    visible: Bool[Array, "gc c"]
    product: Float[Array, "gc c"]  # P
    lift: Float[Array, "gc c"]  # in units of e^-r: log(weights / P)
    features_q: Float[Array, "gc m"]
    features_k: Float[Array, "c m"]


def look(chunk: Chunk, c: Float[Array, "1 m"], z: Float[Array, "1 m"], far_segment: Any) -> Seen:
    """`feature_scores`, `read_far` and the weights of `weighted_sums`."""
    size, rows = chunk.column.shape[0], chunk.log_q.shape[0]
    places = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (size, size), axis)
    own = (chunk.column == chunk.row) & (chunk.row != 0) & (places(0) >= places(1))
    of_group = lambda x: jnp.broadcast_to(x[None], (rows // size, size, size)).reshape(rows, size)
    visible = of_group(own.astype(jnp.int32)) != 0

    headroom = min(HEADROOM, 0.5 * (80.0 - math.log(chunk.log_q.shape[-1])))
    q_max, k_max = (jnp.max(x, axis=1, keepdims=True) for x in (chunk.log_q, chunk.log_k))
    features_q, features_k = jnp.exp(chunk.log_q - (q_max - headroom)), jnp.exp(chunk.log_k - (k_max - headroom))
    product = dot(features_q, features_k, (1, 1), chunk.v.dtype)
    lift = q_max + as_row(k_max) - 2 * headroom
    if chunk.decay is not None:
        lift = lift + of_group(chunk.decay.pairs)
    scores = jnp.where(visible, jnp.log(jnp.maximum(product, math.exp(LOG_FLOOR))) + lift, NEG)

    reads = ((chunk.column == far_segment) & (chunk.column != 0))[None]
    far_scores = (chunk.log_q + c).reshape(rows // size, size, -1)
    if chunk.decay is not None:
        far_scores = far_scores + chunk.decay.since_start[None]
    far_scores = jnp.where(reads, far_scores, NEG).reshape(chunk.log_q.shape)
    largest = jnp.maximum(jnp.max(far_scores, axis=1, keepdims=True), jnp.max(scores, axis=1, keepdims=True))
    shift = jnp.where(largest > 0.5 * NEG, largest, 0.0)
    far_weights, weights = jnp.exp(far_scores - shift), jnp.exp(scores - shift)
    denominator = jnp.sum(far_weights * z, axis=1, keepdims=True) + jnp.sum(weights, axis=1, keepdims=True)
    denominator = jnp.where(denominator > 0, denominator, 1.0)
    return Seen(weights, far_weights, denominator, visible, product, lift - shift, features_q, features_k)


class Folded(NamedTuple):
    """How a chunk enters the state, z <- keep z + sum_j weights_j and S likewise."""

    key_max: Float[Array, "1 m"]
    keep: Float[Array, "1 m"]
    weights: Float[Array, "c m"]  # exp(l(k_j) - key_max); 0 for keys of other segments than the last


def fold_weights(
    column: Int[Array, "c 1"],
    log_k: Float[Array, "c m"],
    decay: Decay | None,
    c: Float[Array, "1 m"],
    far_segment: Any,
    own_segment: Any,
) -> Folded:
    """`fold` and `merge_far`, without the sums. column: the segments of the keys; 0 stays out."""
    to_far = (column == own_segment) & (column != 0)
    same = (own_segment == far_segment) | (own_segment == 0)
    old_max = jnp.where(same, c, NEG)
    decayed = old_max
    if decay is not None:
        decayed, log_k = old_max + decay.whole_chunk, log_k + decay.to_end
    key_max = jnp.maximum(decayed, jnp.max(jnp.where(to_far, log_k, NEG), axis=0, keepdims=True))
    gap = old_max - key_max if decay is None else (old_max - key_max) + decay.whole_chunk
    keep = jnp.where(same, jnp.exp(gap), 0.0)
    return Folded(key_max, keep, jnp.where(to_far, jnp.exp(jnp.where(to_far, log_k - key_max, NEG)), 0.0))


def as_row(column: Float[Array, "c 1"]) -> Float[Array, "1 c"]:
    """The same numbers. Whole tiles are what a TPU transposes."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def dot(a: Array, b: Array, axes: tuple[int, int], dtype: Any) -> Float[Array, "i j"]:
    """The product over one axis of each, operands rounded to `dtype`, in float32; as `ops.features.matmul`."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    contract = (((axes[0],), (axes[1],)), ((), ()))
    a, b = a.astype(dtype), b.astype(dtype)
    return jax.lax.dot_general(a, b, contract, precision=precision, preferred_element_type=jnp.float32)
