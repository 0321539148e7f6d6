"""The hybrid as TPU kernels (Pallas): a window with an exact kernel, features beyond it.

A program of the grid (B, Hkv, chunks) treats one chunk of one key/value head and all its query heads. It reads the far
state and, one by one, the keys of the window before the chunk and of the chunk; then the window's oldest chunk enters
the far state, which stays in VMEM from chunk to chunk. Keys lie behind those of the window before the first token, so
that chunk n sees the blocks n to n + window / C, and block n leaves it. Sinks come as more keys, a block per chunk.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from darkformer_jax.ops.features import RandomFeatures
from darkformer_jax.ops.pallas_blocks import LANES, LOG2E, Blocks, held_segments
from darkformer_jax.ops.pallas_chunk import Head, Segments, State, as_row, dot, lanes, reciprocal, row_sum, wide
from darkformer_jax.ops.pallas_forward import run_forward
from darkformer_jax.ops.pallas_rows import Place, places, side_by_side, through
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


class Saved(NamedTuple):
    """What the backward pass needs: the far state before each chunk, and of every row r and 1 / D.

    S in v's dtype, as products take it.
    """

    c: Float[Array, "b h chunks 1 m"]
    z: Float[Array, "b h chunks 1 m"]
    S: Float[Array, "b h chunks dv m"]
    rows: Float[Array, "b h chunks 2g c"]  # r of each query head, then 1 / D of each


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
    """A chunk's queries and all that they see one by one: the window, the chunk itself, sinks."""

    sizes: Sizes
    head: Head
    q: Any  # a reference, [1, 1, g, c, d]
    gain: Any  # a reference, [1, g, 1, 1], or None
    keys: Float[Array, "t d"]
    values: Float[Array, "t dv"]
    points: Float[Array, "t r"]  # what the window's kernel multiplies
    column: Int[Array, "c lanes"]  # segments of the queries
    row: Int[Array, "1 t"]  # and of the keys; padding, 0, sees padding
    to_far: Int[Array, "c 1"]
    bound: Float[Array, "c lanes"] | None

    def leaving(self) -> Float[Array, "c m"]:
        """Log features of the block of keys that leaves the window."""
        return self.head.log_features(self.keys[: self.sizes.chunk])

    @property
    def places(self) -> list[Place]:
        return places(*self.q.shape[2:4])

    def query(self, place: Place) -> Float[Array, "n d"]:
        return self.q[0, 0, place.head, place.rows]

    def near(self, place: Place, x: Array, axis: int = 0) -> Array:
        """The part of `keys` and the like that a block may see: the window and the chunk up to it, and sinks."""
        seen, whole = self.sizes.window + place.stop, self.sizes.window + self.sizes.chunk
        take = functools.partial(jax.lax.slice_in_dim, x, axis=axis)
        return x if seen == whole else jnp.concatenate([take(0, seen), take(whole, x.shape[axis])], axis=axis)

    def exact_point(self, x: Float[Array, "n d"]) -> Float[Array, "n r"]:
        return self.head.point(x).astype(x.dtype) if self.sizes.exact_has_geometry else x

    def scores(self, place: Place) -> Float[Array, "n t"]:
        """log2(e) s_j, of what the block sees. The kernel's log m is subtracted from the far scores instead."""
        points, row = self.near(place, self.points), self.near(place, self.row, axis=1)
        dots = dot(self.exact_point(self.query(place)), points, (1, 1), points.dtype)
        index = lambda axis: jax.lax.broadcasted_iota(jnp.int32, dots.shape, axis)
        past = index(0) + place.start + self.sizes.window >= index(1)
        past = past | (index(1) >= self.sizes.window + place.stop)  # all sinks
        visible = (lanes(self.column[place.rows], row.shape[1]) == row) & past
        return jnp.where(visible, LOG2E * self.sizes.scale * dots, NEG)

    def far_scores(
        self, place: Place, c: Float[Array, "1 m"], far_segment: Any
    ) -> tuple[Float[Array, "n m"], Float[Array, "n lanes"]]:
        """log2(e) a_i in two parts, of which the second is the same for all features."""
        q, column = self.query(place), self.column[place.rows]
        log_weights = 0.0 if self.head.log_weights is None else self.head.log_weights[0]
        logs = self.head.project(q) + LOG2E * (c + log_weights - math.log(c.shape[1]))
        common = -wide(self.head.half_norm(q))
        if self.gain is not None:
            common = common + self.gain[0, place.head]
        if self.bound is not None:
            common = common + self.bound[place.rows]
        return logs, jnp.where((column == far_segment) & (column != 0), LOG2E * common, NEG)


def take_refs(refs: Any, sizes: Sizes, has: Has) -> tuple[View, list]:
    """(the chunk, the references that are left) of those to `near_tokens`."""
    rest, near = list(refs), sizes.window // sizes.chunk + 1
    take = lambda count: [rest.pop(0) for _ in range(count)]
    (q,), k, v, (column, row, to_far) = (take(count) for count in (1, near, near, 3))
    spread = lambda ref: jnp.broadcast_to(ref[0], (sizes.chunk, LANES))
    bound = spread(rest.pop(0)) if has.bound else None
    sinks = take(2) if has.sinks else []
    directions = rest.pop(0)
    geometry = rest.pop(0) if has.geometry else None
    head = Head(directions, geometry, rest.pop(0) if has.log_weights else None, sizes.scale)
    gain = rest.pop(0) if has.gain else None
    keys = jnp.concatenate([*(ref[0, 0] for ref in k), *(ref[0, 0, 0] for ref in sinks[:1])], axis=0)
    values = jnp.concatenate([*(ref[0, 0] for ref in v), *(ref[0, 0, 0] for ref in sinks[1:])], axis=0)
    view = View(sizes, head, q, gain, keys, values, keys, spread(column), row[0, 0], to_far[0], bound)
    return view._replace(points=view.exact_point(keys)), rest


def forward(
    sizes: Sizes, inputs: Inputs, places: Places, *, save: bool
) -> tuple[FarState, Float[Array, "b n h g dv"], Saved | None]:
    """(the far state after the tokens, out in v's dtype, what the backward pass needs if it is to come)."""
    blocks = WindowBlocks(sizes, inputs, places, last_first=False)
    after = held_segments(places.leaving, inputs.far.segment)[1]
    dtypes = (jnp.float32, jnp.float32, inputs.values.dtype)
    saved: list[Any] = [blocks.output_of_chunks(*x) for x in zip(blocks.state_shapes, dtypes, strict=True)]
    saved.append(blocks.output_of_chunks((2 * blocks.group, sizes.chunk), jnp.float32))
    saved = saved if save else []
    arrays = blocks.near_tokens()
    far, out, kept = run_forward(blocks, _chunk, blocks.scalars, arrays, after, blocks.state_shapes, saved)
    return far, jnp.moveaxis(out, -2, 1), Saved(*kept) if save else None


def _chunk(before: Any, leaving: Any, *refs: Any, sizes: Sizes, has: Has) -> None:
    """Reads the far state and the near keys, then folds the oldest block in; `chunk_window` for one program."""
    view, rest = take_refs(refs, sizes, has)
    c_in, z_in, S_in, c_out, z_out, S_out, out_ref, *saved, c, z, S = rest
    index = pl.program_id(2)
    place = pl.program_id(0) * pl.num_programs(2) + index
    segments = Segments(before[place], leaving[place])

    @pl.when(index == 0)
    def _start() -> None:
        c[...], z[...], S[...] = c_in[0, 0], z_in[0, 0], S_in[0, 0]

    for ref, x in zip(saved[:3], (c, z, S), strict=False):
        ref[0, 0, 0] = x[...].astype(ref.dtype)
    state, leaves = State(c[...], z[...], S[...]), view.leaving()  # now, because the matrix unit has little to do
    for blocks in side_by_side(view.places):
        for block, out, row in attend(view, blocks, state, segments.far):
            out_ref[0, 0, block.head, block.rows] = out.astype(out_ref.dtype)
            for ref in saved[3:]:
                for number, x in enumerate(row):
                    at = number * view.q.shape[2] + block.head
                    ref[0, 0, 0, at : at + 1, block.rows] = x

    entering = fold_weights(view.to_far, leaves, None, state.c, segments)
    dtype = view.values.dtype
    c[...] = entering.key_max
    z[...] = state.z * entering.keep + jnp.sum(entering.weights, axis=0, keepdims=True)
    S[...] = state.S * entering.keep + dot(view.values[: sizes.chunk], entering.weights, (0, 0), dtype)

    @pl.when(index == pl.num_programs(2) - 1)
    def _end() -> None:
        c_out[0, 0], z_out[0, 0], S_out[0, 0] = c[...], z[...], S[...]


def attend(view: View, blocks: Sequence[Place], state: State, far_segment: Any) -> list[tuple[Place, Array, Any]]:
    """`exact_sums` and `weighted_sums`, normalised: blocks with their outputs and, in rows, r and 1 / D."""
    z, S, dtype = state.z, state.S.astype(view.values.dtype), view.values.dtype

    def read(place: Place) -> tuple[Any, ...]:
        return place, view.scores(place), *view.far_scores(place, state.c, far_segment)

    def weigh(place: Place, scores: Array, far: Array, common: Array) -> tuple[Any, ...]:
        largest = lambda x: wide(jnp.max(x, axis=1, keepdims=True))
        r = jnp.maximum(largest(far) + common, largest(scores))
        r = jnp.where(r > 0.5 * NEG, r, 0.0)
        weights, far_weights = weights_of(scores, far, common, r)
        denominator = wide(row_sum(far_weights * z)) + wide(row_sum(weights))
        sees = (view.column[place.rows] != 0) & (denominator > 0)  # no padding
        inverse = jnp.where(sees, reciprocal(jnp.where(sees, denominator, 1.0)), 0.0)
        return place, weights.astype(dtype), far_weights.astype(dtype), r, inverse

    def output(place: Place, weights: Array, far_weights: Array, r: Array, inverse: Array) -> Any:
        numerator = dot(far_weights, S, (1, 1), dtype) + dot(weights, view.near(place, view.values), (1, 0), dtype)
        return place, numerator * lanes(inverse, numerator.shape[1]), (as_row(r), as_row(inverse))

    return through(blocks, read, weigh, output)


def weights_of(
    scores: Float[Array, "n t"], far: Float[Array, "n m"], common: Float[Array, "n lanes"], r: Float[Array, "n lanes"]
) -> tuple[Float[Array, "n t"], Float[Array, "n m"]]:
    """exp(s - r) and exp(a - r); r in units of log2(e)."""
    return jnp.exp2(scores - lanes(r, scores.shape[1])), jnp.exp2(far - lanes(r - common, far.shape[1]))
