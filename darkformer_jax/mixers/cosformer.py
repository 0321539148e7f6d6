"""cosFormer (Qin et al., arXiv 2202.08791)."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from darkformer_jax.errors import UserError
from darkformer_jax.mixers.attention import ATTENTION_FIELDS
from darkformer_jax.mixers.features import LinearMechanism, mean_exact_keys
from darkformer_jax.mixers.spec import MixerSpec
from darkformer_jax.ops.features import log_relu
from darkformer_jax.ops.linear_attention import linear_attention
from darkformer_jax.ops.state import AttentionState


class CosFormer(LinearMechanism):
    """The kernel relu(q_i) . relu(k_j) cos(pi (i - j) / 2 M), with M = `horizon` tokens.

    With cos(a - b) = cos a cos b + sin a sin b these are m = 2 d features of token and place. Beyond M weights would be
    negative, so no row may be longer. The authors take the row's own length for M, padding included; then the same text
    has other outputs in another batch. A query that shares no positive entry with any key it sees gives a mean of their
    values that depends on its place; the authors' gives about 0.
    """

    uses = ATTENTION_FIELDS | {"chunk_size", "horizon"}
    needs = frozenset({"horizon"})

    def __init__(self, spec: MixerSpec, layer: int | Array) -> None:
        super().__init__(spec, layer)
        self.key_dim = self.num_features = 2 * spec.head_dim

    @classmethod
    def mixing_flops(cls, spec: MixerSpec, length: int) -> float:
        """As for `FeatureAttention` with m = 2 d, without the products that make features."""
        d = spec.head_dim
        state = 4 * d * d * (spec.num_heads + spec.num_kv_heads)
        return state + 6 * spec.num_heads * d * mean_exact_keys(spec, length)

    def init_state(self, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> AttentionState:
        self._require_horizon(max_length)
        return super().init_state(batch, max_length, dtype)

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
        self._require_horizon(q.shape[1])
        angle = (0.5 * math.pi / self.spec.horizon) * positions.astype(jnp.float32)[..., None, None]

        def features(x: Array) -> Array:
            relu = jax.nn.relu(x.astype(jnp.float32))
            return jnp.concatenate([relu * jnp.cos(angle), relu * jnp.sin(angle)], axis=-1).astype(x.dtype)

        attend = functools.partial(linear_attention, feature_map=log_relu)
        return self.run(attend, features(q), features(k), v, state, segment_ids=segment_ids, log_decay=log_decay)

    def _require_horizon(self, length: int) -> None:
        if length > self.spec.horizon:
            raise UserError(
                f"model.attention.horizon = {self.spec.horizon} with {length} tokens: must be at least as many"
            )
