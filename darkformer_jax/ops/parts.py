"""The two parts of hybrid attention, apart: keys that are seen exactly, and keys that are seen through features.

    out = normalized(merge_sums(near_sums(q, k, v), far_sums(kernel, q, k, v)))

is `dark_attention` with a window whose kernel is softmax's. Only the second part depends on M, w and the gain: who fits
them computes the first once. The far part of a whole sequence needs no scan over chunks: the summaries of all chunks
are made at once, and a prefix sum (`merge_far` is associative) gives the state that each chunk reads. That takes
(L / chunk_size) m (dv + 2) numbers per head, which a scan would keep for its backward pass anyway.

Rows are whole documents, one each, without padding and without a decay.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from darkformer_jax.ops.attend import group_size, normalize
from darkformer_jax.ops.features import RandomFeatures, positive_random_features
from darkformer_jax.ops.linear import Kernel, KernelArrays, Sums, Tokens, fold, merge_sums, read_far, weighted_sums
from darkformer_jax.ops.scan import SUM_AXES, TOKEN_AXES, over_heads, scan_window
from darkformer_jax.ops.state import FarState, empty_state, init_state, merge_far


def near_sums(
    q: Float[Array, "b n hq d"],
    k: Float[Array, "b n hkv d"],
    v: Float[Array, "b n hkv dv"],
    *,
    scale: float,
    chunk_size: int,
    window: int,
    num_sinks: int,
) -> Sums:
    """Sums of exp(scale q.k) v and exp(scale q.k) over the keys that a query sees exactly.

    Returns:
      Sums with leading axes [b, n, hkv, hq / hkv]. `far_sums` of m features has sums that are m times as large: see
      `joined`.
    """
    num_kv_heads, dim = k.shape[2:]
    kernel = Kernel(
        KernelArrays(RandomFeatures(jnp.zeros((num_kv_heads, 0, dim), jnp.float32))),
        positive_random_features,
        scale,
        "softmax",
    )
    state = init_state(len(q), num_kv_heads, dim, v.shape[-1], 0, q.dtype, chunk_size, window, num_sinks)
    tokens = _documents(q, k, v)
    _, sums = scan_window(kernel, state, tokens, chunk_size=chunk_size, resumed=False, return_state=False)
    return sums


def far_sums(
    kernel: Kernel,
    q: Float[Array, "b n hq d"],
    k: Float[Array, "b n hkv d"],
    v: Float[Array, "b n hkv dv"],
    *,
    chunk_size: int,
    window: int,
    num_sinks: int,
) -> Sums:
    """Sums over features of the keys that a query does not see exactly, with leading axes [b, n, hkv, hq / hkv].

    Args:
      kernel: with the arrays of all key/value heads.
    """
    one_head = functools.partial(_far_of_head, chunk_size=chunk_size, behind=window // chunk_size, num_sinks=num_sinks)
    return over_heads(kernel, one_head, (TOKEN_AXES,), SUM_AXES)(_documents(q, k, v))


def joined(near: Sums, far: Sums, num_features: int) -> Float[Array, "b n hq dv"]:
    """The output of attention to both parts, under one normaliser. Sums over features leave out 1/m, so near gets m."""
    near = near._replace(log_scale=near.log_scale + jnp.log(jnp.asarray(num_features, near.log_scale.dtype)))
    sums = merge_sums(near, far)
    out = normalize(sums.numerator, sums.denominator)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])


def _documents(q: Array, k: Array, v: Array) -> Tokens:
    batch, length = q.shape[:2]
    places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    grouped = q.reshape(batch, length, k.shape[2], group_size(q, k), q.shape[-1])
    return Tokens(grouped, k, v, jnp.ones((batch, length), jnp.int32), places)


def _far_of_head(kernel: Kernel, tokens: Tokens, *, chunk_size: int, behind: int, num_sinks: int) -> Sums:
    """behind: chunks of the window; a query's own chunk is not far either."""
    length = len(tokens.segments)
    missing = -length % chunk_size  # zeros at the end are padding, segment 0
    padded = jax.tree.map(lambda leaf: jnp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1)), tokens)
    log_q, log_k = kernel.log_features(padded.queries), kernel.log_features(padded.keys)

    def chunked(leaf: Array) -> Array:
        return leaf.reshape(-1, chunk_size, *leaf.shape[1:])

    empty = empty_state(
        num_features=log_k.shape[-1],
        key_dim=tokens.keys.shape[-1],
        value_dim=tokens.values.shape[-1],
        recent=0,
        num_sinks=num_sinks,
        has_decay=False,
        dtype=tokens.keys.dtype,
    )

    def summary(chunk: Tokens, log_k: Array) -> FarState:
        return fold(kernel, empty.far, empty.sinks, chunk.recent(), None, log_k)[0]

    def read(chunk: Tokens, log_q: Array, far: FarState) -> Sums:
        scores = read_far(kernel, chunk.queries, chunk.segments, far, None, log_q)
        return weighted_sums(scores, far, scores[..., :0], chunk.values[:0])

    chunks = jax.tree.map(chunked, padded)
    merged = jax.lax.associative_scan(merge_far, jax.vmap(summary)(chunks, chunked(log_k)))
    nothing = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (behind + 1, *leaf.shape)), empty.far)
    before = jax.tree.map(lambda first, after: jnp.concatenate([first, after])[: len(after)], nothing, merged)
    sums = jax.vmap(read)(chunks, chunked(log_q), before)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:length], sums)
