"""What every mechanism is built from and answers to."""

import dataclasses
from typing import Any, Protocol

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from darkformer_jax.ops.linear import WindowKernel
from darkformer_jax.ops.projections import ProjectionKind


def pattern_kinds(pattern: str | None, kind: str) -> tuple[str, ...]:
    """The mechanisms of successive layers, repeated over the depth; `kind` everywhere where there is no pattern."""
    return tuple(name.strip() for name in (pattern or kind).split(","))


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Sizes and options of one attention layer's mechanism; the fields are explained in config/base.py."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_features: int
    projections: ProjectionKind
    geometry_init: float
    chunk_size: int
    window: int
    num_sinks: int
    seed: int
    query_scale: float = 0.0
    softcap: float = 0.0
    local_window: int = 0
    window_kernel: WindowKernel = "dark"
    far_gain: bool = False
    learn_projections: bool = False


class Projection(nnx.Variable):
    """Random projections: drawn, stored and perhaps redrawn, never trained."""


class Geometry(nnx.Param):
    """What shapes the kernel (M, learned projections, gain): trained at its own learning rate, without weight decay."""


class Mechanism(Protocol):
    """From q, k, v to their mixture. One call serves training (no state), prefill (fresh state) and decode."""

    def __init__(self, spec: AttentionSpec, layer: int | Array) -> None: ...

    def init_state(self, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> Any:
        """The state of `batch` sequences before their first token; `max_length` bounds what a KV cache must hold."""
        ...

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
        """Causal attention within segments. The returned state is None when none was given."""
        ...
