"""Exact softmax attention through the fastest backend that covers the case."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from darkformer_jax.errors import UserError
from darkformer_jax.ops.features import matmul
from darkformer_jax.ops.lowering import target_platform
from darkformer_jax.ops.state import NEG

Backend = Literal["cudnn", "xla", "plain"]


def exact_attention(
    q: Float[Array, "b n hq d"],
    k: Float[Array, "b t hkv d"],
    v: Float[Array, "b t hkv dv"],
    *,
    query_segments: Int[Array, "b n"],
    key_segments: Int[Array, "b t"],
    query_positions: Int[Array, "b n"],
    key_positions: Int[Array, "b t"],
    scale: float | None = None,
    softcap: float = 0.0,
    local_window: int = 0,
    causal: bool = True,
    bias: Float[Array, "b hkv n t"] | None = None,
) -> Float[Array, "b n hq dv"]:
    """softmax(cap(scale q k^T) + bias) v over the visible keys: those of the query's segment, not after its position.

    Each group of hq / hkv consecutive query heads shares one key/value head. Segment 0 is padding: its keys are not
    seen, and its outputs are 0.

    Args:
      scale: of the logits; None is d^-0.5.
      softcap: cap(x) = softcap tanh(x / softcap); 0 = x.
      local_window: a query sees only keys less than this many positions before its own; 0 = all.
      causal: False: a query sees the whole of its segment, whatever the positions; local_window must be 0.
      bias: shared by the query heads of a key/value head, such as a decay with the distance.

    Raises:
      UserError: for a local_window without causal.
    """
    if local_window and not causal:
        raise UserError(f"local_window = {local_window} with causal=False: a window looks back only; allowed: 0")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    visible = query_segments[:, :, None] == key_segments[:, None, :]
    if causal:
        visible &= key_positions[:, None, :] <= query_positions[:, :, None]
    if local_window:
        visible &= key_positions[:, None, :] > query_positions[:, :, None] - local_window
    is_token = query_segments != 0
    # A padded query sees key 0, so that its softmax is defined, and is cleared below.
    first = jnp.arange(k.shape[1]) == 0
    mask = jnp.where(is_token[:, :, None], visible, first[None, None, :])
    backend = choose_backend(q, k, softcap, bias is not None)
    if backend == "plain":
        out = _plain_attention(q, k, v, mask, scale, softcap, bias)
    else:
        out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale, implementation=backend)
    return jnp.where(is_token[:, :, None, None], out, 0)


def choose_backend(
    q: Float[Array, "b n hq d"], k: Float[Array, "b t hkv d"], softcap: float, has_bias: bool = False
) -> Backend:
    """Which backend computes a case, and why.

    plain: any case with a softcap, which `jax.nn.dot_product_attention` does not have, or with a bias, which it would
           repeat for each query head. Logits are held whole.
    cudnn: half precision on an NVIDIA GPU, where cuDNN's flash attention takes it: d a multiple of 8 up to 128 (256
           from Hopper on), and even lengths n and t (its gradients need them) or one query at a time.
    xla:   everything else; logits are held whole.

    Windows and segments make no difference: they are in the mask, which all three take.
    """
    if softcap or has_bias:
        return "plain"
    if q.dtype not in (jnp.bfloat16, jnp.float16) or target_platform() not in ("gpu", "cuda"):
        return "xla"
    capability = float(getattr(jax.devices()[0], "compute_capability", 0))
    heads_fit = q.shape[3] % 8 == 0 and q.shape[3] <= (256 if capability >= 9 else 128)
    lengths_fit = q.shape[1] == 1 or (q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0)
    return "cudnn" if heads_fit and lengths_fit else "xla"


def _plain_attention(
    q: Float[Array, "b n hq d"],
    k: Float[Array, "b t hkv d"],
    v: Float[Array, "b t hkv dv"],
    mask: Bool[Array, "b n t"],
    scale: float,
    softcap: float,
    bias: Float[Array, "b hkv n t"] | None,
) -> Float[Array, "b n hq dv"]:
    """`exact_attention` as it is written, with logits, softcap, bias and softmax in float32."""
    batch, length, num_heads, dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], num_heads // k.shape[2], dim)
    logits = scale * matmul("bnkgd,btkd->bkgnt", grouped, k, q.dtype)
    logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
    logits = logits if bias is None else logits + bias[:, :, None].astype(logits.dtype)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, NEG), axis=-1)
    out = matmul("bkgnt,btkd->bnkgd", weights, v, v.dtype)
    return out.reshape(batch, length, num_heads, v.shape[3]).astype(v.dtype)
