"""The backward TPU kernel: chunks from the last to the first, with the gradients of z and S^T handed on in VMEM.

With a row's output o = N / D and e = (dL/do . o) / D, the sums of a row have the gradients dL/dN = dL/do / D and
dL/dD = -e, and what it reads has

    dL/ds_j = w_j (dL/dN . v_j - e)              w_j = exp(s_j - r), the weight of a key of the chunk
    dL/da_i = f_i (dL/dN . S_i - e z_i)          f_i = exp(a_i - r), the weight of a feature of the far state

The maxima c and r cancel in the output, so they have no gradients. Features are computed again; the states before each
chunk are those that the forward pass saved.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.dtypes import float0
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from darkformer_jax.ops.decay import RunningSum
from darkformer_jax.ops.features import RandomFeatures
from darkformer_jax.ops.linear import LOG_FLOOR
from darkformer_jax.ops.pallas_chunk import (
    Blocks,
    Chunk,
    Has,
    Head,
    Inputs,
    Seen,
    Sizes,
    as_row,
    dot,
    fold_weights,
    look,
    segments_of_chunks,
    take_refs,
)
from darkformer_jax.ops.pallas_forward import Saved
from darkformer_jax.ops.state import NEG, FarState


def backward(
    sizes: Sizes,
    inputs: Inputs,
    segments: Int[Array, "b n"],
    saved: Saved,
    gradient: tuple[FarState, Array],
) -> Inputs:
    """The gradients of `inputs`, from those of the far state after the tokens and of the output."""
    blocks = Blocks(sizes, inputs, last_first=True)
    length = segments.shape[1]
    segments = jnp.pad(segments, [(0, 0), (0, blocks.length - length)])
    of_chunk, before, _ = segments_of_chunks(segments, inputs.far.segment, sizes.chunk)
    far, of_out = gradient
    rows = (blocks.batch, blocks.heads)
    own = [x.shape[1:] for x in blocks.per_head]
    states = [far.normalizer[:, :, None], jnp.swapaxes(far.values, 2, 3)]
    values = blocks.of_queries(blocks.value_dim)
    widths = (blocks.dim, blocks.value_dim)
    of_keys = [((*rows, blocks.length, width), inputs.keys.dtype, blocks.of_keys(width)) for width in widths]
    of_queries = (*rows, blocks.group, blocks.length, blocks.dim)
    integers: Any = np.zeros(inputs.far.segment.shape, float0)
    decays = inputs.decays
    of_decays = [] if decays is None else [((*rows, 1, blocks.length), jnp.float32, blocks.of_keys_in_a_row(1))]
    dq, dk, dv, *rest = blocks.call(
        _chunk,
        (before, of_chunk),
        [
            *blocks.tokens(segments),
            *((x, blocks.of_head(shape)) for x, shape in zip(blocks.per_head, own, strict=True)),
            *((x, blocks.of_chunk(x.shape[3:])) for x in saved),
            (blocks.in_front(of_out), values),
            *((x, blocks.of_row(x.shape[2:])) for x in states),
        ],
        [
            (of_queries, inputs.queries.dtype, blocks.of_queries(blocks.dim)),
            *of_keys,
            *of_decays,
            *(((*rows, *shape), jnp.float32, blocks.of_row(shape)) for shape in [*blocks.state_shapes, *own]),
        ],
        blocks.state_shapes[1:],
    )
    if decays is not None:  # the two parts of the sum's value have no derivatives
        decays = RunningSum(jnp.zeros_like(decays.whole), jnp.zeros_like(decays.rest), rest.pop(0)[:, :, 0])
    dc, dz, dS, *of_head = rest
    dq, dk, dv = (blocks.back(x, length) for x in (dq, dk, dv))
    return Inputs(
        of_features(inputs.features, of_head),
        FarState(dc[:, :, 0], dz[:, :, 0], jnp.swapaxes(dS, 2, 3), integers),
        dq,
        dk,
        dv,
        decays,
    )


def of_features(features: RandomFeatures, of_head: list[Array]) -> RandomFeatures:
    """The gradients of w, M and log weights, from those of each row of the batch."""
    given = {name: x for name, x in features._asdict().items() if x is not None}
    sums = {name: jnp.sum(x, axis=0) for name, x in zip(given, of_head, strict=True)}
    return features._replace(**{name: sums[name].reshape(x.shape).astype(x.dtype) for name, x in given.items()})


def _chunk(before: Any, of_chunk: Any, *refs: Any, scale: float, has: Has) -> None:
    """The gradients of a chunk, and those of the state before it."""
    head, chunk, rest = take_refs(refs, scale, has)
    c_ref, z_ref, S_ref, of_out, dz_in, dS_in, dq, dk, dv, *rest = rest
    dG = rest.pop(0) if has.decays else None
    dc_out, dz_out, dS_out, *of_head, dz, dS = rest
    place = pl.num_programs(2) - 1 - pl.program_id(2)
    row = pl.program_id(0) * pl.num_programs(2)
    far_segment, own_segment = before[row + place], of_chunk[row + place]

    @pl.when(pl.program_id(2) == 0)
    def _start() -> None:
        dz[...], dS[...] = dz_in[0, 0], dS_in[0, 0]
        for ref in of_head:
            ref[...] = jnp.zeros_like(ref)

    c, z, S, dtype = c_ref[0, 0, 0], z_ref[0, 0, 0], S_ref[0, 0, 0], chunk.v.dtype
    seen = look(chunk, c, z, far_segment)
    of_numerator = of_out[0, 0].reshape(-1, of_out.shape[-1]).astype(jnp.float32) / seen.denominator
    by_key, by_feature = dot(of_numerator, chunk.v, (1, 1), dtype), dot(of_numerator, S, (1, 0), dtype)
    e = of_denominator(seen.weights, by_key, seen.far_weights, by_feature, seen.denominator)
    of_far = seen.far_weights * (by_feature - e * z)
    from_q, from_k, of_keys = _of_scores(chunk, seen, by_key - e)

    folded = fold_weights(chunk.column, chunk.log_k, chunk.decay, c, far_segment, own_segment)
    of_folded = folded.weights * (dz[...] + dot(chunk.v, dS[...], (1, 0), dtype))
    of_v = dot(folded.weights, dS[...], (1, 1), dtype) + dot(seen.weights, of_numerator, (0, 0), dtype)
    dv[0, 0] = of_v.astype(dv.dtype)
    if dG is not None and of_keys is not None:
        kept = folded.keep * (z * dz[...] + jnp.sum(S.astype(jnp.float32) * dS[...], axis=0, keepdims=True))
        dG[0, 0] = _of_decay(of_keys, jnp.sum(of_folded, axis=1, keepdims=True), kept)
    dz[...] = dz[...] * folded.keep - jnp.sum(seen.far_weights * e, axis=0, keepdims=True)
    dS[...] = dS[...] * folded.keep + dot(of_numerator, seen.far_weights, (0, 0), dtype)

    dq[0, 0] = of_points(head, chunk.q, of_far + from_q, of_head).reshape(dq.shape[2:]).astype(dq.dtype)
    dk[0, 0] = of_points(head, chunk.k, of_folded + from_k, of_head).astype(dk.dtype)

    @pl.when(place == 0)
    def _end() -> None:
        dz_out[0, 0], dS_out[0, 0] = dz[...], dS[...]
        dc_out[0, 0] = z * dz[...] + jnp.sum(S.astype(jnp.float32) * dS[...], axis=0, keepdims=True)


def _of_decay(
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
    denominator: Float[Array, "n 1"],
) -> Float[Array, "n 1"]:
    """e, from the very products that it is subtracted from: those of the rounded output would leave a remainder.

    What a row's keys get sums to zero, and values or keys with a mean of their own multiply what does not.
    """
    row_sum = lambda x: jnp.sum(x, axis=1, keepdims=True)
    return (row_sum(weights * by_key) + row_sum(far_weights * by_feature)) / denominator


def _of_scores(
    chunk: Chunk, seen: Seen, of_weights: Float[Array, "gc c"]
) -> tuple[Float[Array, "gc m"], Float[Array, "c m"], Float[Array, "1 c"] | None]:
    """The gradients of the log features of queries and keys, by the scores of the chunk's own pairs.

    With a decay, also those of the scores, summed over the queries of each key. of_weights: dL/dN . v - e.

    The gradient of log P is w times that, and the features need its quotient by P. The quotients are scaled by e^up as
    far up as their products with features allow, and by the largest of dL/dw: they would be no normal float32 where a
    loss is a mean over many tokens. w / P is exp(lift), but rounded otherwise: then what a row's keys get would not
    cancel.
    """
    dtype = chunk.v.dtype
    largest = lambda x: jnp.max(jnp.max(x, axis=1, keepdims=True), axis=0, keepdims=True)
    above = seen.visible & (seen.product > math.exp(LOG_FLOOR))
    lift = jnp.where(above, seen.lift, NEG)
    up = jnp.minimum(-LOG_FLOOR - 2.0 - largest(lift), 60.0)
    of_keys = None if chunk.decay is None else jnp.sum(seen.weights * of_weights, axis=0, keepdims=True)
    of_weights = jnp.where(above, of_weights, 0.0)
    size = largest(jnp.abs(of_weights))
    size = jnp.where(size > 0, size, 1.0)
    quotients = of_weights / size * (seen.weights * jnp.exp(up) / jnp.where(above, seen.product, 1.0))
    to_q = seen.features_q * dot(quotients, seen.features_k, (1, 0), dtype)
    to_k = seen.features_k * dot(quotients, seen.features_q, (0, 0), dtype)
    down = jnp.exp(-up)
    return to_q * down * size, to_k * down * size, of_keys


def of_points(
    head: Head, x: Float[Array, "n d"], of_logs: Float[Array, "n m"], of_head: list[Any]
) -> Float[Array, "n d"]:
    """The gradient of queries or keys by that of their log features; adds those of w, M and the log weights."""
    point, root = head.point(x), head.scale**0.5
    of_point = root * dot(of_logs, head.w[0], (1, 0), x.dtype)
    of_point -= head.scale * jnp.sum(of_logs, axis=1, keepdims=True) * point.astype(jnp.float32)
    of_w, *others = of_head
    of_w[0, 0] += root * dot(of_logs, point, (0, 0), x.dtype)
    if head.log_weights is not None:
        others.pop()[0, 0] += jnp.sum(of_logs, axis=0, keepdims=True)
    if head.geometry is None:
        return of_point
    others.pop()[0, 0] += dot(of_point, x, (0, 0), x.dtype)
    return dot(of_point, head.geometry[0], (1, 0), x.dtype)
