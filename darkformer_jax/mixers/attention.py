"""One attention layer: projections, grouped heads, QK-norm and RoPE around a mechanism."""

import functools
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from darkformer_jax.distributed.sharding import constrain
from darkformer_jax.mixers import MECHANISMS
from darkformer_jax.mixers.layers import Linear, RMSNorm
from darkformer_jax.mixers.positions import RopeSpec
from darkformer_jax.mixers.positions import rope as rotate
from darkformer_jax.mixers.spec import AttentionSpec


class Attention(nnx.Module):
    """x -> x: q, k, v = x Wq, x Wk, x Wv (plus biases); RMSNorm of q and k if asked; RoPE; the mechanism; Wo."""

    def __init__(
        self,
        spec: AttentionSpec,
        kind: str,
        embed_dim: int,
        *,
        rope: RopeSpec,
        qk_norm: bool,
        qkv_bias: bool,
        norm_eps: float,
        norm_plus_one: bool,
        lora_rank: int = 0,
        dtype: jax.typing.DTypeLike,
        layer: int | Array,
        rngs: nnx.Rngs,
    ) -> None:
        self.rope = rope
        shape = (embed_dim, spec.num_heads, spec.head_dim)
        kv_shape = (embed_dim, spec.num_kv_heads, spec.head_dim)
        linear = functools.partial(Linear, rank=lora_rank, rngs=rngs, dtype=dtype)
        self.q = linear(shape, ("embed", "heads", None), use_bias=qkv_bias)
        self.k = linear(kv_shape, ("embed", "kv_heads", None), use_bias=qkv_bias)
        self.v = linear(kv_shape, ("embed", "kv_heads", None), use_bias=qkv_bias)
        self.out = linear((spec.num_heads, spec.head_dim, embed_dim), ("heads", None, "embed"), num_inputs=2)
        self.q_norm = RMSNorm(spec.head_dim, norm_eps, norm_plus_one, axis=None) if qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, norm_eps, norm_plus_one, axis=None) if qk_norm else None
        self.mechanism = MECHANISMS[kind](spec, layer)

    def __call__(self, x: Array, segment_ids: Array, positions: Array, state: Any = None) -> tuple[Array, Any]:
        """x [b, n, embed_dim]; segment_ids and positions [b, n]. Returns the same shape and the mechanism's state."""
        q, k, v = self.project(x, positions)
        mixed, state = self.mechanism(q, k, v, segment_ids=segment_ids, positions=positions, state=state)
        return self.out(constrain(mixed, "batch", "sequence", "heads", None)), state

    def project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """q [b, n, hq, d], k and v [b, n, hkv, d] as the mechanism sees them: normed, rotated, not yet scaled."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, positions, self.rope), rotate(k, positions, self.rope)
        q = constrain(q, "batch", "sequence", "heads", None)
        k = constrain(k, "batch", "sequence", "kv_heads", None)
        return q, k, constrain(v, "batch", "sequence", "kv_heads", None)
