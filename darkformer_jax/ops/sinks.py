"""The sinks of the hybrid by themselves, for a kernel that leaves them out.

They are few, so that a scan over chunks costs little beside the window.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from darkformer_jax.ops.linear import Kernel, Sums, Tokens, fold_sinks, newest_segment, weighted_sums
from darkformer_jax.ops.scan import RECENT_AXES, SINK_AXES, SUM_AXES, TOKEN_AXES, advance, heads_first, over_heads
from darkformer_jax.ops.state import NEG, AttentionState, Recent, Sinks, empty_far


def read_sinks(
    kernel: Kernel, state: AttentionState, leaving: Recent, chunks: Tokens, num_complete: Int[Array, "b"] | None
) -> tuple[Sinks, Sums]:
    """(the sinks after the chunks, what the chunks' queries read of the sinks before each), chunks [n, b, c, ...].

    leaving: from chunk n on, the blocks of the window and then of the chunks; block n leaves the window after chunk n.
    """
    num_chunks = chunks.segments.shape[0]
    leaving = jax.tree.map(lambda leaf: leaf[:num_chunks], leaving)
    one_chunk = over_heads(
        kernel, _read_then_fold, (SINK_AXES, None, TOKEN_AXES, RECENT_AXES), (SINK_AXES, None, SUM_AXES)
    )

    @jax.checkpoint
    def body(
        carry: tuple[Sinks, Int[Array, "b"]], xs: tuple[Int[Array, ""], Tokens, Recent]
    ) -> tuple[tuple[Sinks, Int[Array, "b"]], Sums]:
        index, tokens, block = xs
        *new, sums = one_chunk(*carry, tokens, heads_first(block))
        return advance(tuple(new), carry, index, num_complete), sums

    (sinks, _), sums = jax.lax.scan(
        body, (state.sinks, state.far.segment), (jnp.arange(num_chunks, dtype=jnp.int32), chunks, leaving)
    )
    return sinks, sums


def _read_then_fold(
    kernel: Kernel, sinks: Sinks, segment: Int[Array, ""], tokens: Tokens, block: Recent
) -> tuple[Sinks, Int[Array, ""], Sums]:
    reads = (tokens.segments == segment) & (tokens.segments != 0)
    scores = kernel.log_kernel(tokens.queries, sinks.keys)
    scores = jnp.where((reads[:, None] & sinks.filled[None, :])[:, None, :], scores, NEG)
    nothing = empty_far(0, sinks.values.shape[1], scores.dtype)
    sums = weighted_sums(scores[..., :0], nothing, scores, sinks.values)
    newest, _ = newest_segment(block)
    return fold_sinks(sinks, block, None, segment), jnp.where(newest == 0, segment, newest), sums
