"""Performer: positive random features of the softmax kernel (Choromanski et al., arXiv 2009.14794)."""

import jax.numpy as jnp
from jaxtyping import Array

from darkformer_jax.mixers.features import FeatureAttention, Inputs, draw_layer
from darkformer_jax.mixers.spec import Geometry, MixerSpec, Projection


class Performer(FeatureAttention):
    """The softmax kernel, with w drawn isotropically and M = I."""

    uses = FeatureAttention.uses | {"balanced"}

    def __init__(self, spec: MixerSpec, layer: int | Array) -> None:
        super().__init__(spec, layer)
        self.projections: Projection | Geometry = Projection(
            draw_layer(spec, layer, 0), axes=("kv_heads", "features", None)
        )

    def inputs(self, q: Array, k: Array, positions: Array) -> Inputs:
        return Inputs(q, k, self.projections[...].astype(jnp.float32), None)
