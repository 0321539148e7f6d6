"""Linear attention over whole sequences: a scan over chunks that carries the state, mapped over batch and heads inside.

The backward pass keeps the states between chunks, (L / chunk_size) m (dv + 2) numbers per head. It recomputes the rest.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from darkformer_jax.ops.decay import RunningSum, running_sum, to_end, to_start
from darkformer_jax.ops.linear import (
    Kernel,
    KernelArrays,
    Sums,
    Tokens,
    chunk_features,
    chunk_window,
    fold,
    last_nonzero,
    merge_sums,
    read_far,
    same_segment,
    slice_recent,
    weighted_sums,
    write_recent,
)
from darkformer_jax.ops.state import HEAD_AXES, NEG, AttentionState, FarState, Recent, Sinks

# Axis of the heads, in the arrays of one sequence.
FAR_AXES: Any = HEAD_AXES.far
SINK_AXES: Any = HEAD_AXES.sinks
RECENT_AXES: Any = HEAD_AXES.recent
TOKEN_AXES: Any = Tokens(1, 1, 1, None, None, 1)  # type: ignore[arg-type]
SUM_AXES: Any = Sums(1, 1, 1)  # type: ignore[arg-type]

Tree = TypeVar("Tree")

# (kernel, state, the window's tokens, chunks, complete chunks) -> (far state, sinks, sums); as `scan_chunks`.
OverChunks = Callable[[Kernel, AttentionState, Recent, Tokens, Int[Array, "b"] | None], tuple[FarState, Sinks, Sums]]

# Chunks [n, b, c, ...], which of its own keys a query sees, and the running decays as those of queries and of keys.
FeatureChunks = tuple[Tokens, Bool[Array, "n b c c"], RunningSum | None, RunningSum | None]
OverFeatures = Callable[[Kernel, AttentionState, FeatureChunks], tuple[FarState, Sums]]

# The scan's loop already keeps XLA from merging the recomputation with the forward pass.
recompute = functools.partial(jax.checkpoint, prevent_cse=False)


def over_heads(
    kernel: Kernel, function: Callable[..., Any], in_axes: tuple[Any, ...], out_axes: Any
) -> Callable[..., Any]:
    """`function(kernel, *args)` of one head and sequence, over heads at the given axes and the batch in front.

    `kernel` has the arrays of all key/value heads.
    """

    def one_head(arrays: KernelArrays, *args: Any) -> Any:
        return function(kernel._replace(arrays=arrays), *args)

    heads = jax.vmap(one_head, in_axes=(0, *in_axes), out_axes=out_axes)
    batch = jax.vmap(heads, in_axes=(None, *(0 for _ in in_axes)))
    return lambda *args: batch(kernel.arrays, *args)


def scan_features(
    kernel: Kernel,
    state: AttentionState,
    tokens: Tokens,
    *,
    chunk_size: int,
    causal: bool,
    over_chunks: OverFeatures,
) -> tuple[AttentionState, Sums]:
    """Features everywhere. The chunk size changes the cost, not the result. `causal=False` sees the whole segment.

    Leaves of `state` and `tokens` have the batch in front, as in `dark_attention`. over_chunks: what computes all
    chunks from left to right.
    """
    length = tokens.segments.shape[1]
    chunks = split_chunks(tokens, min(chunk_size, length))
    visible = same_segment(chunks.segments, chunks.segments)
    if causal:
        visible &= jnp.tri(visible.shape[-1], dtype=bool)[None, None]
    queries = None if chunks.decays is None else running_sum(chunks.decays, axis=2, causal=causal)
    elapsed = _tokens_last(queries)
    # The masks and sums are made outside the loop: in its body XLA would compute the masks again for every head.
    far, sums = over_chunks(kernel, state, (chunks, visible, queries, elapsed))
    if not causal:
        from_right = over_heads(kernel, _read_then_fold, (FAR_AXES, SINK_AXES, TOKEN_AXES, 0), (FAR_AXES, SUM_AXES))
        nothing = jax.tree.map(jnp.zeros_like, state.far)._replace(key_max=jnp.full_like(state.far.key_max, NEG))
        body_from_right = recompute(lambda far, xs: from_right(far, state.sinks, *xs))
        _, later = jax.lax.scan(body_from_right, nothing, (chunks, elapsed), reverse=True)
        sums = merge_sums(sums, later)
    return state._replace(far=far), jax.tree.map(lambda leaf: leaf[:, :length], jax.tree.map(join_chunks, sums))


def scan_feature_chunks(kernel: Kernel, state: AttentionState, chunks: FeatureChunks) -> tuple[FarState, Sums]:
    """`chunk_features` from chunk to chunk: (the far state after them, their sums)."""
    axes = (FAR_AXES, SINK_AXES, TOKEN_AXES, None, 1, 0)
    one_chunk = over_heads(kernel, chunk_features, axes, (FAR_AXES, SUM_AXES))
    far, sums = jax.lax.scan(recompute(lambda far, xs: one_chunk(far, state.sinks, *xs)), state.far, chunks)
    return far, sums


def _read_then_fold(
    kernel: Kernel, far: FarState, sinks: Sinks, chunk: Tokens, elapsed: RunningSum | None
) -> tuple[FarState, Sums]:
    """The far state's share alone, for the right-to-left half of bidirectional attention."""
    until, decay = None, None
    if elapsed is not None:
        until, decay = to_end(elapsed).keys, to_start(elapsed)
        decay = decay._replace(keys=decay.keys[::-1])
    scores = read_far(kernel, chunk.queries, chunk.segments, far, until)
    sums = weighted_sums(scores, far, scores[..., :0], chunk.values[:0])
    # Seen from the right, the state belongs to the chunk's first segment: `fold` takes the last one of the reversed
    # chunk.
    far, _ = fold(kernel, far, sinks, jax.tree.map(lambda leaf: leaf[::-1], chunk.recent()), decay)
    return far, sums


def scan_window(
    kernel: Kernel,
    state: AttentionState,
    tokens: Tokens,
    *,
    chunk_size: int,
    resumed: bool,
    return_state: bool,
    over_chunks: OverChunks,
) -> tuple[AttentionState, Sums]:
    """The hybrid: exact window and sinks, features beyond. Chunks are aligned to the sequence's very first token.

    Leaves of `state` and `tokens` have the batch in front, as in `dark_attention`. over_chunks: what computes all
    chunks.
    """
    window = state.recent.segments.shape[1] - chunk_size
    length = tokens.segments.shape[1]
    offset = state.fill
    end = offset + jax.vmap(last_nonzero)(tokens.segments) + 1  # padding at the end takes no place
    recent = _recent_tokens(state.recent, 0, window)
    if resumed:
        tokens = _realign(tokens, _recent_tokens(state.recent, window, None), offset)
    chunks = split_chunks(tokens, chunk_size)
    num_complete = end // chunk_size
    far, sinks, sums = over_chunks(kernel, state, recent, chunks, num_complete if return_state else None)
    sums = jax.tree.map(join_chunks, sums)
    if return_state:
        start = num_complete * chunk_size
        room = chunks.segments.shape[0] * chunk_size + window + chunk_size
        near = _cut_near(recent, tokens, room, start, window + chunk_size)
        state = state._replace(far=far, sinks=sinks, recent=near, fill=end - start)
    if resumed:
        take = jax.vmap(lambda leaf, start: jax.lax.dynamic_slice_in_dim(leaf, start, length, axis=0))
        return state, jax.tree.map(lambda leaf: take(leaf, offset), sums)
    return state, jax.tree.map(lambda leaf: leaf[:, :length], sums)


def scan_chunks(
    kernel: Kernel, state: AttentionState, recent: Recent, chunks: Tokens, num_complete: Int[Array, "b"] | None
) -> tuple[FarState, Sinks, Sums]:
    """`chunk_window` from chunk to chunk, [n, b, c, ...]: (the far state and the sinks after them, their sums).

    recent: the window before the first chunk. num_complete: how many chunks of each sequence move the window on.
    """
    num_chunks = len(chunks.segments)
    one_chunk = over_heads(
        kernel,
        chunk_window,
        (FAR_AXES, SINK_AXES, RECENT_AXES, TOKEN_AXES, None, 1, 0),
        (FAR_AXES, SINK_AXES, RECENT_AXES, SUM_AXES),
    )

    @recompute
    def body(
        carry: tuple[FarState, Sinks, Recent],
        xs: tuple[Int[Array, ""], Tokens, Bool[Array, "b n t"], RunningSum | None, RunningSum | None],
    ) -> tuple[tuple[FarState, Sinks, Recent], Sums]:
        index, *chunk = xs
        *advanced, sums = one_chunk(*carry, *chunk)
        return advance(tuple(advanced), carry, index, num_complete), sums

    numbers = jnp.arange(num_chunks, dtype=jnp.int32)
    xs = (numbers, chunks, *masks_and_decays(recent, chunks))
    (far, sinks, _), sums = jax.lax.scan(body, (state.far, state.sinks, recent), xs)
    return far, sinks, sums


def masks_and_decays(
    recent: Recent, chunks: Tokens
) -> tuple[Bool[Array, "n b c t"], RunningSum | None, RunningSum | None]:
    """For each chunk, which of the window's and its own keys its queries see, and the decays as `chunk_window`'s."""
    visible, size = _near_keys(recent.segments, chunks.segments), chunks.segments.shape[2]
    if chunks.decays is None or recent.decays is None:
        return visible, None, None
    decays = with_window(jnp.swapaxes(recent.decays, 1, 2), chunks.decays)
    near = running_sum(decays, axis=2, causal=True)
    return visible, jax.tree.map(lambda leaf: leaf[:, :, -size:], near), _tokens_last(near)


def advance(new: Tree, old: Tree, index: Int[Array, ""], num_complete: Int[Array, "b"] | None) -> Tree:
    """What follows chunk `index`: of a sequence in which it is not complete, what was there before it."""
    if num_complete is None:
        return new
    keep = jax.vmap(lambda new, old, complete: jnp.where(complete, new, old))
    advanced: Tree = jax.tree.map(lambda new, old: keep(new, old, index < num_complete), new, old)
    return advanced


def _tokens_last(elapsed: RunningSum | None) -> RunningSum | None:
    """[n, b, t, h] -> [n, b, h, t]: the keys' decays. With tokens last, the loop reads them in order.

    The queries' stay as they are: were both slices of one array, XLA would not vectorise
    the exponentials of scores on CPUs.
    """
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 2, 3), elapsed)


def _near_keys(recent: Int[Array, "b w"], chunks: Int[Array, "n b c"]) -> Bool[Array, "n b c t"]:
    """For each chunk, which of the window's and its own keys its queries see."""
    size, window = chunks.shape[2], recent.shape[1]
    seen = jnp.concatenate([jnp.ones((size, window), bool), jnp.tri(size, dtype=bool)], axis=1)
    return same_segment(chunks, with_window(recent, chunks)) & seen[None, None]


def with_window(recent: Shaped[Array, "b w *h"], chunks: Shaped[Array, "n b c *h"]) -> Shaped[Array, "n b t *h"]:
    """Each chunk with the `window` tokens before it in front."""
    num_chunks, _, size = chunks.shape[:3]
    window = recent.shape[1]
    flat = jnp.concatenate([recent, join_chunks(chunks)], axis=1)
    near = flat[:, jnp.arange(num_chunks)[:, None] * size + jnp.arange(window + size)[None, :]]
    return jnp.moveaxis(near, 1, 0)


def _recent_tokens(recent: Recent, start: int, stop: int | None) -> Recent:
    """Tokens start:stop of every sequence and head."""
    return jax.vmap(jax.vmap(lambda r: slice_recent(r, start, stop), (RECENT_AXES,), RECENT_AXES))(recent)


def _realign(tokens: Tokens, partial: Recent, offset: Int[Array, "b"]) -> Tokens:
    """Puts the chunk that is being filled in front of the new tokens, as keys only: chunks keep their boundaries."""
    chunk_size, length = partial.segments.shape[1], tokens.segments.shape[1]
    room = chunk_size - 1 + length

    def one_sequence(tokens: Tokens, partial: Recent, offset: Array) -> Tokens:
        blank = jax.tree.map(lambda leaf: jnp.zeros((room, *leaf.shape[1:]), leaf.dtype), tokens)
        before = slice_recent(heads_last(partial), 0, room)
        keys = write_recent(write_recent(blank.recent(), before, jnp.int32(0)), tokens.recent(), offset)
        queries = jax.lax.dynamic_update_slice_in_dim(blank.queries, tokens.queries, offset, axis=0)
        return Tokens(queries, *keys)

    return jax.vmap(one_sequence)(tokens, partial, offset)


def _cut_near(recent: Recent, tokens: Tokens, room: int, start: Int[Array, "b"], size: int) -> Recent:
    """Of the window and the tokens after it, then blanks up to `room`: `size` keys from `start` on."""

    def one_sequence(recent: Recent, keys: Recent, start: Array) -> Recent:
        before = heads_last(recent)
        blank = jax.tree.map(lambda leaf: jnp.zeros((room, *leaf.shape[1:]), leaf.dtype), before)
        padded = write_recent(write_recent(blank, before, jnp.int32(0)), keys, jnp.int32(before.segments.shape[0]))
        cut = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size, axis=0), padded)
        return _swap_heads(cut, 0)

    return jax.vmap(one_sequence)(recent, tokens.recent(), start)


def heads_first(recent: Recent) -> Recent:
    """[b, tokens, heads, d] of sequences -> [b, heads, tokens, d] of their states."""
    return _swap_heads(recent, 1)


def heads_last(recent: Recent) -> Recent:
    """[heads, tokens, d] of a state -> [tokens, heads, d] of a sequence."""
    return _swap_heads(recent, 0)


def _swap_heads(recent: Recent, axis: int) -> Recent:
    swap = lambda leaf: jnp.swapaxes(leaf, axis, axis + 1)
    decays = None if recent.decays is None else swap(recent.decays)
    return recent._replace(keys=swap(recent.keys), values=swap(recent.values), decays=decays)


def split_chunks(tokens: Tree, size: int) -> Tree:
    """[b, n, ...] -> [chunks, b, size, ...] of every leaf, with zeros (so padding, segment 0) at the end."""
    missing = -jax.tree.leaves(tokens)[0].shape[1] % size

    def split(leaf: Array) -> Array:
        padded = jnp.pad(leaf, [(0, 0), (0, missing)] + [(0, 0)] * (leaf.ndim - 2))
        return jnp.moveaxis(padded.reshape(leaf.shape[0], padded.shape[1] // size, size, *leaf.shape[2:]), 1, 0)

    new: Tree = jax.tree.map(split, tokens)
    return new


def join_chunks(leaf: Shaped[Array, "n b c *rest"]) -> Shaped[Array, "b t *rest"]:
    """[chunks, b, size, ...] -> [b, n, ...]."""
    chunks, batch, size = leaf.shape[:3]  # in full: no size can be inferred of an array without elements
    return jnp.moveaxis(leaf, 0, 1).reshape(batch, chunks * size, *leaf.shape[3:])
