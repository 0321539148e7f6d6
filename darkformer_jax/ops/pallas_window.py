"""The hybrid as TPU kernels (Pallas): a window with an exact kernel, features beyond it.

A program of the grid (B, Hkv, chunks) treats one chunk of one key/value head and all its query heads. It reads the far
state and, one by one, the keys of the window before the chunk and of the chunk; then the window's oldest chunk enters
the far state, which stays in VMEM from chunk to chunk. Keys lie behind those of the window before the first token, so
that chunk n sees the blocks n to n + window / C, and block n leaves it. Sinks come as more keys, a block per chunk.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from darkformer_jax.ops.features import RandomFeatures
from darkformer_jax.ops.pallas_blocks import Blocks, held_segments
from darkformer_jax.ops.pallas_chunk import Head, Segments, dot
from darkformer_jax.ops.pallas_forward import run_forward
from darkformer_jax.ops.pallas_safe import fold_weights
from darkformer_jax.ops.state import NEG, FarState


class Sizes(NamedTuple):
    """What a compiled kernel depends on besides shapes."""

    scale: float
    chunk: int
    window: int
    exact_has_geometry: bool  # whether M is in the window's kernel, too
    interpret: bool


class Inputs(NamedTuple):
    """What has gradients. Whole chunks; `keys` and `values` have `window` tokens more, in front."""

    features: RandomFeatures
    far: FarState
    queries: Float[Array, "b n h g d"]
    keys: Float[Array, "b t h d"]
    values: Float[Array, "b t h dv"]
    log_gain: Float[Array, "h g"] | None
    sink_keys: Float[Array, "b chunks h s d"] | None
    sink_values: Float[Array, "b chunks h s dv"] | None


class Places(NamedTuple):
    """Who sees whom. Nothing here has a gradient."""

    queries: Int[Array, "b n"]  # segments
    keys: Int[Array, "b chunks t"]  # of all that a chunk sees one by one: the window, the chunk, sinks
    to_far: Int[Array, "b n"]  # the keys' segments, 0 where a key that leaves the window does not enter the far state
    leaving: Int[Array, "b chunks"]  # the last segment of the block that leaves the window; 0: nothing enters
    bound: Float[Array, "b n"] | None  # `log_far_weight` of the queries


class States(NamedTuple):
    """The far state before each chunk, for the backward pass. S in v's dtype: products take no more of it."""

    c: Float[Array, "b h chunks 1 m"]
    z: Float[Array, "b h chunks 1 m"]
    S: Float[Array, "b h chunks dv m"]


class Has(NamedTuple):
    """Which arrays a call has, of those that it need not have."""

    geometry: bool
    log_weights: bool
    gain: bool
    bound: bool
    sinks: bool


class WindowBlocks(Blocks):
    """How the arrays of a call are cut into blocks."""

    def __init__(self, sizes: Sizes, inputs: Inputs, places: Places, *, last_first: bool) -> None:
        super().__init__(sizes, inputs, last_first=last_first)
        self.places, self.near = places, sizes.window // sizes.chunk + 1

    @property
    def static(self) -> dict[str, Any]:
        _, geometry, log_weights = self.inputs.features
        others = (self.inputs.log_gain, self.places.bound, self.inputs.sink_keys)
        has = Has(*(x is not None for x in (geometry, log_weights, *others)))
        return {"sizes": self.sizes, "has": has}

    @property
    def scalars(self) -> tuple[Array, Array]:
        """Per chunk, the far state's segment, and that of the block that leaves the window."""
        leaving = self.places.leaving
        return held_segments(leaving, self.inputs.far.segment)[0], leaving

    def near_tokens(self) -> list[tuple[Array, pl.BlockSpec]]:
        """q, the window's and the chunk's keys and values, one block after another, and what `Places` has of them."""
        places, size = self.places, self.sizes.chunk
        q, k, v = (jnp.moveaxis(x, 1, -2) for x in (self.inputs.queries, self.inputs.keys, self.inputs.values))
        column = pl.BlockSpec((1, size, 1), lambda b, h, n, *_: (b, self._place(n), 0))
        row = pl.BlockSpec((1, 1, 1, places.keys.shape[2]), lambda b, h, n, *_: (b, self._place(n), 0, 0))
        keys = lambda j, width: pl.BlockSpec((1, 1, size, width), lambda b, h, n, *_: (b, h, self._place(n) + j, 0))
        blocks, sinks = range(self.near), (self.inputs.sink_keys, self.inputs.sink_values)
        return [
            (q, self.of_queries(self.dim)),
            *((k, keys(j, self.dim)) for j in blocks),
            *((v, keys(j, self.value_dim)) for j in blocks),
            (places.queries[:, :, None], column),
            (places.keys[:, :, None], row),
            (places.to_far[:, :, None], column),
            *([] if places.bound is None else [(places.bound[:, :, None], column)]),
            *((jnp.swapaxes(x, 1, 2), self.of_chunk((x.shape[3], x.shape[4]))) for x in sinks if x is not None),
            *((x, self.of_head(x.shape[1:])) for x in self.per_head),
        ]

    @property
    def per_head(self) -> list[Array]:
        gain = self.inputs.log_gain
        return super().per_head + ([] if gain is None else [gain.astype(jnp.float32)[:, :, None, None]])


class View(NamedTuple):
    """A chunk's queries and all that they see one by one."""

    head: Head
    gain: Float[Array, "g 1 1"] | None
    q: Float[Array, "gc d"]
    keys: Float[Array, "t d"]  # of the window, of the chunk, sinks
    values: Float[Array, "t dv"]
    column: Int[Array, "c 1"]  # segments of the queries
    row: Int[Array, "1 t"]  # and of the keys
    to_far: Int[Array, "c 1"]
    bound: Float[Array, "c 1"] | None
    log_q: Float[Array, "gc m"]
    log_k: Float[Array, "c m"]  # of the block that leaves the window


def take_refs(refs: Any, sizes: Sizes, has: Has) -> tuple[View, list]:
    """(the chunk, the references that are left) of those to `near_tokens`."""
    rest, near = list(refs), sizes.window // sizes.chunk + 1
    take = lambda count: [rest.pop(0) for _ in range(count)]
    (q,), k, v, (column, row, to_far) = (take(count) for count in (1, near, near, 3))
    bound = rest.pop(0)[0] if has.bound else None
    sinks = take(2) if has.sinks else []
    directions = rest.pop(0)
    head = Head(
        directions, rest.pop(0) if has.geometry else None, rest.pop(0) if has.log_weights else None, sizes.scale
    )
    gain = rest.pop(0)[0] if has.gain else None
    queries = q[0, 0].reshape(-1, q.shape[-1])
    keys = jnp.concatenate([*(ref[0, 0] for ref in k), *(ref[0, 0, 0] for ref in sinks[:1])], axis=0)
    values = jnp.concatenate([*(ref[0, 0] for ref in v), *(ref[0, 0, 0] for ref in sinks[1:])], axis=0)
    log_q, log_k = head.log_features(queries), head.log_features(k[0][0, 0])
    return View(head, gain, queries, keys, values, column[0], row[0, 0], to_far[0], bound, log_q, log_k), rest


class Seen(NamedTuple):
    """What the queries see: exp(s - r) and exp(a - r), with r the largest of a row."""

    weights: Float[Array, "gc t"]
    far_weights: Float[Array, "gc m"]
    denominator: Float[Array, "gc 1"]  # 1 where nothing is seen


def look(view: View, sizes: Sizes, c: Float[Array, "1 m"], z: Float[Array, "1 m"], far_segment: Any) -> Seen:
    """`exact_sums`, and the weights of `weighted_sums`."""
    size, near, (rows, features) = view.column.shape[0], view.row.shape[1], view.log_q.shape
    place = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (size, near), axis)
    past = (place(0) + sizes.window >= place(1)) | (place(1) >= sizes.window + size)  # and all sinks
    own = (view.column == view.row) & (view.row != 0) & past
    visible = jnp.broadcast_to(own.astype(jnp.int32)[None], (rows // size, size, near)).reshape(rows, near) != 0
    q, k = exact_points(view, sizes)
    scores = sizes.scale * dot(q, k, (1, 1), q.dtype) + math.log(features)
    scores = jnp.where(visible, scores, NEG)

    far_scores = (view.log_q + c).reshape(rows // size, size, features)
    far_scores = far_scores if view.gain is None else far_scores + view.gain
    far_scores = far_scores if view.bound is None else far_scores + view.bound[None]
    reads = ((view.column == far_segment) & (view.column != 0))[None]
    far_scores = jnp.where(reads, far_scores, NEG).reshape(rows, features)
    largest = jnp.maximum(jnp.max(far_scores, axis=1, keepdims=True), jnp.max(scores, axis=1, keepdims=True))
    shift = jnp.where(largest > 0.5 * NEG, largest, 0.0)
    far_weights, weights = jnp.exp(far_scores - shift), jnp.exp(scores - shift)
    denominator = jnp.sum(far_weights * z, axis=1, keepdims=True) + jnp.sum(weights, axis=1, keepdims=True)
    denominator = jnp.where(denominator > 0, denominator, 1.0)
    return Seen(weights, far_weights, denominator)


def exact_points(view: View, sizes: Sizes) -> tuple[Float[Array, "gc r"], Float[Array, "t r"]]:
    """What the window's kernel multiplies."""
    if not sizes.exact_has_geometry:
        return view.q, view.keys
    dtype = view.q.dtype
    return view.head.point(view.q).astype(dtype), view.head.point(view.keys).astype(dtype)


def forward(
    sizes: Sizes, inputs: Inputs, places: Places, *, save: bool
) -> tuple[FarState, Float[Array, "b n h g dv"], States | None]:
    """(the far state after the tokens, out in v's dtype, what the backward pass needs if it is to come)."""
    blocks = WindowBlocks(sizes, inputs, places, last_first=False)
    after = held_segments(places.leaving, inputs.far.segment)[1]
    dtypes = (jnp.float32, jnp.float32, inputs.values.dtype)
    saved = [blocks.output_of_chunks(*x) for x in zip(blocks.state_shapes, dtypes, strict=True)] if save else []
    arrays = blocks.near_tokens()
    far, out, states = run_forward(blocks, _chunk, blocks.scalars, arrays, after, blocks.state_shapes, saved)
    return far, jnp.moveaxis(out, -2, 1), States(*states) if save else None


def _chunk(before: Any, leaving: Any, *refs: Any, sizes: Sizes, has: Has) -> None:
    """Reads the far state and the near keys, then folds the oldest block in; `chunk_window` for one program."""
    view, rest = take_refs(refs, sizes, has)
    c_in, z_in, S_in, c_out, z_out, S_out, out_ref, *saved, c, z, S = rest
    index = pl.program_id(2)
    place = pl.program_id(0) * pl.num_programs(2) + index
    far_segment, own_segment = before[place], leaving[place]

    @pl.when(index == 0)
    def _start() -> None:
        c[...], z[...], S[...] = c_in[0, 0], z_in[0, 0], S_in[0, 0]

    for ref, x in zip(saved, (c, z, S), strict=False):
        ref[0, 0, 0] = x[...].astype(ref.dtype)
    seen, dtype = look(view, sizes, c[...], z[...], far_segment), view.values.dtype
    numerator = dot(seen.far_weights, S[...], (1, 1), dtype) + dot(seen.weights, view.values, (1, 0), dtype)
    out_ref[0, 0] = (numerator / seen.denominator).reshape(out_ref.shape[2:]).astype(out_ref.dtype)

    folded = fold_weights(view.to_far, view.log_k, None, c[...], Segments(far_segment, own_segment))
    c[...] = folded.key_max
    z[...] = z[...] * folded.keep + jnp.sum(folded.weights, axis=0, keepdims=True)
    S[...] = S[...] * folded.keep + dot(view.values[: sizes.chunk], folded.weights, (0, 0), dtype)

    @pl.when(index == pl.num_programs(2) - 1)
    def _end() -> None:
        c_out[0, 0], z_out[0, 0], S_out[0, 0] = c[...], z[...], S[...]
