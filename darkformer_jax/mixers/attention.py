"""The attention mixer: projections, grouped heads, QK-norm and RoPE around a mechanism of q, k and v."""

import abc
import functools
from typing import Any, ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from darkformer_jax.distributed.sharding import constrain
from darkformer_jax.mixers.layers import Linear, RMSNorm
from darkformer_jax.mixers.mixer import MixerKind
from darkformer_jax.mixers.positions import rope as rotate
from darkformer_jax.mixers.spec import MixerSpec


class Mechanism(MixerKind):
    """Maps q, k and v to mixed values; `build` puts an `Attention` around it.

    Attributes:
      reads_q_and_k: False if the weights depend on neither q nor k, which then need not be computed.
    """

    reads_q_and_k: ClassVar[bool] = True

    def __init__(self, spec: MixerSpec, layer: int | Array) -> None:
        self.spec = spec

    @classmethod
    def build(cls, spec: MixerSpec, layer: int | Array, *, rngs: nnx.Rngs) -> "Attention":
        return Attention(spec, cls(spec, layer), rngs=rngs)

    @classmethod
    def flops(cls, spec: MixerSpec, length: int) -> float:
        width = (spec.num_heads + spec.num_kv_heads) * spec.head_dim
        projections = (4 if cls.reads_q_and_k else 2) * spec.embed_dim * width
        return projections + cls.mixing_flops(spec, length)

    @classmethod
    @abc.abstractmethod
    def mixing_flops(cls, spec: MixerSpec, length: int) -> float:
        """Forward FLOPs per token of the mechanism alone, without the projections to q, k, v and out."""

    @abc.abstractmethod
    def init_state(self, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> Any:
        """As `Mixer.init_state`."""

    @abc.abstractmethod
    def __call__(
        self,
        q: Float[Array, "b n hq d"],
        k: Float[Array, "b n hkv d"],
        v: Float[Array, "b n hkv d"],
        *,
        segment_ids: Int[Array, "b n"],
        positions: Int[Array, "b n"],
        state: Any = None,
    ) -> tuple[Float[Array, "b n hq d"], Any]:
        """Attention within segments, causal if the spec says so."""


class Attention(nnx.Module):
    """x -> y: q, k, v = x Wq, x Wk, x Wv (plus biases); RMSNorm of q and k if asked; RoPE; the mechanism; Wo."""

    def __init__(self, spec: MixerSpec, mechanism: Mechanism, *, rngs: nnx.Rngs) -> None:
        self.rope = spec.rope
        shape = (spec.embed_dim, spec.num_heads, spec.head_dim)
        kv_shape = (spec.embed_dim, spec.num_kv_heads, spec.head_dim)
        linear = functools.partial(Linear, rank=spec.lora_rank, rngs=rngs, dtype=spec.dtype)
        self.q = linear(shape, ("embed", "heads", None), use_bias=spec.qkv_bias)
        self.k = linear(kv_shape, ("embed", "kv_heads", None), use_bias=spec.qkv_bias)
        self.v = linear(kv_shape, ("embed", "kv_heads", None), use_bias=spec.qkv_bias)
        self.out = linear((spec.num_heads, spec.head_dim, spec.embed_dim), ("heads", None, "embed"), num_inputs=2)
        norm = functools.partial(RMSNorm, spec.head_dim, spec.norm_eps, spec.norm_plus_one, axis=None)
        self.q_norm = norm() if spec.qk_norm else None
        self.k_norm = norm() if spec.qk_norm else None
        self.mechanism = mechanism

    def __call__(self, x: Array, segment_ids: Array, positions: Array, state: Any = None) -> tuple[Array, Any]:
        """(y, the mechanism's state). x and y are [b, n, embed_dim], segment_ids and positions [b, n]."""
        q, k, v = self.project(x, positions)
        mixed, state = self.mechanism(q, k, v, segment_ids=segment_ids, positions=positions, state=state)
        return self.out(constrain(mixed, "batch", "sequence", "heads", None)), state

    def init_state(self, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> Any:
        """The mechanism's state."""
        return self.mechanism.init_state(batch, max_length, dtype)

    def project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """q [b, n, hq, d], k and v [b, n, hkv, d] as the mechanism sees them: normed, rotated, not yet scaled."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, positions, self.rope), rotate(k, positions, self.rope)
        q = constrain(q, "batch", "sequence", "heads", None)
        k = constrain(k, "batch", "sequence", "kv_heads", None)
        return q, k, constrain(v, "batch", "sequence", "kv_heads", None)
