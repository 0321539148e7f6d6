"""The sizes and options of a mixer, and the kinds of its variables."""

import dataclasses
from typing import Literal

from flax import nnx

from darkformer_jax.mixers.positions import RopeSpec
from darkformer_jax.ops.linear import WindowKernel
from darkformer_jax.ops.projections import ProjectionKind

Positions = Literal["rope", "alibi", "rope+alibi", "none"]
Decay = Literal["none", "learned", "gate"]


@dataclasses.dataclass(frozen=True)
class MixerSpec:
    """Sizes and options of one layer's mixer. config/base.py explains the fields; `config.specs` fills them in.

    Fields that the kind does not use are off.
    """

    kind: str  # a name in MIXERS
    seed: int
    # from model
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec
    qk_norm: bool
    qkv_bias: bool
    norm_eps: float
    norm_plus_one: bool
    lora_rank: int
    causal: bool
    dtype: str
    # from model.attention
    query_scale: float
    softcap: float
    local_window: int
    num_features: int
    projections: ProjectionKind
    redraw_every: int
    geometry_init: float
    learn_projections: bool
    balanced: bool
    chunk_size: int
    backend: str  # a backend.Backend
    window: int
    num_sinks: int
    window_kernel: WindowKernel
    far_gain: bool
    far_horizon: int
    exact_kv_heads: int
    positions: str  # a Positions
    decay: str  # a Decay
    shortest_memory: float
    longest_memory: float
    undecayed_heads: int
    conv_width: int
    horizon: int
    state_size: int
    expand: int
    num_hashes: int

    @property
    def scale(self) -> float:
        """The factor on the products of q and k: query_scale, or head_dim^-0.5 if that is 0."""
        return self.query_scale or self.head_dim**-0.5

    @property
    def has_rope(self) -> bool:
        """Whether q and k are rotated by their positions."""
        return self.positions in ("rope", "rope+alibi")

    @property
    def has_alibi(self) -> bool:
        """Whether the kernel decays by ALiBi's slopes."""
        return self.positions in ("alibi", "rope+alibi")

    @property
    def has_decay(self) -> bool:
        """Whether the kernel decays with the distance."""
        return self.has_alibi or self.decay != "none"


class Projection(nnx.Variable):
    """Random projections: drawn, stored and perhaps redrawn, never trained."""


class Coordinates(Projection):
    """Maps of q and k to other coordinates: found by `calibrate`, stored, never trained."""


class Geometry(nnx.Param):
    """A parameter of the kernel (M, learned projections, gain), with its own learning rate and no weight decay."""
