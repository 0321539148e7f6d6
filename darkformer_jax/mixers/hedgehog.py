"""Hedgehog's learned features (Zhang et al., arXiv 2402.04347), the map of LoLCATs (arXiv 2410.10254)."""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from darkformer_jax.mixers.attention import ATTENTION_FIELDS
from darkformer_jax.mixers.features import LinearMechanism, mean_exact_keys
from darkformer_jax.mixers.spec import Geometry, MixerSpec
from darkformer_jax.ops.features import log_two_sided, matmul
from darkformer_jax.ops.linear_attention import linear_attention
from darkformer_jax.ops.state import AttentionState


class Hedgehog(LinearMechanism):
    """The kernel phi(W_q q) . phi(W_k k) with phi(x) = [exp(x), exp(-x)], so m = 2 d.

    W_q is learned per query head and W_k per key/value head. Both start at the identity.
    """

    uses = ATTENTION_FIELDS | {"chunk_size", "geometry_learning_rate"}

    def __init__(self, spec: MixerSpec, layer: int | Array) -> None:
        super().__init__(spec, layer)
        self.num_features = 2 * spec.head_dim
        identity = jnp.eye(spec.head_dim, dtype=jnp.float32)
        self.queries = Geometry(jnp.tile(identity, (spec.num_heads, 1, 1)), axes=("heads", None, None))
        self.keys = Geometry(jnp.tile(identity, (spec.num_kv_heads, 1, 1)), axes=("kv_heads", None, None))

    @classmethod
    def mixing_flops(cls, spec: MixerSpec, length: int) -> float:
        """As for `FeatureAttention` with m = 2 d; W x takes the place of the product that makes features."""
        d = spec.head_dim
        maps_and_state = (2 * d + 4 * d) * d * (spec.num_heads + spec.num_kv_heads)
        return maps_and_state + 6 * spec.num_heads * d * mean_exact_keys(spec, length)

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
        q, k = (
            matmul("bnhd,hed->bnhe", x, W[...], x.dtype).astype(x.dtype) for x, W in ((q, self.queries), (k, self.keys))
        )
        attend = functools.partial(linear_attention, feature_map=log_two_sided)
        return self.run(attend, q, k, v, state, segment_ids=segment_ids, log_decay=log_decay)
