"""The linear transformer (Katharopoulos et al., arXiv 2006.16236)."""

from typing import Any

from jaxtyping import Array

from darkformer_jax.mixers.attention import ATTENTION_FIELDS
from darkformer_jax.mixers.features import LinearMechanism, mean_exact_keys
from darkformer_jax.mixers.spec import MixerSpec
from darkformer_jax.ops.linear_attention import linear_attention
from darkformer_jax.ops.state import AttentionState


class LinearTransformer(LinearMechanism):
    """The kernel phi(q) . phi(k) with phi(x) = elu(x) + 1: one feature per dimension of the head, none random."""

    uses = ATTENTION_FIELDS | {"chunk_size"}

    def __init__(self, spec: MixerSpec, layer: int | Array) -> None:
        super().__init__(spec, layer)
        self.num_features = spec.head_dim

    @classmethod
    def mixing_flops(cls, spec: MixerSpec, length: int) -> float:
        """As for `FeatureAttention` with m = d, without the products that make features."""
        d = spec.head_dim
        state = 2 * d * (spec.num_heads + spec.num_kv_heads) * d
        return state + 4 * spec.num_heads * d * mean_exact_keys(spec, length)

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        segment_ids: Array,
        positions: Array,
        log_decay: Array | None = None,
        state: AttentionState | None = None,
    ) -> tuple[Array, Any]:
        return self.run(linear_attention, q, k, v, state, segment_ids=segment_ids, log_decay=log_decay)
