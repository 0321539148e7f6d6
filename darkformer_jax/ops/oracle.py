"""The definition, without any of the care: every pair of tokens, every feature. Quadratic; run it in float64."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from darkformer_jax.ops.features import log_positive_features
from darkformer_jax.ops.linear import WindowKernel

_Kernel = tuple[Array | None, Array | None, Array | None]  # w, M, log_weights


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
) -> Float[Array, "b n hq dv"]:
    """What `dark_attention` computes, from its definition: logsumexp over features, softmax over keys.

    Shapes and arguments as there; `segment_ids` must not decrease but for 0 (padding) at the end.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    ids = jnp.ones(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids

    def one_head(q: Array, k: Array, v: Array, gain: Array, kernel: _Kernel, ids: Array) -> Array:
        w, m, log_weights = kernel
        point_q, point_k = (q, k) if m is None or window_kernel == "softmax" else (q @ m.T, k @ m.T)
        exact = scale * point_q @ point_k.T
        visible = (ids[:, None] == ids[None, :]) & (ids != 0)[None, :]
        if causal:
            visible &= jnp.tri(length, dtype=bool)
        searchable = jnp.where(ids == 0, jnp.iinfo(jnp.int32).max, ids)
        near = exact_mask(searchable, chunk_size=chunk_size, window=window, num_sinks=num_sinks)
        if w is None:
            logits = jnp.where(near, exact, -jnp.inf)
        else:
            log_q = log_positive_features(q, w, m, scale, log_weights)
            log_k = log_positive_features(k, w, m, scale, log_weights)

            def row(log_query: Array) -> Array:
                return jax.nn.logsumexp(log_query[None, :] + log_k, axis=-1) - jnp.log(w.shape[0])

            logits = jnp.where(near, exact, gain + jax.lax.map(row, log_q))
        any_visible = jnp.any(visible, axis=1, keepdims=True)
        weights = jax.nn.softmax(jnp.where(visible | ~any_visible, logits, -jnp.inf), axis=-1)
        return jnp.where(any_visible, weights @ v, 0)

    over_heads = jax.vmap(one_head, in_axes=(1, 1, 1, 0, 0, None), out_axes=1)
    over_group = jax.vmap(over_heads, in_axes=(2, None, None, 1, None, None), out_axes=2)
    grouped = q.reshape(*q.shape[:2], k.shape[2], group, q.shape[3])
    gain = (jnp.zeros(q.shape[2], q.dtype) if log_gain is None else log_gain).reshape(k.shape[2], group)
    over_batch = jax.vmap(over_group, in_axes=(0, 0, 0, None, None, 0))
    out = over_batch(grouped, k, v, gain, (projections, geometry, log_weights), ids)
    return out.reshape(*q.shape[:3], v.shape[-1])
