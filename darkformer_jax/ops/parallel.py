"""Causal linear attention over all chunks at once: for GPUs, where every small program of a scan costs its start.

The first pass summarises each chunk by itself. A short scan, elementwise, adds the summaries up to the states before
each chunk. The second pass reads those. What is computed is what `ops/scan.py` computes, chunk for chunk; but the
features of `BLOCK_TOKENS` tokens of every row are in memory together, or in the hybrid their logits of the window and a
copy of the window for each chunk. The backward pass computes them again.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from darkformer_jax.ops.decay import RunningSum, fold_decay
from darkformer_jax.ops.linear import Kernel, Sums, Tokens, add_summary, exact_sums, feature_sums, summarize
from darkformer_jax.ops.scan import (
    FAR_AXES,
    SINK_AXES,
    SUM_AXES,
    TOKEN_AXES,
    FeatureChunks,
    advance,
    heads_last,
    join_chunks,
    masks_and_decays,
    over_heads,
    with_window,
)
from darkformer_jax.ops.state import AttentionState, FarState, Recent, Sinks

BLOCK_TOKENS = 8192  # of a row; a longer one is a scan over blocks, whose memory does not grow with it
UNROLLED = 32  # steps of the scan over summaries: XLA makes few programs of them, and compiles longer

_KEY_AXES: Any = TOKEN_AXES.recent()
_State = TypeVar("_State")


def parallel_feature_chunks(kernel: Kernel, state: AttentionState, chunks: FeatureChunks) -> tuple[FarState, Sums]:
    """`scan.scan_feature_chunks`."""
    log_features = jax.vmap(over_heads(kernel, Kernel.log_features, (1,), 1))
    read = jax.vmap(over_heads(kernel, feature_sums, (FAR_AXES, TOKEN_AXES, None, 1, 0, 1, 1), SUM_AXES))

    def block(far: FarState, numbers: Int[Array, "n"], chunks: FeatureChunks) -> tuple[FarState, Sums]:
        tokens, visible, queries, elapsed = chunks
        log_q, log_k = log_features(tokens.queries), log_features(tokens.keys)
        held = far, state.sinks
        (far, _), (before, _) = _states(kernel, held, tokens.recent(), elapsed, log_k, numbers, None)
        return far, read(before, tokens, visible, queries, elapsed, log_q, log_k)

    return _over_blocks(block, state.far, chunks, chunks[0].segments.shape[2])


def parallel_chunks(
    kernel: Kernel, state: AttentionState, recent: Recent, chunks: Tokens, num_complete: Int[Array, "b"] | None
) -> tuple[FarState, Sinks, Sums]:
    """`scan.scan_chunks`."""
    size, window = chunks.segments.shape[2], recent.segments.shape[1]
    read = jax.vmap(over_heads(kernel, exact_sums, (TOKEN_AXES, FAR_AXES, SINK_AXES, _KEY_AXES, None, 1, 0), SUM_AXES))

    def block(carry: Any, numbers: Int[Array, "n"], chunks: Any) -> tuple[Any, Sums]:
        (held, recent), (tokens, visible, queries, elapsed) = carry, chunks
        newest = jax.tree.map(lambda old, new: new.astype(old.dtype), recent, tokens.recent())
        near = jax.tree.map(with_window, recent, newest)
        leaving = jax.tree.map(lambda leaf: leaf[:, :, :size], near)
        gone = jax.tree.map(lambda leaf: leaf[..., :size], elapsed)
        held, before = _states(kernel, held, leaving, gone, None, numbers, num_complete)
        move_on = lambda old, new: jnp.concatenate([old, join_chunks(new)], axis=1)[:, -window:]
        recent = jax.tree.map(move_on, recent, newest)
        return (held, recent), read(tokens, *before, near, visible, queries, elapsed)

    carry = (state.far, state.sinks), jax.vmap(heads_last)(recent)
    ((far, sinks), _), sums = _over_blocks(block, carry, (chunks, *masks_and_decays(recent, chunks)), size)
    return far, sinks, sums


def _states(
    kernel: Kernel,
    held: tuple[FarState, Sinks],
    chunks: Recent,
    elapsed: RunningSum | None,
    log_k: Float[Array, "n b c h m"] | None,
    numbers: Int[Array, "n"],
    num_complete: Int[Array, "b"] | None,
) -> tuple[tuple[FarState, Sinks], tuple[FarState, Sinks]]:
    """(the far state and the sinks after the chunks [n, b, c, ...], those before each of them)."""
    num_sinks = held[1].filled.shape[1]

    def of_chunk(kernel: Kernel, chunk: Recent, elapsed: RunningSum | None, log_k: Array | None) -> FarState:
        return summarize(kernel, chunk, fold_decay(elapsed), num_sinks, log_k)

    def add(
        _: Kernel, far: FarState, sinks: Sinks, summary: FarState, chunk: Recent, elapsed: RunningSum | None
    ) -> tuple[FarState, Sinks]:
        return add_summary(far, sinks, summary, chunk, fold_decay(elapsed))

    axes = (FAR_AXES, SINK_AXES)
    added = over_heads(kernel, add, (*axes, FAR_AXES, _KEY_AXES, 0), axes)
    summaries = jax.vmap(over_heads(kernel, of_chunk, (_KEY_AXES, 0, 1), FAR_AXES))(chunks, elapsed, log_k)

    def step(held: tuple[FarState, Sinks], xs: Any) -> tuple[tuple[FarState, Sinks], tuple[FarState, Sinks]]:
        number, *chunk = xs
        return advance(added(*held, *chunk), held, number, num_complete), held

    after, before = jax.lax.scan(step, held, (numbers, summaries, chunks, elapsed), unroll=min(len(numbers), UNROLLED))
    return after, before


def _over_blocks(
    block: Callable[[_State, Int[Array, "n"], Any], tuple[_State, Sums]], state: _State, chunks: Any, size: int
) -> tuple[_State, Sums]:
    """(the state after all, the sums of all chunks): `block` for as many chunks at once as `BLOCK_TOKENS` hold."""
    length = len(jax.tree.leaves(chunks)[0])
    at_once = min(length, max(1, BLOCK_TOKENS // size))
    missing = -length % at_once  # chunks of padding, whose numbers are beyond those of all complete ones
    padded = length + missing
    blocks = padded // at_once
    pad = lambda leaf: jnp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1))
    cut = lambda leaf: leaf.reshape(blocks, at_once, *leaf.shape[1:])
    numbers = jnp.arange(padded, dtype=jnp.int32)
    xs = jax.tree.map(cut, (numbers, jax.tree.map(pad, chunks)))
    # XLA unrolls a loop of one block, which then keeps nothing from being merged with what is computed again.
    body = jax.checkpoint(lambda state, xs: block(state, *xs), prevent_cse=blocks == 1)
    state, sums = jax.lax.scan(body, state, xs)
    # Sizes are written out: none can be inferred of an array without elements.
    return state, jax.tree.map(lambda leaf: leaf.reshape(padded, *leaf.shape[2:])[:length], sums)
