"""`delta_rule_attention`: the gated delta rule (Yang et al., arXiv 2412.06464), chunk by chunk.

    S <- exp(g_n) S,  S <- S + beta_n k_n (v_n - S^T k_n)^T,  out_n = S^T q_n

So what S holds under a key of length 1 moves towards v_n by the share beta_n. With the corrected values
u_n = beta_n (v_n - S^T k_n) this is `signed_attention`. Within a chunk, with S_0 the state before it,

    u_n + beta_n sum_{j < n} exp(G_n - G_j) (k_n . k_j) u_j = beta_n (v_n - exp(G_n) S_0^T k_n)

is a unit lower triangular system.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from darkformer_jax.errors import UserError
from darkformer_jax.ops.attend import as_arrays
from darkformer_jax.ops.decay import check_log_decay
from darkformer_jax.ops.features import accumulator_dtype, matmul
from darkformer_jax.ops.signed_attention import (
    Chunk,
    SignedState,
    as_chunk,
    attend_to_chunk,
    check_heads,
    chunk_sums,
    decay_since,
    decay_within,
    grouped,
    known_state,
    scan_chunks,
)


def delta_rule_attention(
    q: Float[Array, "b n hq d"],
    k: Float[Array, "b n hk d"],
    v: Float[Array, "b n hv dv"],
    beta: Float[Array, "b n hv"],
    log_decay: Float[Array, "hv"] | Float[Array, "b n hv"],
    *,
    segment_ids: Int[Array, "b n"] | None = None,
    chunk_size: int = 64,
    state: SignedState | None = None,
) -> tuple[Float[Array, "b n h dv"], SignedState]:
    """(out, the state after the tokens), in O(n) time.

    Args:
      beta: the share by which each token replaces what its key holds, for each value head.
      q, k, v, log_decay, segment_ids, state: as in `signed_attention`. Keys should have length 1: with beta |k|^2
        above 2 the state grows without bound.
      chunk_size: tokens per chunk. It changes only the cost.

    Raises:
      UserError: as `signed_attention`, and for another shape of beta.
    """
    q, k, v, beta, segment_ids = as_arrays(q, k, v, beta, segment_ids)
    check_heads(q, k, v, segment_ids, chunk_size)
    check_log_decay(log_decay, v, segment_ids)
    if beta.shape != v.shape[:3]:
        raise UserError(f"beta has shape {beta.shape}; expected {v.shape[:3]}, one number per token and value head")
    state = known_state(state, q, v)
    tokens = as_chunk(q, k, v, log_decay, segment_ids, state)
    shares = jnp.where((tokens.segments != 0)[..., None], beta.astype(accumulator_dtype(q.dtype)), 0)
    return scan_chunks(_correct_and_attend, state, tokens, shares.reshape(tokens.decays.shape), chunk_size)


def _correct_and_attend(
    state: SignedState, chunk: Chunk, shares: Float[Array, "b n g p"]
) -> tuple[SignedState, Float[Array, "b n g r p dv"]]:
    dtype, sums = chunk.values.dtype, chunk_sums(chunk)
    held = matmul("bngd,bgpde->bngpe", chunk.keys, grouped(state.values, chunk), dtype)
    wanted = chunk.values.astype(held.dtype) - held * decay_since(state, chunk, sums)[..., None]
    dots = matmul("bngd,btgd->bgnt", chunk.keys, chunk.keys, dtype)
    system = dots[:, :, None] * decay_within(chunk, sums) * jnp.moveaxis(shares, 1, 3)[..., None]  # [b, g, p, n, t]
    right = jnp.moveaxis(wanted * shares[..., None], 1, 3)  # [b, g, p, n, dv]
    # The diagonal and what is above it are not read.
    corrected = jax.scipy.linalg.solve_triangular(system, right, lower=True, unit_diagonal=True)
    return attend_to_chunk(state, chunk._replace(values=jnp.moveaxis(corrected, 3, 1).astype(dtype)), ())
