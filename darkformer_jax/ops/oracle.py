"""The definition, which takes no care of overflow: every pair of tokens, every feature. Quadratic; for float64."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from darkformer_jax.ops.features import FeatureMap, log_positive_features
from darkformer_jax.ops.linear import WindowKernel


def exact_mask(segment_ids: Int[Array, "n"], *, chunk_size: int, window: int, num_sinks: int) -> Bool[Array, "n n"]:
    """Which keys a query sees through the exact kernel: own chunk, `window` tokens before it, sinks of its document."""
    index = jnp.arange(segment_ids.shape[0], dtype=jnp.int32)
    window_start = (index // chunk_size) * chunk_size - window
    first = jnp.searchsorted(segment_ids, segment_ids)  # of the token's document; ids must not decrease
    near = index[None, :] >= window_start[:, None]
    sink = (index - first)[None, :] < num_sinks
    return (near | sink) & (window > 0)


def dark_attention_oracle(
    q: Float[Array, "b n hq d"],
    k: Float[Array, "b n hkv d"],
    v: Float[Array, "b n hkv dv"],
    *,
    projections: Float[Array, "hkv m r"] | None,
    geometry: Float[Array, "hkv r d"] | None = None,
    causal: bool = True,
    segment_ids: Int[Array, "b n"] | None = None,
    scale: float | None = None,
    chunk_size: int = 128,
    window: int = 0,
    num_sinks: int = 0,
    window_kernel: WindowKernel = "dark",
    log_weights: Float[Array, "hkv m"] | None = None,
    log_gain: Float[Array, "hq"] | None = None,
    far_horizon: int = 0,
    log_decay: Float[Array, "hkv"] | Float[Array, "b n hkv"] | None = None,
) -> Float[Array, "b n hq dv"]:
    """What `dark_attention` computes, from its definition: logsumexp over features, softmax over keys.

    Shapes and arguments as there; `segment_ids` must not decrease, except to 0 (padding) at the end.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    ids = jnp.ones(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids

    def one_head(q: Array, k: Array, v: Array, ids: Array, decay: Array, kernel: Any, gain: Array) -> Array:
        w, m, log_weights = kernel
        point_q, point_k = (q, k) if m is None or window_kernel == "softmax" else (q @ m.T, k @ m.T)
        exact = scale * point_q @ point_k.T
        searchable = jnp.where(ids == 0, jnp.iinfo(jnp.int32).max, ids)
        near = exact_mask(searchable, chunk_size=chunk_size, window=window, num_sinks=num_sinks)
        if w is None:
            logits = jnp.where(near, exact, -jnp.inf)
        else:
            log_q, log_k = (log_positive_features(x, w, m, scale, log_weights) for x in (q, k))
            far = gain + _feature_logits(log_q, log_k) - jnp.log(w.shape[0])
            if far_horizon:
                index = jnp.arange(ids.shape[0], dtype=jnp.int32)
                nth = index - jnp.searchsorted(searchable, searchable) + 1  # of its document
                far += jnp.log(jnp.minimum(1.0, far_horizon / nth.astype(q.dtype)))[:, None]
            logits = jnp.where(near, exact, far)
        return _weighted_mean(logits + decay, _visible(ids, causal), v)

    gain = jnp.zeros(q.shape[2], q.dtype) if log_gain is None else log_gain
    return _over_heads(one_head, q, k, v, ids, log_decay, (projections, geometry, log_weights), gain)


def linear_attention_oracle(
    q: Float[Array, "b n hq d"],
    k: Float[Array, "b n hkv d"],
    v: Float[Array, "b n hkv dv"],
    *,
    feature_map: FeatureMap,
    feature_arrays: Any = None,
    causal: bool = True,
    segment_ids: Int[Array, "b n"] | None = None,
    log_decay: Float[Array, "hkv"] | Float[Array, "b n hkv"] | None = None,
) -> Float[Array, "b n hq dv"]:
    """What `linear_attention` computes, from its definition. Shapes and arguments as there."""
    ids = jnp.ones(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids

    def one_head(q: Array, k: Array, v: Array, ids: Array, decay: Array, arrays: Any, _: None) -> Array:
        logits = _feature_logits(feature_map(arrays, q, 1.0), feature_map(arrays, k, 1.0))
        return _weighted_mean(logits + decay, _visible(ids, causal), v)

    return _over_heads(one_head, q, k, v, ids, log_decay, feature_arrays, None)


def signed_attention_oracle(
    q: Float[Array, "b n hq d"],
    k: Float[Array, "b n hk d"],
    v: Float[Array, "b n hv dv"],
    log_decay: Float[Array, "hv"] | Float[Array, "b n hv"],
    *,
    segment_ids: Int[Array, "b n"] | None = None,
) -> Float[Array, "b n h dv"]:
    """What `signed_attention` computes, from its definition. Shapes and arguments as there."""
    ids = jnp.ones(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    num_heads = max(q.shape[2], v.shape[2])
    q, k, v = (jnp.repeat(x, num_heads // x.shape[2], axis=2) for x in (q, k, v))
    decay = _between_tokens(log_decay, ids, log_decay.shape[-1])
    decay = jnp.repeat(decay, num_heads // log_decay.shape[-1], axis=1)
    visible = jax.vmap(lambda row: _visible(row, True))(ids)[:, None]
    weights = jnp.einsum("bnhd,bthd->bhnt", q, k) * jnp.exp(jnp.where(visible, decay, -jnp.inf))
    return jnp.einsum("bhnt,bthe->bnhe", weights, v)


def delta_rule_oracle(
    q: Float[Array, "b n hq d"],
    k: Float[Array, "b n hk d"],
    v: Float[Array, "b n hv dv"],
    beta: Float[Array, "b n hv"],
    log_decay: Float[Array, "b n hv"],
    *,
    segment_ids: Int[Array, "b n"] | None = None,
) -> Float[Array, "b n h dv"]:
    """What `delta_rule_attention` computes, one token after the other. Shapes and arguments as there."""
    ids = jnp.ones(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    num_heads = max(q.shape[2], v.shape[2])
    q, k, v, beta, log_decay = (jnp.repeat(x, num_heads // x.shape[2], axis=2) for x in (q, k, v, beta, log_decay))

    def one_head(q: Array, k: Array, v: Array, beta: Array, decay: Array, ids: Array) -> Array:
        def step(carry: tuple[Array, Array], token: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
            (S, segment), (q, k, v, beta, decay, own) = carry, token
            S = jnp.where(own == segment, jnp.exp(decay) * S, 0)
            S = S + beta * jnp.outer(k, v - k @ S)
            return (S, own), q @ S

        start = (jnp.zeros((k.shape[1], v.shape[1]), v.dtype), jnp.zeros((), ids.dtype))
        return jax.lax.scan(step, start, (q, k, v, beta, decay, ids))[1]

    heads = jax.vmap(one_head, in_axes=(1, 1, 1, 1, 1, None), out_axes=1)
    return jax.vmap(heads)(q, k, v, beta, log_decay, ids)


def _feature_logits(log_q: Float[Array, "n m"], log_k: Float[Array, "n m"]) -> Float[Array, "n n"]:
    """log sum_i exp(l_i(q) + l_i(k)), one row at a time."""
    return jax.lax.map(lambda query: jax.nn.logsumexp(query[None, :] + log_k, axis=-1), log_q)


def _visible(ids: Int[Array, "n"], causal: bool) -> Bool[Array, "n n"]:
    """Which keys a query sees: those of its document, not later than itself where `causal`."""
    visible = (ids[:, None] == ids[None, :]) & (ids != 0)[None, :]
    return visible & jnp.tri(len(ids), dtype=bool) if causal else visible


def _weighted_mean(
    logits: Float[Array, "n n"], visible: Bool[Array, "n n"], v: Float[Array, "n dv"]
) -> Float[Array, "n dv"]:
    """softmax(logits) v over the visible keys; 0 where there is none."""
    any_visible = jnp.any(visible, axis=1, keepdims=True)
    weights = jax.nn.softmax(jnp.where(visible | ~any_visible, logits, -jnp.inf), axis=-1)
    return jnp.where(any_visible, weights @ v, 0)


def _between_tokens(log_decay: Array | None, ids: Int[Array, "b n"], num_kv_heads: int) -> Float[Array, "b hkv n n"]:
    """-|G_n - G_j| of every pair, with G the sum of the log decays of all tokens up to one; 0 without decay."""
    own = jnp.zeros(num_kv_heads) if log_decay is None else log_decay
    summed = jnp.cumsum(jnp.where((ids != 0)[..., None], own, 0), axis=1)
    apart = (summed[:, :, None] - summed[:, None, :]).transpose(0, 3, 1, 2)
    return jnp.where(jnp.tri(ids.shape[1], dtype=bool), apart, -apart)


def _over_heads(
    one_head: Callable[..., Array],
    q: Array,
    k: Array,
    v: Array,
    ids: Array,
    log_decay: Array | None,
    arrays: Any,
    gain: Array | None,
) -> Float[Array, "b n hq dv"]:
    """one_head(q [n, d], k, v, ids, decay [n, n], arrays, gain) over batch and heads.

    arrays [hkv, ...]; gain [hq] or None.
    """
    num_kv_heads = k.shape[2]
    decay = _between_tokens(log_decay, ids, num_kv_heads)
    grouped = q.reshape(*q.shape[:2], num_kv_heads, -1, q.shape[3])
    grouped_gain = None if gain is None else gain.reshape(num_kv_heads, -1)
    over_heads = jax.vmap(one_head, in_axes=(1, 1, 1, None, 0, 0, 0), out_axes=1)
    over_group = jax.vmap(over_heads, in_axes=(2, None, None, None, None, None, 1), out_axes=2)
    over_batch = jax.vmap(over_group, in_axes=(0, 0, 0, 0, 0, None, None))
    return over_batch(grouped, k, v, ids, decay, arrays, grouped_gain).reshape(*q.shape[:3], v.shape[-1])
