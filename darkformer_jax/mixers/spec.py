"""The sizes and options of a mixer, and the kinds of its variables."""

import dataclasses

from flax import nnx

from darkformer_jax.mixers.positions import RopeSpec
from darkformer_jax.ops.linear import WindowKernel
from darkformer_jax.ops.projections import ProjectionKind


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
    chunk_size: int
    window: int
    num_sinks: int
    window_kernel: WindowKernel
    far_gain: bool

    @property
    def scale(self) -> float:
        """The factor on the products of q and k: query_scale, or head_dim^-0.5 if that is 0."""
        return self.query_scale or self.head_dim**-0.5


class Projection(nnx.Variable):
    """Random projections: drawn, stored and perhaps redrawn, never trained."""


class Geometry(nnx.Param):
    """A parameter of the kernel (M, learned projections, gain), with its own learning rate and no weight decay."""
