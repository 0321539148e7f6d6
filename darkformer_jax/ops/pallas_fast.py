"""A chunk with one scale per feature: the way that almost every chunk takes.

With c of each feature as it was before the chunk, the maximum of the keys in the far state or up to SLACK above it,

    a_i = exp(l(q_i) + c - r_i)       r_i the largest of the row, so that a_i is at most 1
    b_j = exp(l(k_j) - c)

key j weighs a_i . b_j for query i, and the far state gives it a_i . z and a_i . S: one exponential per feature of a
query or a key, and none per pair. What a row has in common cancels in the output, r_i and |M q_i|^2 alike. c is known
before the chunk's keys are, so that nothing waits for their maximum.

float32 holds that where no key is more than MOST_ABOVE over c, c stays within SLACK of the keys, and every row's
denominator is at least LEAST. What a_i and b_j lose below 2^-126 is then at most 2^-26 of a denominator, and e^-47 of
the largest z. Where a chunk does not fit, `pallas_safe` computes it again.

With a row's output o = N / D and e = (dL/do . o) / D, its sums have the gradients dL/dN = dL/do / D and dL/dD = -e, and

    dL/da_i = sum_j dw_ij b_j + S dL/dN - e z        dw_ij = dL/dN . v_j - e of the keys that it sees
    dL/db_j = sum_i dw_ij a_i
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from darkformer_jax.ops.pallas_blocks import LANES, LOG2E
from darkformer_jax.ops.pallas_chunk import (
    ChunkRefs,
    Decay,
    Head,
    OfChunk,
    Segments,
    State,
    as_column,
    as_row,
    dot,
    lanes,
    of_decay,
    of_denominator,
    reciprocal,
    row_sum,
    wide,
)
from darkformer_jax.ops.pallas_rows import Learned, Place, Sums, places, side_by_side, through
from darkformer_jax.ops.state import NEG

MOST_ABOVE = 19.0  # nats that a key may be above c
SLACK = 40.0  # nats that c may be above the largest key in the state, so that 1 is e^-40 there at least
LEAST = 2.0**-56  # of denominators


class Keys(NamedTuple):
    """A chunk's keys."""

    logs: Float[Array, "c m"]  # log2(e) l(k_j); -1e30 of padding
    weights: Float[Array, "c m"]  # b_j
    rounded: Float[Array, "c m"]  # in the values' dtype
    is_entering: Bool[Array, "c lanes"]  # the far state
    entering: Float[Array, "c lanes"]  # what of b_j enters the far state: e^decay to the chunk's end, or nothing


class Chunk(NamedTuple):
    """What the blocks of a chunk share."""

    head: Head
    refs: ChunkRefs
    state: State
    segments: Segments
    keys: Keys
    column: Int[Array, "c lanes"]  # the segments of the queries
    row: Int[Array, "1 c"]  # and of the keys. Padding, 0, sees padding, of which b is 0
    add_to_q: Float[Array, "1 m"]  # log2(e) (c + log weights)
    decay: Decay | None

    @classmethod
    def of(cls, head: Head, refs: ChunkRefs, state: State, segments: Segments) -> "Chunk":
        k, dtype = refs.k[0, 0], refs.v.dtype
        column = jnp.broadcast_to(refs.column[0], (k.shape[0], LANES))
        log_weights = 0.0 if head.log_weights is None else head.log_weights[0]
        norm = jnp.where(column != 0, wide(LOG2E * head.half_norm(k)), -NEG)
        logs = head.project(k) - lanes(norm, state.c.shape[1]) + LOG2E * log_weights
        weights = jnp.exp2(logs - LOG2E * state.c)
        decay = refs.decay()
        kept = 1.0 if decay is None else jnp.exp2(LOG2E * decay.to_end())
        is_entering = (column == segments.own) & (column != 0)
        keys = Keys(logs, weights, weights.astype(dtype), is_entering, jnp.where(is_entering, kept, 0.0))
        return cls(head, refs, state, segments, keys, column, refs.row[0], LOG2E * (state.c + log_weights), decay)

    @property
    def folded(self) -> Float[Array, "c m"]:
        """What of each key enters the far state, in units of e^c."""
        return self.keys.weights * lanes(self.keys.entering, self.keys.weights.shape[1])

    @property
    def kept(self) -> Any:
        """What is left after the chunk of the far state before it, in units of e^c."""
        kept = jnp.where(self.segments.same, 1.0, 0.0)
        return kept if self.decay is None else kept * jnp.exp2(LOG2E * self.decay.whole_chunk)

    def reads(self, place: Place) -> Float[Array, "n lanes"]:
        """What the block's queries read of the far state: e^decay since the chunk's start, or nothing."""
        column = self.column[place.rows]
        amount = 1.0 if self.decay is None else jnp.exp2(LOG2E * self.decay.since_start(place.rows))
        return jnp.where((column == self.segments.far) & (column != 0), amount, 0.0)

    def query_weights(self, place: Place) -> Float[Array, "n m"]:
        """a_i."""
        logs = self.head.project(self.refs.q[0, 0, place.head, place.rows]) + self.add_to_q
        return jnp.exp2(logs - jnp.max(logs, axis=1, keepdims=True))

    def visible(self, place: Place) -> Bool[Array, "n t"]:
        """Which keys a block's queries see."""
        rows = self.column[place.rows]
        index = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (rows.shape[0], place.stop), axis)
        return (lanes(rows, place.stop) == self.row[:, : place.stop]) & (index(0) + place.start >= index(1))

    def left(self, place: Place) -> Any:
        """e^decay from each key that a block may see to each of its queries; 1 where nothing decays."""
        return 1.0 if self.decay is None else jnp.exp2(LOG2E * self.decay.pairs(place.rows, place.stop))

    def pairs(self, place: Place, rounded: Float[Array, "n m"], left: Any) -> Float[Array, "n t"]:
        """What keys weigh for a block's queries. rounded: a_i."""
        product = dot(rounded, self.keys.rounded[: place.stop], (1, 1), rounded.dtype)
        return jnp.where(self.visible(place), product * left, 0.0)


def first_scale(head: Head, refs: ChunkRefs) -> Float[Array, "1 m"]:
    """c for a far state without keys: the largest features of the chunk's own."""
    logs = jnp.where(refs.column[0] != 0, head.log_features(refs.k[0, 0]), NEG)
    return jnp.max(logs, axis=0, keepdims=True)


class Scales(NamedTuple):
    """The next c, and the true maximum of the keys in the next state, of which c is at most `SLACK` above."""

    c: Float[Array, "1 m"]
    largest: Float[Array, "1 m"]


class After(NamedTuple):
    """What a chunk leaves. fits: whether float32 held it; if not, only the scales are right."""

    state: State
    scales: Scales
    inverses: Float[Array, "g c"]  # 1 / D
    out: Float[Array, "gc dv"]
    fits: Bool[Array, ""]


def forward(
    head: Head, refs: ChunkRefs, state: State, segments: Segments, largest: Float[Array, "1 m"], is_last: Any
) -> After:
    """The outputs of a chunk and the far state after it.

    Args:
      largest: of `Scales`, of the state before.
      is_last: whether c shall be that of the keys after the chunk, for a state that others go on with.
    """
    chunk, dtype = Chunk.of(head, refs, state, segments), refs.v.dtype
    z, S, v, keys = state.z, state.S.astype(dtype), refs.v[0, 0], chunk.keys
    denominators, inverses, outs = [], [], []

    def features(place: Place) -> tuple[Place, Array]:
        return place, chunk.query_weights(place)

    def weigh(place: Place, a: Array) -> tuple[Any, ...]:
        rounded, reads = a.astype(dtype), chunk.reads(place)
        weights = chunk.pairs(place, rounded, chunk.left(place))
        denominator = reads * wide(row_sum(a * z)) + wide(row_sum(weights))
        denominator = jnp.where(chunk.column[place.rows] != 0, denominator, 1.0)
        return place, rounded, weights, reads, denominator

    def attend(place: Place, rounded: Array, weights: Array, reads: Array, denominator: Array) -> None:
        inverse, width = reciprocal(denominator), v.shape[1]
        numerator = lanes(reads, width) * dot(rounded, S, (1, 1), dtype) + dot(weights, v[: place.stop], (1, 0), dtype)
        outs.append(numerator * lanes(inverse, width))
        inverses.append(as_row(inverse))
        denominators.append(denominator)

    for blocks in side_by_side(places(*refs.q.shape[2:4])):
        through(blocks, features, weigh, attend)
    scales = _next_scales(chunk, largest, jnp.where(is_last, 0.0, SLACK))
    above = jnp.max(keys.logs, axis=0, keepdims=True) / LOG2E - state.c
    in_range = (jnp.max(above) <= MOST_ABOVE) & (jnp.max(state.c - scales.largest) <= SLACK)
    by_head = jnp.concatenate(inverses, axis=1).reshape(refs.q.shape[2:4])
    out, fits = jnp.concatenate(outs, axis=0), in_range & (_least(denominators) >= LEAST)
    return After(_fold(chunk, scales.c), scales, by_head, out, fits)


def _next_scales(chunk: Chunk, largest: Float[Array, "1 m"], slack: Any) -> Scales:
    """c stays where it is as long as it may: keys of a document that has just begun say little of those to come."""
    logs, decay, segments = chunk.keys.logs, chunk.decay, chunk.segments
    if decay is not None:
        logs, largest = logs + lanes(LOG2E * decay.to_end(), logs.shape[1]), largest + decay.whole_chunk
    entering = jnp.where(lanes(chunk.keys.is_entering, logs.shape[1]), logs, LOG2E * NEG)
    of_chunk = jnp.max(entering, axis=0, keepdims=True) / LOG2E
    largest = jnp.maximum(jnp.where(segments.same, largest, NEG), of_chunk)
    return Scales(jnp.clip(chunk.state.c, largest, largest + slack), largest)


def _fold(chunk: Chunk, c_next: Float[Array, "1 m"]) -> State:
    """The far state after a chunk."""
    (c, z, S), v, folded = chunk.state, chunk.refs.v[0, 0], chunk.folded
    shrink = jnp.exp2(LOG2E * (c - c_next))
    z = (z * chunk.kept + jnp.sum(folded, axis=0, keepdims=True)) * shrink
    S = (S * chunk.kept + dot(v, folded, (0, 0), v.dtype)) * shrink
    return State(c_next, z, S)


def backward(
    head: Head,
    refs: ChunkRefs,
    segments: Segments,
    state: State,
    of_out: Float[Array, "gc dv"],
    of_z: Float[Array, "1 m"],
    of_S: Float[Array, "dv m"],
    c_next: Float[Array, "1 m"],
    *,
    inverses: Float[Array, "g c"],
) -> OfChunk:
    """The gradients of a chunk and of the state before it, by those of its outputs and of the state after it.

    c_next, inverses: of `After`.
    """
    chunk, dtype = Chunk.of(head, refs, state, segments), refs.v.dtype
    z, S, keys = state.z, state.S.astype(dtype), chunk.keys
    k, v, (size, features) = refs.k[0, 0], refs.v[0, 0], keys.logs.shape
    of_queries, to_keys, to_values, to_decays = [], Sums(0), Sums(0), Sums(1)
    learned, totals = Learned(head), [jnp.zeros_like(of_z), jnp.zeros_like(of_S)]

    def numerators(place: Place) -> tuple[Any, ...]:
        rows = slice(place.head * size + place.start, place.head * size + place.stop)
        reads, inverse = chunk.reads(place), as_column(inverses[place.head : place.head + 1, place.rows])
        of_numerator = of_out[rows] * lanes(inverse, v.shape[1])
        of_far = (of_numerator * lanes(reads, v.shape[1])).astype(dtype)
        return place, reads, inverse, of_numerator.astype(dtype), of_far, chunk.query_weights(place)

    def weigh(place: Place, reads: Array, inverse: Array, of_numerator: Array, of_far: Array, a: Array) -> Any:
        left = chunk.left(place)
        weights = chunk.pairs(place, a.astype(dtype), left)
        by_key = dot(of_numerator, v[: place.stop], (1, 1), dtype)
        by_feature = dot(of_far, S, (1, 0), dtype)
        e = wide(of_denominator(weights, by_key, a, by_feature)) * inverse
        of_weights = by_key - lanes(e, place.stop)
        of_pairs = jnp.where(chunk.visible(place), of_weights * left, 0.0)
        if refs.decays is not None:
            to_decays.add(place, jnp.sum(weights * of_weights, axis=0, keepdims=True))
        e_far = lanes(e * reads, features)
        return place, of_numerator, of_far, a, weights, of_pairs.astype(dtype), by_feature - e_far * z, e_far

    def pull(
        place: Place, of_numerator: Any, of_far: Any, a: Any, weights: Any, of_pairs: Any, far: Any, e: Any
    ) -> Any:
        rounded = a.astype(dtype)
        of_logs = a * (dot(of_pairs, keys.rounded[: place.stop], (1, 0), dtype) + far)
        totals[0] -= jnp.sum(a * e, axis=0, keepdims=True)
        totals[1] += dot(of_far, rounded, (0, 0), dtype)
        to_keys.add(place, dot(of_pairs, rounded, (0, 0), dtype))
        to_values.add(place, dot(weights, of_numerator, (0, 0), dtype))
        return place, of_logs

    def points(place: Place, of_logs: Array) -> None:
        of_queries.append(head.of_projected(of_logs, dtype))
        learned.add(refs.q[0, 0, place.head, place.rows], of_logs)

    shrink = jnp.exp2(LOG2E * (state.c - c_next))
    of_z, of_S = of_z * shrink, of_S * shrink
    rounded = of_S.astype(dtype)
    # First, because the matrix unit is idle while the queries' features are made.
    entering = lanes(keys.entering, features) * (of_z + dot(v, rounded, (1, 0), dtype))
    for blocks in side_by_side(places(*refs.q.shape[2:4])):
        learned.sum_up()
        through(blocks, numerators, weigh, pull, points)
    of_logs = keys.weights * (entering + to_keys.all())
    learned.add(k, of_logs)
    of_k = head.of_projected(of_logs, dtype)
    of_norm, of_geometry = head.of_norm(k, of_logs)
    learned.add_geometry(of_geometry)
    of_head = learned.all()
    of_v = dot(chunk.folded, rounded, (1, 1), dtype) + to_values.all()
    of_running = None
    if refs.decays is not None:
        kept = chunk.kept * (z * of_z + jnp.sum(state.S * of_S, axis=0, keepdims=True))
        of_running = of_decay(to_decays.all(), row_sum(keys.weights * entering), kept)
    of_z, of_S = of_z * chunk.kept + totals[0], of_S * chunk.kept + totals[1]
    of_q = jnp.concatenate(of_queries, axis=0)
    return OfChunk(of_q, of_k + of_norm, of_v, of_z, of_S, of_head, of_running)


def _least(columns: list[Array]) -> Array:
    least = columns[0]
    for column in columns[1:]:
        least = jnp.minimum(least, column)
    return jnp.min(jnp.min(least, axis=0, keepdims=True))
