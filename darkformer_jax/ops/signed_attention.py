"""`signed_attention`: linear attention with a decay whose weights may be negative, and are not normalised.

    out_n = sum_{j <= n} exp(G_n - G_j) (q_n . k_j) v_j

over the tokens j of n's segment, with G the running sum of the log decays. It is the recurrence
S_n = exp(g_n) S_{n-1} + k_n v_n^T, out_n = S_n^T q_n, which state space models and gated linear attention share. Only
differences G_n - G_j <= 0 are exponentiated.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from darkformer_jax.errors import UserError
from darkformer_jax.ops.attend import as_arrays
from darkformer_jax.ops.decay import RunningSum, between, check_log_decay, decay_per_token, running_sum, to_end
from darkformer_jax.ops.features import accumulator_dtype, matmul
from darkformer_jax.ops.linear import last_nonzero, same_segment
from darkformer_jax.ops.scan import join_chunks, split_chunks
from darkformer_jax.ops.state import NEG

_of_each_head: Any = lambda function: jax.vmap(jax.vmap(jax.vmap(function)))  # over [b, g, p, ...]


class SignedState(NamedTuple):
    """S of each value head, and the segment whose tokens it holds; 0 = none."""

    values: Float[Array, "b h d dv"]
    segment: Int[Array, "b"]


class Chunk(NamedTuple):
    """Tokens with g key heads, r query heads and p value heads for each of these."""

    queries: Float[Array, "b n g r d"]
    keys: Float[Array, "b n g d"]
    values: Float[Array, "b n g p dv"]
    decays: Float[Array, "b n g p"]
    segments: Int[Array, "b n"]


def init_signed_state(
    batch: int, num_heads: int, key_dim: int, value_dim: int, dtype: jax.typing.DTypeLike
) -> SignedState:
    """The state of `batch` sequences that have seen nothing. `dtype` is that of q, k and v; S is in float32."""
    shape = (batch, num_heads, key_dim, value_dim)
    return SignedState(jnp.zeros(shape, accumulator_dtype(dtype)), jnp.zeros(batch, jnp.int32))


def signed_attention(
    q: Float[Array, "b n hq d"],
    k: Float[Array, "b n hk d"],
    v: Float[Array, "b n hv dv"],
    log_decay: Float[Array, "hv"] | Float[Array, "b n hv"],
    *,
    segment_ids: Int[Array, "b n"] | None = None,
    chunk_size: int = 128,
    state: SignedState | None = None,
) -> tuple[Float[Array, "b n h dv"], SignedState]:
    """(out, the state after the tokens), in O(n) time.

    Heads may be grouped either way: several query heads share a key and a value head, or several value heads share a
    query and a key head. So out has h = max(hq, hv) heads.

    Args:
      q, k, v: of one dtype. The matmul operands keep it; S and the decays are float32 (float64 for float64).
      log_decay: g <= 0 of each value head, or of each token and value head. Below -1000 it counts as -1000.
      segment_ids: each token's document. Tokens see their own only; 0 is padding, which has no key and whose output
        is 0. None = all tokens belong to the document that the state is in.
      chunk_size: tokens per chunk. It changes only the cost.
      state: of the tokens before, from `init_signed_state` or an earlier call.

    Raises:
      UserError: for shapes or options that do not fit together, and for decays above 0 where they are known.
    """
    q, k, v, segment_ids = as_arrays(q, k, v, segment_ids)
    check_heads(q, k, v, segment_ids, chunk_size)
    check_log_decay(log_decay, v, segment_ids)
    state = known_state(state, q, v)
    tokens = as_chunk(q, k, v, log_decay, segment_ids, state)
    return scan_chunks(attend_to_chunk, state, tokens, (), chunk_size)


def scan_chunks(
    attend: Any, state: SignedState, tokens: Chunk, more: Any, chunk_size: int
) -> tuple[Float[Array, "b n h dv"], SignedState]:
    """(out, state) of `attend(state, chunk, more of the chunk) -> (state, out [b, n, g, r, p, dv])`, chunk by chunk.

    more: arrays [b, n, ...].
    """
    batch, length = tokens.segments.shape
    groups, repeats, heads, dim = *tokens.queries.shape[2:4], *tokens.values.shape[3:]
    if not length:
        return jnp.zeros((batch, 0, groups * repeats * heads, dim), tokens.values.dtype), state
    chunks = split_chunks((tokens, more), min(chunk_size, length))

    # The backward pass keeps the states between chunks and recomputes the rest; the loop itself keeps XLA from merging
    # the recomputation with the forward pass.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(state: SignedState, xs: tuple[Chunk, Any]) -> tuple[SignedState, Array]:
        return attend(state, *xs)

    state, out = jax.lax.scan(body, state, chunks)
    joined = join_chunks(out)[:, :length].reshape(batch, length, groups * repeats * heads, dim)
    return joined.astype(tokens.values.dtype), state


def attend_to_chunk(state: SignedState, chunk: Chunk, more: Any) -> tuple[SignedState, Array]:
    """(the state after a chunk, its outputs [b, n, g, r, p, dv] in float32)."""
    dtype = chunk.values.dtype
    sums = chunk_sums(chunk)
    dots = matmul("bngrd,btgd->bgrnt", chunk.queries, chunk.keys, dtype)
    weights = dots[:, :, :, None] * decay_within(chunk, sums)[:, :, None]
    own = matmul("bgrpnt,btgpe->bngrpe", weights, chunk.values, dtype)
    before = matmul("bngrd,bgpde->bngrpe", chunk.queries, grouped(state.values, chunk), dtype)
    return fold(state, chunk, sums), own + before * decay_since(state, chunk, sums)[:, :, :, None, :, None]


def chunk_sums(chunk: Chunk) -> RunningSum:
    """G [b, g, p, n] from the chunk's start."""
    return running_sum(jnp.moveaxis(chunk.decays, 1, 3), axis=3)


def decay_within(chunk: Chunk, sums: RunningSum) -> Float[Array, "b g p n t"]:
    """exp(G_n - G_j) of the chunk's pairs; 0 where n does not see j."""
    visible = same_segment(chunk.segments, chunk.segments) & jnp.tri(chunk.segments.shape[1], dtype=bool)[None]
    return jnp.exp(jnp.where(visible[:, None, None], _of_each_head(between)(sums, sums), NEG))


def decay_since(state: SignedState, chunk: Chunk, sums: RunningSum) -> Float[Array, "b n g p"]:
    """exp(G_n) from the state to each token; 0 where the token is of another segment."""
    reads = (chunk.segments == state.segment[:, None]) & (chunk.segments != 0)
    return jnp.exp(jnp.where(reads[:, :, None, None], jnp.moveaxis(sums.value(), 3, 1), NEG))


def fold(state: SignedState, chunk: Chunk, sums: RunningSum) -> SignedState:
    """The state with the chunk's last segment added, which replaces any segment before it."""
    last = jax.vmap(last_nonzero)(chunk.segments)
    newest = jnp.take_along_axis(chunk.segments, jnp.maximum(last, 0)[:, None], axis=1)[:, 0]
    segment = jnp.where(last >= 0, newest, state.segment)
    member = (chunk.segments == segment[:, None]) & (chunk.segments != 0)
    to_the_end = _of_each_head(to_end)(sums)
    added = jnp.exp(jnp.where(member[:, None, None], to_the_end.keys, NEG))  # [b, g, p, n]
    kept = jnp.exp(jnp.where((segment == state.segment)[:, None, None], to_the_end.state, NEG))  # [b, g, p]
    values = chunk.values.astype(added.dtype) * jnp.moveaxis(added, 3, 1)[..., None]
    new = matmul("btgd,btgpe->bgpde", chunk.keys, values, chunk.values.dtype)
    new = new + grouped(state.values, chunk) * kept[..., None, None]
    return SignedState(new.reshape(state.values.shape), segment)


def grouped(values: Float[Array, "b h d dv"], chunk: Chunk) -> Float[Array, "b g p d dv"]:
    """S by key head."""
    return values.reshape(len(values), *chunk.values.shape[2:4], *values.shape[2:])


def as_chunk(q: Array, k: Array, v: Array, log_decay: Array, segment_ids: Array | None, state: SignedState) -> Chunk:
    """All tokens with their heads grouped. Padding becomes zeros: 0 * NaN would reach the sums and the gradients."""
    batch, length, groups, dim = k.shape
    decays = decay_per_token(log_decay, batch, length, q.dtype)
    if segment_ids is None:
        segment_ids = jnp.broadcast_to(jnp.maximum(state.segment, 1)[:, None], (batch, length))
    segment_ids = segment_ids.astype(jnp.int32)
    real = (segment_ids != 0)[:, :, None, None]
    q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
    queries = q.reshape(batch, length, groups, q.shape[2] // groups, dim)
    values = v.reshape(batch, length, groups, v.shape[2] // groups, v.shape[3])
    decays = jnp.where(real[..., 0], decays, 0).reshape(values.shape[:4])
    return Chunk(queries, k, values, decays, segment_ids)


def known_state(state: SignedState | None, q: Array, v: Array) -> SignedState:
    """The state, or an empty one for None. Raises UserError for one of other sizes."""
    shape = (q.shape[0], v.shape[2], q.shape[3], v.shape[3])
    if state is None:
        return init_signed_state(*shape, q.dtype)
    state = jax.tree.map(jnp.asarray, state)
    if state.values.shape != shape:
        raise UserError(
            f"the state was made for [batch, value heads, key size, value size] = {state.values.shape}; these inputs "
            f"have {shape}"
        )
    return state


def check_heads(q: Array, k: Array, v: Array, segment_ids: Array | None, chunk_size: int) -> None:
    """Raises UserError where shapes or dtypes do not fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise UserError(f"{name} has shape {x.shape}; expected [batch, length, heads, size]")
    heads = [x.shape[2] for x in (q, k, v)]
    if k.shape != (*q.shape[:2], heads[1], q.shape[3]) or v.shape[:2] != k.shape[:2] or 0 in heads:
        raise UserError(
            f"q {q.shape}, k {k.shape} and v {v.shape} do not fit: [B, L, Hq, d], [B, L, Hk, d], [B, L, Hv, dv]"
        )
    if heads[0] % heads[1] or heads[2] % heads[1] or heads[1] not in (heads[0], heads[2]):
        raise UserError(
            f"q, k and v have {heads[0]}, {heads[1]} and {heads[2]} heads: Hq and Hv must be multiples of Hk, and one "
            "of them equal to it"
        )
    if len({q.dtype, k.dtype, v.dtype}) > 1 or q.dtype not in (jnp.bfloat16, jnp.float32, jnp.float64):
        raise UserError(
            f"q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}; they must share one of bfloat16, float32, "
            "float64"
        )
    if segment_ids is not None and segment_ids.shape != q.shape[:2]:
        raise UserError(f"segment_ids have shape {segment_ids.shape}; expected {q.shape[:2]}")
    if chunk_size < 1:
        raise UserError(f"chunk_size = {chunk_size} must be positive")
