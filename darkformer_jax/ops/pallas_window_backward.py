"""The hybrid's backward TPU kernel: chunks from the last to the first, as in `pallas_backward`, whose formulas hold.

A block of keys has gradients from the chunks that see it and from the far state that it enters. They are summed in
VMEM, which has a slot for each block of the window and the chunk.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.dtypes import float0
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from darkformer_jax.ops.pallas_backward import of_features
from darkformer_jax.ops.pallas_chunk import Segments, State, as_column, dot, lanes, of_denominator, wide
from darkformer_jax.ops.pallas_rows import Learned, Place, Sums, side_by_side, through
from darkformer_jax.ops.pallas_safe import fold_weights
from darkformer_jax.ops.pallas_window import (
    Has,
    Inputs,
    Places,
    Saved,
    Sizes,
    View,
    WindowBlocks,
    take_refs,
    weights_of,
)
from darkformer_jax.ops.state import FarState


def backward(
    sizes: Sizes,
    inputs: Inputs,
    places: Places,
    saved: Saved,
    gradient: tuple[FarState, Array],
) -> Inputs:
    """The gradients of `inputs`, from those of the far state after the tokens and of the output."""
    blocks = WindowBlocks(sizes, inputs, places, last_first=True)
    far, of_out = gradient
    rows, chunk = (blocks.batch, blocks.heads), sizes.chunk
    states = [far.normalizer[:, :, None], jnp.swapaxes(far.values, 2, 3)]
    values = blocks.of_queries(blocks.value_dim)
    widths = (blocks.dim, blocks.value_dim)
    heads_in_front = lambda x: jnp.moveaxis(x, 1, -2)
    kind = inputs.keys.dtype
    sinks = [] if inputs.sink_keys is None else [(inputs.sink_keys.shape[3], width) for width in widths]
    dq, dk, dv, dk_recent, dv_recent, dc, dz, dS, *rest = blocks.call(
        _chunk,
        blocks.scalars,
        [
            *blocks.near_tokens(),
            *((x, blocks.of_chunk(x.shape[3:])) for x in saved),
            (heads_in_front(of_out), values),
            *((x, blocks.of_row(x.shape[2:])) for x in states),
        ],
        [
            ((*rows, blocks.group, blocks.length, blocks.dim), inputs.queries.dtype, blocks.of_queries(blocks.dim)),
            *(((*rows, blocks.length, width), kind, blocks.of_keys(width)) for width in widths),
            *(((*rows, sizes.window, width), kind, blocks.of_row((sizes.window, width))) for width in widths),
            *(
                ((*rows, *shape), jnp.float32, blocks.of_row(shape))
                for shape in [*blocks.state_shapes, *blocks.shapes_of_head]
            ),
            *(((*rows, blocks.chunks, *shape), kind, blocks.of_chunk(shape)) for shape in sinks),
        ],
        [*blocks.state_shapes[1:], *((blocks.near, chunk, width) for width in widths)],
    )
    of_sinks = [jnp.swapaxes(rest.pop(), 1, 2) for _ in sinks]
    of_head, of_gain = rest, None
    if inputs.log_gain is not None:
        of_gain = jnp.sum(of_head.pop(), axis=0)[:, :, 0, 0].astype(inputs.log_gain.dtype)
    integers: Any = np.zeros(inputs.far.segment.shape, float0)
    tokens_in_front = lambda x: jnp.moveaxis(x, -2, 1)
    return Inputs(
        of_features(inputs.features, sizes.scale, of_head),
        FarState(dc[:, :, 0], dz[:, :, 0], jnp.swapaxes(dS, 2, 3), integers),
        tokens_in_front(dq),
        tokens_in_front(jnp.concatenate([dk_recent, dk], axis=2)),
        tokens_in_front(jnp.concatenate([dv_recent, dv], axis=2)),
        of_gain,
        of_sinks.pop() if of_sinks else None,
        of_sinks.pop() if of_sinks else None,
    )


def _chunk(before: Any, leaving: Any, *refs: Any, sizes: Sizes, has: Has) -> None:
    """The gradients of a chunk, of the keys that it sees, and of the state before it."""
    view, rest = take_refs(refs, sizes, has)
    c_ref, z_ref, S_ref, rows, of_out, dz_in, dS_in, dq, dk, dv, dk_recent, dv_recent, *rest = rest
    dc_out, dz_out, dS_out, *of_head, dz, dS, of_keys, of_values = rest
    of_sinks = [of_head.pop() for _ in range(2 * has.sinks)]  # of values, of keys
    of_gain = of_head.pop() if has.gain else None
    size, place, near = sizes.chunk, pl.num_programs(2) - 1 - pl.program_id(2), sizes.window // sizes.chunk + 1
    row = pl.program_id(0) * pl.num_programs(2)
    segments = Segments(before[row + place], leaving[row + place])

    @pl.when(pl.program_id(2) == 0)
    def _start() -> None:
        dz[...], dS[...] = dz_in[0, 0], dS_in[0, 0]
        for ref in (of_keys, of_values, *of_head, *([] if of_gain is None else [of_gain])):
            ref[...] = jnp.zeros_like(ref)

    state = State(c_ref[0, 0, 0], z_ref[0, 0, 0], S_ref[0, 0, 0].astype(jnp.float32))
    entering = fold_weights(view.to_far, view.leaving(), None, state.c, segments)
    dtype = view.values.dtype
    first_values, rounded = view.values[:size], dS[...].astype(dtype)
    of_entering = entering.weights * (dz[...] + dot(first_values, rounded, (1, 0), dtype))
    pulled = Pulled(view, state, segments.far, rows, of_out, of_gain)
    for some in side_by_side(view.places):
        pulled.learned.sum_up()
        for block, of_q in through(some, pulled.read, pulled.weigh, pulled.pull, pulled.points):
            dq[0, 0, block.head, block.rows] = of_q.astype(dq.dtype)
    first_keys = view.keys[:size]
    pulled.learned.add(first_keys, of_entering)
    of_first = view.head.of_projected(of_entering, dtype)
    of_norm, of_geometry = view.head.of_norm(first_keys, of_entering)
    pulled.learned.add_geometry(of_geometry)
    to_keys, to_values, whole = pulled.of_keys(), pulled.of_values(), near * size
    for ref, to_sinks in zip(of_sinks, (to_values[whole:], to_keys[whole:]), strict=False):
        ref[0, 0, 0] = to_sinks.astype(ref.dtype)
    for ref, x in zip(of_head, pulled.learned.all().arrays(), strict=True):
        ref[0, 0] += x
    dz[...] = dz[...] * entering.keep + pulled.of_z
    of_first_values = dot(entering.weights, rounded, (1, 1), dtype)
    dS[...] = dS[...] * entering.keep + pulled.of_S

    for ref, to_near, of_block, complete in (
        (of_keys, to_keys, of_first + of_norm, dk),
        (of_values, to_values, of_first_values, dv),
    ):
        by_block = [to_near[j * size : (j + 1) * size] for j in range(near)]
        # A block of keys stays in its slot. That of the last one is free when it is complete, for the next first one.
        complete[0, 0] = (ref[jax.lax.rem(place + near - 1, near)] + by_block[-1]).astype(complete.dtype)
        for j in range(1, near - 1):
            ref[jax.lax.rem(place + j, near)] += by_block[j]
        ref[jax.lax.rem(place, near)] = by_block[0] + of_block

    @pl.when(place == 0)
    def _end() -> None:
        for recent, ref in ((dk_recent, of_keys), (dv_recent, of_values)):
            for j in range(near - 1):
                recent[0, 0, j * size : (j + 1) * size] = ref[j].astype(recent.dtype)
        dz_out[0, 0], dS_out[0, 0] = dz[...], dS[...]
        dc_out[0, 0] = state.z * dz[...] + jnp.sum(state.S * dS[...], axis=0, keepdims=True)


class Pulled:
    """The stages of a chunk's blocks of queries, and what they sum up for keys, the state and the head."""

    def __init__(self, view: View, state: State, far_segment: Any, rows: Any, of_out: Any, of_gain: Any) -> None:
        self._view, self._state, self._far_segment = view, state, far_segment
        self._rows, self._of_out, self._of_gain = rows, of_out, of_gain
        self._dtype = view.values.dtype
        self._S = state.S.astype(self._dtype)
        self._to_points, self._to_values = (Sums(0), Sums(0)), (Sums(0), Sums(0))  # of near keys and of sinks
        self.learned = Learned(view.head)
        self.of_z, self.of_S = jnp.zeros_like(state.z), jnp.zeros_like(state.S)

    def read(self, place: Place) -> tuple[Any, ...]:
        """What a block sees."""
        scores = self._view.scores(place)
        far, common = self._view.far_scores(place, self._state.c, self._far_segment)
        group = self._view.q.shape[2]
        r, inverse = (
            as_column(self._rows[0, 0, 0, at : at + 1, place.rows]) for at in (place.head, group + place.head)
        )
        of_out = self._of_out[0, 0, place.head, place.rows].astype(jnp.float32)
        of_numerator = (of_out * lanes(inverse, of_out.shape[1])).astype(self._dtype)
        return place, inverse, of_numerator, *weights_of(scores, far, common, r)

    def weigh(self, place: Place, inverse: Array, of_numerator: Array, weights: Array, far_weights: Array) -> Any:
        """The gradients of what it sees."""
        by_key = dot(of_numerator, self._view.near(place, self._view.values), (1, 1), self._dtype)
        by_feature = dot(of_numerator, self._S, (1, 0), self._dtype)
        e = wide(of_denominator(weights, by_key, far_weights, by_feature)) * inverse
        of_scores = weights * (by_key - lanes(e, weights.shape[1]))
        e = lanes(e, far_weights.shape[1])
        of_far = far_weights * (by_feature - e * self._state.z)
        self.of_z -= jnp.sum(far_weights * e, axis=0, keepdims=True)
        self.of_S += dot(of_numerator, far_weights, (0, 0), self._dtype)
        self._add(self._to_values, place, dot(weights, of_numerator, (0, 0), self._dtype))
        if self._of_gain is not None:
            of_head = jnp.sum(jnp.sum(of_far, axis=1, keepdims=True), axis=0, keepdims=True)
            self._of_gain[0, 0, place.head] += of_head
        return place, of_scores.astype(self._dtype), of_far

    def pull(self, place: Place, of_scores: Array, of_far: Array) -> tuple[Any, ...]:
        """The gradients of the points in the window's kernel."""
        view, scale = self._view, self._view.sizes.scale
        point = view.exact_point(view.query(place))
        of_point = scale * dot(of_scores, view.near(place, view.points), (1, 0), self._dtype)
        self._add(self._to_points, place, scale * dot(of_scores, point, (0, 0), self._dtype))
        return place, of_point, of_far

    def points(self, place: Place, of_point: Array, of_far: Array) -> tuple[Place, Array]:
        """The gradients of the queries."""
        head, q = self._view.head, self._view.query(place)
        of_q = self._of_exact(q, of_point) + head.of_projected(of_far, self._dtype)
        of_norm, of_geometry = head.of_norm(q, of_far)
        self.learned.add(q, of_far)
        self.learned.add_geometry(of_geometry)
        return place, of_q + of_norm

    def of_values(self) -> Float[Array, "t dv"]:
        """Of all that is seen one by one, from the chunk's queries."""
        return self._all(self._to_values)

    def of_keys(self) -> Float[Array, "t d"]:
        """Likewise."""
        return self._of_exact(self._view.keys, self._all(self._to_points))

    def _of_exact(self, x: Float[Array, "n d"], of_point: Float[Array, "n r"]) -> Float[Array, "n d"]:
        if not self._view.sizes.exact_has_geometry:
            return of_point
        self.learned.add_geometry(dot(of_point, x, (0, 0), self._dtype))
        return dot(of_point, self._view.head.geometry[0], (1, 0), self._dtype)

    def _add(self, sums: tuple[Sums, Sums], place: Place, x: Array) -> None:
        near = self._view.sizes.window + place.stop
        sums[0].add(place, x[:near])
        if x.shape[0] > near:
            sums[1].add(Place(0, 0, x.shape[0] - near), x[near:])

    def _all(self, sums: tuple[Sums, Sums]) -> Array:
        return jnp.concatenate([x.all() for x in sums if not x.is_empty], axis=0)
