"""A chunk by scores with maxima of their own, for whatever is in it: what `pallas_fast` is not exact for.

The formulas are those of `ops/linear.py`: a scale per feature of the far state, its maximum or up to
`pallas_fast.SLACK` above it, and scores with a maximum per query and per key. With a row's output o = N / D and
e = (dL/do . o) / D, the sums of a row have the gradients dL/dN = dL/do / D and dL/dD = -e, and what it reads has

    dL/ds_j = w_j (dL/dN . v_j - e)              w_j = exp(s_j - r), the weight of a key of the chunk
    dL/da_i = f_i (dL/dN . S_i - e z_i)          f_i = exp(a_i - r), the weight of a feature of the far state

The maxima c and r cancel in the output, so they have no gradients.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from darkformer_jax.ops.linear import HEADROOM, LOG_FLOOR
from darkformer_jax.ops.pallas_chunk import (
    ChunkRefs,
    Decay,
    Head,
    OfChunk,
    Segments,
    State,
    as_row,
    dot,
    lanes,
    of_decay,
    of_denominator,
)
from darkformer_jax.ops.state import NEG


class Chunk(NamedTuple):
    """What the query heads of a group share. They are treated one after another: all at once need much VMEM."""

    k: Float[Array, "c d"]
    v: Float[Array, "c dv"]
    column: Int[Array, "c 1"]  # the segments
    row: Int[Array, "1 c"]
    log_k: Float[Array, "c m"]
    decay: Decay | None

    @classmethod
    def of(cls, head: Head, refs: ChunkRefs) -> "Chunk":
        keys = refs.k[0, 0]
        return cls(keys, refs.v[0, 0], refs.column[0], refs.row[0], head.log_features(keys), refs.decay())


class Seen(NamedTuple):
    """What the queries see. weights: exp(s - r), with r the largest of a row; far_weights: exp(a - r).

    s = log P + lift, where P is the product of the two sides' features, each scaled to a maximum of e^HEADROOM.
    """

    weights: Float[Array, "c c"]
    far_weights: Float[Array, "c m"]
    denominator: Float[Array, "c 1"]  # 1 where nothing is seen
    visible: Bool[Array, "c c"]
    product: Float[Array, "c c"]  # P
    lift: Float[Array, "c c"]  # in units of e^-r: log(weights / P)
    features_q: Float[Array, "c m"]
    features_k: Float[Array, "c m"]


def look(chunk: Chunk, log_q: Float[Array, "c m"], state: State, far_segment: Any) -> Seen:
    """`feature_scores`, `read_far` and the weights of `weighted_sums`, of the queries of one head."""
    size = chunk.column.shape[0]
    index = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (size, size), axis)
    visible = (chunk.column == chunk.row) & (chunk.row != 0) & (index(0) >= index(1))

    headroom = min(HEADROOM, 0.5 * (80.0 - math.log(log_q.shape[-1])))
    q_max, k_max = (jnp.max(x, axis=1, keepdims=True) for x in (log_q, chunk.log_k))
    features_q, features_k = jnp.exp(log_q - (q_max - headroom)), jnp.exp(chunk.log_k - (k_max - headroom))
    product = dot(features_q, features_k, (1, 1), chunk.v.dtype)
    lift = q_max + as_row(k_max) - 2 * headroom
    if chunk.decay is not None:
        lift = lift + chunk.decay.pairs(slice(None), size)
    scores = jnp.where(visible, jnp.log(jnp.maximum(product, math.exp(LOG_FLOOR))) + lift, NEG)

    far_scores = log_q + state.c
    if chunk.decay is not None:
        far_scores = far_scores + lanes(chunk.decay.since_start(), log_q.shape[1])
    far_scores = jnp.where((chunk.column == far_segment) & (chunk.column != 0), far_scores, NEG)
    largest = jnp.maximum(jnp.max(far_scores, axis=1, keepdims=True), jnp.max(scores, axis=1, keepdims=True))
    shift = jnp.where(largest > 0.5 * NEG, largest, 0.0)
    far_weights, weights = jnp.exp(far_scores - shift), jnp.exp(scores - shift)
    denominator = jnp.sum(far_weights * state.z, axis=1, keepdims=True) + jnp.sum(weights, axis=1, keepdims=True)
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
    segments: Segments,
) -> Folded:
    """`fold` and `merge_far`, without the sums. column: the segments of the keys; 0 stays out."""
    to_far, same = (column == segments.own) & (column != 0), segments.same
    old_max = jnp.where(same, c, NEG)
    decayed = old_max
    if decay is not None:
        decayed, log_k = old_max + decay.whole_chunk, log_k + lanes(decay.to_end(), log_k.shape[1])
    key_max = jnp.maximum(decayed, jnp.max(jnp.where(to_far, log_k, NEG), axis=0, keepdims=True))
    gap = old_max - key_max if decay is None else (old_max - key_max) + decay.whole_chunk
    keep = jnp.where(same, jnp.exp(gap), 0.0)
    return Folded(key_max, keep, jnp.where(to_far, jnp.exp(jnp.where(to_far, log_k - key_max, NEG)), 0.0))


def forward(
    head: Head, refs: ChunkRefs, state: State, segments: Segments, c_next: Float[Array, "1 m"]
) -> tuple[Float[Array, "gc dv"], State]:
    """(the outputs of the chunk, the far state after it, whose c shall be c_next)."""
    chunk, (c, z, S), outs = Chunk.of(head, refs), state, []
    v, dtype = chunk.v, chunk.v.dtype
    for q in refs.q[0, 0]:
        seen = look(chunk, head.log_features(q), state, segments.far)
        numerator = dot(seen.far_weights, S, (1, 1), dtype) + dot(seen.weights, v, (1, 0), dtype)
        outs.append(numerator / seen.denominator)
    folded = fold_weights(chunk.column, chunk.log_k, chunk.decay, c, segments)
    shrink = jnp.exp(folded.key_max - c_next)
    z = (z * folded.keep + jnp.sum(folded.weights, axis=0, keepdims=True)) * shrink
    S = (S * folded.keep + dot(v, folded.weights, (0, 0), dtype)) * shrink
    return jnp.concatenate(outs, axis=0), State(c_next, z, S)


def backward(
    head: Head,
    refs: ChunkRefs,
    segments: Segments,
    state: State,
    of_out: Float[Array, "gc dv"],
    of_z: Float[Array, "1 m"],
    of_S: Float[Array, "dv m"],
    c_next: Float[Array, "1 m"],
) -> OfChunk:
    """The gradients of a chunk and of the state before it, by those of its outputs and of the state after it."""
    chunk, (c, z, S) = Chunk.of(head, refs), state
    (size, _), dtype = chunk.k.shape, chunk.v.dtype
    folded = fold_weights(chunk.column, chunk.log_k, chunk.decay, c, segments)
    shrink = jnp.exp(folded.key_max - c_next)
    of_z, of_S = of_z * shrink, of_S * shrink
    of_folded = folded.weights * (of_z + dot(chunk.v, of_S, (1, 0), dtype))
    kept = folded.keep * (z * of_z + jnp.sum(S * of_S, axis=0, keepdims=True))
    of_logs, of_v = of_folded, dot(folded.weights, of_S, (1, 1), dtype)
    of_z, of_S = of_z * folded.keep, of_S * folded.keep
    of_queries, of_head, of_keys = [], None, None
    for number, q in enumerate(refs.q[0, 0]):
        seen = look(chunk, head.log_features(q), state, segments.far)
        of_numerator = of_out[number * size : (number + 1) * size] / seen.denominator
        by_key, by_feature = dot(of_numerator, chunk.v, (1, 1), dtype), dot(of_numerator, S, (1, 0), dtype)
        e = of_denominator(seen.weights, by_key, seen.far_weights, by_feature) / seen.denominator
        of_far = seen.far_weights * (by_feature - e * z)
        from_q, from_k, from_keys = _of_scores(chunk, seen, by_key - e)
        of_q, from_queries = head.of_points(q, of_far + from_q)
        of_queries.append(of_q)
        of_head = from_queries if of_head is None else of_head.plus(from_queries)
        of_logs += from_k
        of_v += dot(seen.weights, of_numerator, (0, 0), dtype)
        of_z -= jnp.sum(seen.far_weights * e, axis=0, keepdims=True)
        of_S += dot(of_numerator, seen.far_weights, (0, 0), dtype)
        if from_keys is not None:
            of_keys = from_keys if of_keys is None else of_keys + from_keys
    of_k, from_keys_of_head = head.of_points(chunk.k, of_logs)
    of_head = from_keys_of_head if of_head is None else of_head.plus(from_keys_of_head)
    of_running = None
    if of_keys is not None:
        of_running = of_decay(of_keys, jnp.sum(of_folded, axis=1, keepdims=True), kept)
    return OfChunk(jnp.concatenate(of_queries, axis=0), of_k, of_v, of_z, of_S, of_head, of_running)


def _of_scores(
    chunk: Chunk, seen: Seen, of_weights: Float[Array, "c c"]
) -> tuple[Float[Array, "c m"], Float[Array, "c m"], Float[Array, "1 c"] | None]:
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
