"""Linear attention over a whole sequence of one head: a scan over chunks that carries the state.

The backward pass keeps the states between chunks, (L / chunk_size) m (dv + 2) numbers a head, and recomputes the rest.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from darkformer_jax.ops.linear import (
    Kernel,
    Sums,
    Tokens,
    chunk_features,
    chunk_window,
    fold,
    join_recent,
    last_nonzero,
    merge_sums,
    read_far,
    slice_recent,
    weighted_sums,
    write_recent,
)
from darkformer_jax.ops.state import NEG, AttentionState, FarState, Recent, Sinks, empty_far


def scan_features(
    kernel: Kernel, state: AttentionState, tokens: Tokens, *, chunk_size: int, causal: bool
) -> tuple[AttentionState, Sums]:
    """Features everywhere. The chunk size changes the cost, not the result. `causal=False` sees the whole segment."""
    length = tokens.segments.shape[0]
    chunks = _split(tokens, min(chunk_size, length))

    @jax.checkpoint
    def body(far: FarState, chunk: Tokens) -> tuple[FarState, Sums]:
        return chunk_features(kernel, far, state.sinks, chunk, causal)

    far, sums = jax.lax.scan(body, state.far, chunks)
    if not causal:
        num_features, value_dim = state.far.values.shape
        nothing = empty_far(num_features, value_dim, state.far.values.dtype)

        @jax.checkpoint
        def body_from_right(far: FarState, chunk: Tokens) -> tuple[FarState, Sums]:
            return _read_then_fold(kernel, far, state.sinks, chunk)

        _, later = jax.lax.scan(body_from_right, nothing, chunks, reverse=True)
        sums = merge_sums(sums, later)
    return state._replace(far=far), _unsplit(sums, 0, length)


def _read_then_fold(kernel: Kernel, far: FarState, sinks: Sinks, chunk: Tokens) -> tuple[FarState, Sums]:
    """The far state's share alone, for the right-to-left half of bidirectional attention."""
    scores = read_far(kernel, chunk.queries, chunk.segments, far)
    sums = weighted_sums(scores, far, scores[..., :0], chunk.values[:0])
    # Seen from the right, the state belongs to the chunk's first segment: `fold` takes the last one of the reversed chunk.
    far, _ = fold(kernel, far, sinks, Recent(*(leaf[::-1] for leaf in chunk.recent())))
    return far, sums


def scan_window(
    kernel: Kernel, state: AttentionState, tokens: Tokens, *, chunk_size: int, resumed: bool, return_state: bool
) -> tuple[AttentionState, Sums]:
    """The hybrid: exact window and sinks, features beyond. Chunks are aligned to the sequence's very first token."""
    window = state.recent.segments.shape[0] - chunk_size
    length = tokens.segments.shape[0]
    offset = state.fill
    end = offset + last_nonzero(tokens.segments) + 1  # padding at the end takes no place
    if resumed:
        tokens = _realign(tokens, slice_recent(state.recent, window, None), offset)
    chunks = _split(tokens, chunk_size)
    num_chunks = chunks.segments.shape[0]
    num_complete = end // chunk_size

    @jax.checkpoint
    def body(
        carry: tuple[FarState, Sinks, Recent], indexed: tuple[Int[Array, ""], Tokens]
    ) -> tuple[tuple[FarState, Sinks, Recent], Sums]:
        index, chunk = indexed
        far, sinks, recent, sums = chunk_window(kernel, *carry, chunk)
        advanced = (far, sinks, recent)
        if return_state:  # an incomplete chunk stays in the state's buffer
            advanced = jax.tree.map(lambda new, old: jnp.where(index < num_complete, new, old), advanced, carry)
        return advanced, sums

    carry = (state.far, state.sinks, slice_recent(state.recent, 0, window))
    (far, sinks, recent), sums = jax.lax.scan(body, carry, (jnp.arange(num_chunks), chunks))
    if return_state:
        buffer = jax.tree.map(
            lambda leaf: jnp.zeros(((num_chunks + 1) * chunk_size, *leaf.shape[1:]), leaf.dtype), tokens.recent()
        )
        buffer = write_recent(buffer, tokens.recent(), jnp.int32(0))
        start = num_complete * chunk_size
        partial = Recent(*(jax.lax.dynamic_slice_in_dim(leaf, start, chunk_size, axis=0) for leaf in buffer))
        state = state._replace(far=far, sinks=sinks, recent=join_recent(recent, partial), fill=end - start)
    return state, _unsplit(sums, offset if resumed else 0, length)


def _realign(tokens: Tokens, partial: Recent, offset: Int[Array, ""]) -> Tokens:
    """Puts the chunk in the making in front of the new tokens, as keys only, so that chunks start where they always did."""
    chunk_size, length = partial.segments.shape[0], tokens.segments.shape[0]
    room = chunk_size - 1 + length
    blank = jax.tree.map(lambda leaf: jnp.zeros((room, *leaf.shape[1:]), leaf.dtype), tokens)
    before = slice_recent(partial, 0, room)
    keys = write_recent(write_recent(blank.recent(), before, jnp.int32(0)), tokens.recent(), offset)
    queries = jax.lax.dynamic_update_slice_in_dim(blank.queries, tokens.queries, offset, axis=0)
    return Tokens(queries, *keys)


def _split(tokens: Tokens, size: int) -> Tokens:
    """[n, ...] -> [chunks, size, ...], with padding (segment 0) at the end."""
    missing = -tokens.segments.shape[0] % size
    return jax.tree.map(
        lambda leaf: jnp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1)).reshape(-1, size, *leaf.shape[1:]),
        tokens,
    )


def _unsplit(sums: Sums, start: int | Int[Array, ""], length: int) -> Sums:
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), sums)
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, length, axis=0), flat)
