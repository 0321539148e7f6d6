"""The hybrid's backward TPU kernel: chunks from the last to the first, as in `pallas_backward`, whose formulas hold.

A block of keys has gradients from the chunks that see it and from the far state that it enters. They are summed in
VMEM, in rows for the window and the chunk, which move on by a chunk per step: the last block is complete, and an empty
one comes in front.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.dtypes import float0
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from darkformer_jax.ops.pallas_backward import of_features
from darkformer_jax.ops.pallas_chunk import Segments, dot, of_denominator
from darkformer_jax.ops.pallas_safe import fold_weights
from darkformer_jax.ops.pallas_window import (
    Has,
    Inputs,
    Places,
    Sizes,
    States,
    View,
    WindowBlocks,
    exact_points,
    look,
    take_refs,
)
from darkformer_jax.ops.state import FarState


def backward(
    sizes: Sizes,
    inputs: Inputs,
    places: Places,
    saved: States,
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
        [*blocks.state_shapes[1:], *((sizes.window + chunk, width) for width in widths)],
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
    c_ref, z_ref, S_ref, of_out, dz_in, dS_in, dq, dk, dv, dk_recent, dv_recent, *rest = rest
    dc_out, dz_out, dS_out, *of_head, dz, dS, of_keys, of_values = rest
    of_sinks = [of_head.pop() for _ in range(2 * has.sinks)]  # of values, of keys
    size, place = sizes.chunk, pl.num_programs(2) - 1 - pl.program_id(2)
    row = pl.program_id(0) * pl.num_programs(2)
    far_segment, own_segment = before[row + place], leaving[row + place]

    @pl.when(pl.program_id(2) == 0)
    def _start() -> None:
        dz[...], dS[...] = dz_in[0, 0], dS_in[0, 0]
        for ref in (of_keys, of_values, *of_head):
            ref[...] = jnp.zeros_like(ref)

    c, z, S, dtype = c_ref[0, 0, 0], z_ref[0, 0, 0], S_ref[0, 0, 0], view.values.dtype
    seen = look(view, sizes, c, z, far_segment)
    of_numerator = of_out[0, 0].reshape(-1, of_out.shape[-1]).astype(jnp.float32) / seen.denominator
    by_key, by_feature = dot(of_numerator, view.values, (1, 1), dtype), dot(of_numerator, S, (1, 0), dtype)
    e = of_denominator(seen.weights, by_key, seen.far_weights, by_feature) / seen.denominator
    of_scores = seen.weights * (by_key - e)
    of_far = seen.far_weights * (by_feature - e * z)
    if view.gain is not None:
        by_head = of_far.reshape(-1, size, of_far.shape[1])
        of_head.pop()[0, 0] += jnp.sum(jnp.sum(by_head, axis=2, keepdims=True), axis=1, keepdims=True)

    folded = fold_weights(view.to_far, view.log_k, None, c, Segments(far_segment, own_segment))
    first_values, first_keys = view.values[:size], view.keys[:size]
    of_folded = folded.weights * (dz[...] + dot(first_values, dS[...], (1, 0), dtype))
    of_queries, to_keys = _of_exact(view, sizes, of_scores, of_head)
    to_values = dot(seen.weights, of_numerator, (0, 0), dtype)
    near = sizes.window + size
    for ref, to_sinks in zip(of_sinks, (to_values[near:], to_keys[near:]), strict=False):
        ref[0, 0, 0] = to_sinks.astype(ref.dtype)
    of_values[...] += to_values[:near]
    of_values[:size] += dot(folded.weights, dS[...], (1, 1), dtype)
    of_keys[...] += to_keys[:near]
    of_first, from_keys = view.head.of_points(first_keys, of_folded)
    of_keys[:size] += of_first
    dz[...] = dz[...] * folded.keep - jnp.sum(seen.far_weights * e, axis=0, keepdims=True)
    dS[...] = dS[...] * folded.keep + dot(of_numerator, seen.far_weights, (0, 0), dtype)
    of_far_queries, from_queries = view.head.of_points(view.q, of_far)
    of_queries += of_far_queries
    for ref, x in zip(of_head, from_keys.plus(from_queries).arrays(), strict=True):
        ref[0, 0] += x
    dq[0, 0] = of_queries.reshape(dq.shape[2:]).astype(dq.dtype)

    for ref, complete in ((of_keys, dk), (of_values, dv)):
        complete[0, 0] = ref[sizes.window :].astype(complete.dtype)
        ref[size:] = ref[: sizes.window]
        ref[:size] = jnp.zeros((size, ref.shape[1]), jnp.float32)

    @pl.when(place == 0)
    def _end() -> None:
        dk_recent[0, 0] = of_keys[size:].astype(dk_recent.dtype)
        dv_recent[0, 0] = of_values[size:].astype(dv_recent.dtype)
        dz_out[0, 0], dS_out[0, 0] = dz[...], dS[...]
        dc_out[0, 0] = z * dz[...] + jnp.sum(S.astype(jnp.float32) * dS[...], axis=0, keepdims=True)


def _of_exact(
    view: View, sizes: Sizes, of_scores: Float[Array, "gc t"], of_head: list[Any]
) -> tuple[Float[Array, "gc d"], Float[Array, "t d"]]:
    """The gradients of queries and near keys by those of the exact scores; adds that of M if the scores have it."""
    q, k = exact_points(view, sizes)
    of_q = sizes.scale * dot(of_scores, k, (1, 0), q.dtype)
    of_k = sizes.scale * dot(of_scores, q, (0, 0), q.dtype)
    geometry = view.head.geometry
    if geometry is None or not sizes.exact_has_geometry:
        return of_q, of_k
    of_head[1][0, 0] += dot(of_q, view.q, (0, 0), q.dtype) + dot(of_k, view.keys, (0, 0), q.dtype)
    return dot(of_q, geometry[0], (1, 0), q.dtype), dot(of_k, geometry[0], (1, 0), q.dtype)
