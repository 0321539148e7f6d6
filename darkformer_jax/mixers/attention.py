"""The attention mixer: projections, grouped heads, convolution, QK-norm, positions and decay around a mechanism."""

import abc
import functools
from typing import Any, ClassVar, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from darkformer_jax.distributed.sharding import constrain
from darkformer_jax.errors import UserError
from darkformer_jax.mixers.convolution import ConvolutionState, QKVConvolution
from darkformer_jax.mixers.forgetting import Forgetting
from darkformer_jax.mixers.layers import Linear, RMSNorm
from darkformer_jax.mixers.mixer import MixerKind
from darkformer_jax.mixers.positions import rope as rotate
from darkformer_jax.mixers.spec import MixerSpec

# What `Attention` does around every mechanism; each mechanism adds them to what it uses itself.
ATTENTION_FIELDS = frozenset(
    {"positions", "decay", "shortest_memory", "longest_memory", "undecayed_heads", "conv_width", "qk_norm", "qkv_bias"}
)


class Mechanism(MixerKind):
    """Maps q, k and v to mixed values; `build` puts an `Attention` around it.

    Attributes:
      reads_q_and_k: False if the weights depend on neither q nor k, which then need not be computed.
      shares_q_and_k: whether k is q. There is no projection to k then.
    """

    reads_q_and_k: ClassVar[bool] = True
    shares_q_and_k: ClassVar[bool] = False

    def __init__(self, spec: MixerSpec, layer: int | Array) -> None:
        self.spec = spec

    @classmethod
    def build(cls, spec: MixerSpec, layer: int | Array, *, rngs: nnx.Rngs) -> "Attention":
        return Attention(spec, cls(spec, layer), rngs=rngs)

    @classmethod
    def flops(cls, spec: MixerSpec, length: int) -> float:
        width = (spec.num_heads + spec.num_kv_heads) * spec.head_dim
        projections = (4 if cls.reads_q_and_k else 2) * spec.embed_dim * width
        if cls.shares_q_and_k:
            projections -= 2 * spec.embed_dim * spec.num_kv_heads * spec.head_dim
        convolved = spec.num_kv_heads * spec.head_dim + (width if cls.reads_q_and_k else 0)
        gate = 2 * spec.embed_dim * spec.num_kv_heads if spec.decay == "gate" else 0
        return projections + 2 * spec.conv_width * convolved + gate + cls.mixing_flops(spec, length)

    @classmethod
    def check(cls, spec: MixerSpec) -> None:
        super().check(spec)
        check_attention(spec)

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
        log_decay: Float[Array, "hkv"] | Float[Array, "b n hkv"] | None = None,
        state: Any = None,
    ) -> tuple[Float[Array, "b n hq d"], Any]:
        """Attention within segments, causal if the spec says so. `log_decay` is there if `spec.has_decay`."""


class AttentionLayerState(NamedTuple):
    """What a layer keeps of the tokens so far."""

    mechanism: Any
    convolution: ConvolutionState | None


class Attention(nnx.Module):
    """x -> y: q, k, v = x Wq, x Wk, x Wv (plus biases); their convolution; RMSNorm of q and k; RoPE; mechanism; Wo.

    Convolution, norm, RoPE and the decay that the mechanism gets are there if the spec says so.
    """

    def __init__(self, spec: MixerSpec, mechanism: Mechanism, *, rngs: nnx.Rngs) -> None:
        self.rope = spec.rope if spec.has_rope else None
        shape = (spec.embed_dim, spec.num_heads, spec.head_dim)
        kv_shape = (spec.embed_dim, spec.num_kv_heads, spec.head_dim)
        linear = functools.partial(Linear, rank=spec.lora_rank, rngs=rngs, dtype=spec.dtype)
        self.q = linear(shape, ("embed", "heads", None), use_bias=spec.qkv_bias)
        shared = mechanism.shares_q_and_k
        self.k = None if shared else linear(kv_shape, ("embed", "kv_heads", None), use_bias=spec.qkv_bias)
        self.v = linear(kv_shape, ("embed", "kv_heads", None), use_bias=spec.qkv_bias)
        self.out = linear((spec.num_heads, spec.head_dim, spec.embed_dim), ("heads", None, "embed"), num_inputs=2)
        norm = functools.partial(RMSNorm, spec.head_dim, spec.norm_eps, spec.norm_plus_one, axis=None)
        self.q_norm = norm() if spec.qk_norm else None
        self.k_norm = norm() if spec.qk_norm and not shared else None
        self.mechanism = mechanism
        # Drawn last, so that this layer's other weights are the same with and without them.
        self.convolution = QKVConvolution(spec) if spec.conv_width else None
        self.forgetting = Forgetting(spec, rngs) if spec.has_decay else None

    def __call__(
        self, x: Array, segment_ids: Array, positions: Array, state: AttentionLayerState | None = None
    ) -> tuple[Array, AttentionLayerState | None]:
        """(y, the state after the tokens). x and y are [b, n, embed_dim], segment_ids and positions [b, n]."""
        old = AttentionLayerState(None, None) if state is None else state
        (q, k, v), convolution = self.project(x, segment_ids, positions, old.convolution)
        log_decay = None if self.forgetting is None else self.forgetting(x)
        mixed, new = self.mechanism(
            q, k, v, segment_ids=segment_ids, positions=positions, log_decay=log_decay, state=old.mechanism
        )
        y = self.out(constrain(mixed, "batch", "sequence", "heads", None))
        return y, None if state is None else AttentionLayerState(new, convolution)

    def init_state(self, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> AttentionLayerState:
        """The state before the first token."""
        convolution = None if self.convolution is None else self.convolution.init_state(batch, dtype)
        return AttentionLayerState(self.mechanism.init_state(batch, max_length, dtype), convolution)

    def project(
        self, x: Array, segment_ids: Array, positions: Array, state: ConvolutionState | None = None
    ) -> tuple[tuple[Array, Array, Array], ConvolutionState | None]:
        """(q [b, n, hq, d], k and v [b, n, hkv, d] as the mechanism sees them, not yet scaled), and the new state.

        A mechanism that shares q and k gets q for k.
        """
        q = self.q(x)
        k = q if self.k is None else self.k(x)
        v = self.v(x)
        if self.convolution is not None:
            (q, k, v), state = self.convolution((q, k, v), segment_ids, state)
        if self.q_norm is not None:
            q = self.q_norm(q)
            k = q if self.k_norm is None else self.k_norm(k)
        if self.rope is not None:
            q, k = rotate(q, positions, self.rope), rotate(k, positions, self.rope)
        q = constrain(q, "batch", "sequence", "heads", None)
        k = constrain(k, "batch", "sequence", "kv_heads", None)
        return (q, k, constrain(v, "batch", "sequence", "kv_heads", None)), state


def check_attention(spec: MixerSpec) -> None:
    """Raises UserError for options of positions, decay and convolution that contradict each other."""
    if spec.has_alibi and spec.decay != "none":
        raise UserError(
            f"model.attention.positions = {spec.positions!r} with decay = {spec.decay!r}: ALiBi is a decay; "
            "allowed: decay = 'none', or positions = 'rope' or 'none'"
        )
    if spec.undecayed_heads >= spec.num_kv_heads:
        raise UserError(
            f"model.attention.undecayed_heads = {spec.undecayed_heads} of {spec.num_kv_heads} key/value heads: at "
            "least one must decay"
        )
    if spec.shortest_memory > spec.longest_memory:
        raise UserError(
            f"model.attention.shortest_memory = {spec.shortest_memory}: must be at most longest_memory = "
            f"{spec.longest_memory}"
        )
    if spec.conv_width == 1 or (spec.conv_width and not spec.causal):
        allowed = "0, or 2 and more" if spec.causal else "0, because model.causal = False"
        raise UserError(f"model.attention.conv_width = {spec.conv_width}; allowed: {allowed}")
