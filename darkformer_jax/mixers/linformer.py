"""Linformer (Wang et al., arXiv 2006.04768)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from darkformer_jax.errors import UserError
from darkformer_jax.mixers.encoders import EncoderMechanism, per_query_head, places_in_row
from darkformer_jax.mixers.spec import MixerSpec
from darkformer_jax.ops.features import matmul
from darkformer_jax.ops.projections import projection_key


class Linformer(EncoderMechanism):
    """softmax(scale q (E k)^T) F v: keys and values are mixed over the places to m = `num_features` of each.

    E and F [horizon, m] are learned, one pair per layer for all heads. A text of n tokens uses their first n rows, and
    padding is left out, so its outputs do not depend on the row's length.
    """

    uses = EncoderMechanism.uses | {"horizon"}
    needs = frozenset({"horizon"})

    def __init__(self, spec: MixerSpec, layer: int | Array) -> None:
        super().__init__(spec, layer)
        shape, bound = (2, spec.horizon, spec.num_features), spec.num_features**-0.5
        drawn = jax.random.uniform(projection_key(spec.seed, layer, 0), shape, jnp.float32, -bound, bound)
        self.E, self.F = (nnx.Param(part, axes=(None, None)) for part in drawn)

    @classmethod
    def mixing_flops(cls, spec: MixerSpec, length: int) -> float:
        """Per token: 4 m d G for E k and F v of G key/value heads, 4 m d H for scores and values of H query heads."""
        return 4 * spec.num_features * spec.head_dim * (spec.num_kv_heads + spec.num_heads)

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        segment_ids: Array,
        positions: Array,
        log_decay: Array | None = None,
        state: Any = None,
    ) -> tuple[Array, Any]:
        if q.shape[1] > self.spec.horizon:
            raise UserError(
                f"model.attention.horizon = {self.spec.horizon} with {q.shape[1]} tokens: must be at least as many"
            )
        place, _ = places_in_row(segment_ids)
        is_real = (segment_ids != 0)[..., None]
        q, k, v = (jnp.where(is_real[..., None], x, 0) for x in (q, k, v))  # 0 times what padding holds may be NaN

        def mixed(weights: nnx.Param, x: Array) -> Array:
            rows = jnp.where(is_real, weights[...].astype(jnp.float32)[place], 0)
            few = matmul("bnm,bnhd->bmhd", rows, x, x.dtype).astype(x.dtype)
            return per_query_head(few, self.spec.num_heads)

        logits = self.spec.scale * matmul("bnhd,bmhd->bhnm", q, mixed(self.E, k), q.dtype)
        out = matmul("bhnm,bmhd->bnhd", jax.nn.softmax(logits, axis=-1), mixed(self.F, v), v.dtype)
        return jnp.where(is_real[..., None], out, 0).astype(v.dtype), None
