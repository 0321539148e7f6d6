"""The two parts of hybrid attention, apart: keys that are seen exactly, and keys that are seen through features.

    out = joined(near_sums(q, k, v), far_sums(kernel, q, k, v), m)

is `dark_attention` with a window whose kernel is softmax's. Only the second part depends on M, w and the gain: who fits
them computes the first once. The far part of a whole sequence needs no scan over chunks: the summaries of all chunks
are made at once, and a prefix sum (`merge_far` is associative) gives the state that each chunk reads. That takes
(L / chunk_size) m (dv + 2) numbers per head, which a scan would keep for its backward pass anyway. It can also be read
by some of the queries only, at less cost.

Rows are whole documents, one each, without padding and without a decay.
"""

import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from darkformer_jax.ops.attend import group_size, normalize
from darkformer_jax.ops.features import RandomFeatures, positive_random_features
from darkformer_jax.ops.linear import (
    Kernel,
    KernelArrays,
    Sums,
    Tokens,
    fold,
    log_far_weight,
    merge_sums,
    read_far,
    weighted_sums,
)
from darkformer_jax.ops.scan import SUM_AXES, over_heads, scan_chunks, scan_window
from darkformer_jax.ops.state import FarState, Recent, empty_state, init_state, merge_far

Tree = TypeVar("Tree")


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
      Sums with leading axes [b, n, hkv, hq / hkv]. Those of `far_sums` are m times as large: see `joined`.
    """
    batch, length, num_kv_heads, dim = k.shape
    nothing = RandomFeatures(jnp.zeros((num_kv_heads, 0, dim), jnp.float32))
    kernel = Kernel(KernelArrays(nothing), positive_random_features, scale, "softmax")
    state = init_state(batch, num_kv_heads, dim, v.shape[-1], 0, q.dtype, chunk_size, window, num_sinks)
    places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    tokens = Tokens(_grouped(q, k), k, v, jnp.ones_like(places), places)
    _, sums = scan_window(
        kernel, state, tokens, chunk_size=chunk_size, resumed=False, return_state=False, over_chunks=scan_chunks
    )
    return sums


def far_sums(
    kernel: Kernel,
    q: Float[Array, "b p hq d"],
    k: Float[Array, "b n hkv d"],
    v: Float[Array, "b n hkv dv"],
    *,
    chunk_size: int,
    window: int,
    num_sinks: int,
    stride: int = 1,
) -> Sums:
    """Sums over features of the keys that a query does not see exactly, with leading axes [b, p, hkv, hq / hkv].

    Args:
      kernel: with the arrays of all key/value heads.
      q: the queries of tokens s, s + stride, s + 2 stride, ... for some s < stride. k and v are of all tokens.
      stride: divides chunk_size. A far_horizon takes s for 0.
    """
    behind = window // chunk_size + 1  # a query sees its own chunk and the window exactly
    states = functools.partial(_states, chunk_size=chunk_size, num_sinks=num_sinks, behind=behind)

    def one_head(kernel: Kernel, queries: Array, keys: Array, values: Array) -> Sums:
        return _read(kernel, queries, states(kernel, keys, values), chunk_size // stride, stride)

    return over_heads(kernel, one_head, (1, 1, 1), SUM_AXES)(_grouped(q, k), k, v)


def joined(near: Sums, far: Sums, num_features: int) -> Float[Array, "b p hq dv"]:
    """The output of attention to both parts, under one normaliser. Sums over features leave out 1/m, so near gets m."""
    near = near._replace(log_scale=near.log_scale + jnp.log(jnp.asarray(num_features, near.log_scale.dtype)))
    sums = merge_sums(near, far)
    out = normalize(sums.numerator, sums.denominator)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])


def _grouped(q: Array, k: Array) -> Array:
    return q.reshape(*q.shape[:2], k.shape[2], group_size(q, k), q.shape[-1])


def _states(kernel: Kernel, keys: Array, values: Array, *, chunk_size: int, num_sinks: int, behind: int) -> FarState:
    """The far state that each chunk of one head reads, of the keys up to `behind` chunks before it."""
    places = jnp.arange(len(keys), dtype=jnp.int32)
    chunks = _chunked(Recent(keys, values, jnp.ones_like(places), places), chunk_size)  # padding is of segment 0
    log_k = kernel.log_features(chunks.keys)
    sizes = {"num_features": log_k.shape[-1], "key_dim": keys.shape[-1], "value_dim": values.shape[-1]}
    empty = empty_state(**sizes, recent=0, num_sinks=num_sinks, has_decay=False, dtype=keys.dtype)

    def summary(chunk: Recent, log_k: Array) -> FarState:
        return fold(kernel, empty.far, empty.sinks, chunk, None, log_k)[0]

    merged = jax.lax.associative_scan(merge_far, jax.vmap(summary)(chunks, log_k))
    nothing = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (behind, *leaf.shape)), empty.far)
    return jax.tree.map(lambda first, after: jnp.concatenate([first, after])[: len(after)], nothing, merged)


def _read(kernel: Kernel, queries: Array, states: FarState, per_chunk: int, stride: int) -> Sums:
    """Sums over the far keys of one head's queries, `per_chunk` of which read the same state."""
    chunks = _chunked(queries, per_chunk)
    states = jax.tree.map(lambda leaf: leaf[: len(chunks)], states)  # the last chunk may have no query

    log_q, bounds = kernel.log_features(chunks), None
    if kernel.far_horizon:
        places = stride * jnp.arange(log_q.shape[0] * per_chunk, dtype=log_q.dtype)
        bounds = log_far_weight(kernel.far_horizon, places).reshape(-1, per_chunk)

    def one_chunk(queries: Array, log_q: Array, far: FarState, bound: Array | None) -> Sums:
        scores = read_far(kernel, queries, jnp.ones(per_chunk, jnp.int32), far, bound, log_q)
        return weighted_sums(scores, far, scores[..., :0], jnp.zeros((0, far.values.shape[-1]), queries.dtype))

    sums = jax.vmap(one_chunk)(chunks, log_q, states, bounds)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[: len(queries)], sums)


def _chunked(tokens: Tree, size: int) -> Tree:
    """[n, ...] -> [chunks, size, ...] of every leaf, with zeros at the end."""

    def split(leaf: Array) -> Array:
        padded = jnp.pad(leaf, [(0, -len(leaf) % size)] + [(0, 0)] * (leaf.ndim - 1))
        return padded.reshape(-1, size, *leaf.shape[1:])

    chunks: Tree = jax.tree.map(split, tokens)
    return chunks
