"""Exact softmax attention through the fastest backend the device has."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def exact_attention(
    q: Float[Array, "b n hq d"],
    k: Float[Array, "b t hkv d"],
    v: Float[Array, "b t hkv dv"],
    *,
    query_segments: Int[Array, "b n"],
    key_segments: Int[Array, "b t"],
    query_positions: Int[Array, "b n"],
    key_positions: Int[Array, "b t"],
) -> Float[Array, "b n hq dv"]:
    """softmax(q k^T / sqrt(d)) v over the keys of the query's segment at its position or before; 0 is padding.

    cuDNN's flash attention for half precision on an NVIDIA GPU, XLA elsewhere. Padded queries get zero.
    """
    visible = query_segments[:, :, None] == key_segments[:, None, :]
    visible &= key_positions[:, None, :] <= query_positions[:, :, None]
    is_token = query_segments != 0
    # A padded query sees key 0, so that its softmax is defined, and is cleared below.
    first = jnp.arange(k.shape[1]) == 0
    mask = jnp.where(is_token[:, :, None], visible, first[None, None, :])[:, None]
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    on_gpu = jax.default_backend() in ("gpu", "cuda")
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn" if half and on_gpu else "xla")
    return jnp.where(is_token[:, :, None, None], out, 0)
