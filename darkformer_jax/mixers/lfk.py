"""LFK, the DARKFormer paper's learned feature kernel (arXiv 2603.04127)."""

import jax.numpy as jnp
from jaxtyping import Array

from darkformer_jax.mixers.features import FeatureAttention, Inputs, draw_layer
from darkformer_jax.mixers.spec import Geometry, MixerSpec


class LearnedFeatures(FeatureAttention):
    """M = I and w is trained. w starts as a random draw; once trained, the features no longer estimate a kernel."""

    uses = FeatureAttention.uses - {"redraw_every"}
    learns_kernel = True

    def __init__(self, spec: MixerSpec, layer: int | Array) -> None:
        super().__init__(spec, layer)
        self.projections = Geometry(draw_layer(spec, layer, 0), axes=("kv_heads", "features", None))

    def inputs(self, q: Array, k: Array, positions: Array) -> Inputs:
        return Inputs(q, k, self.projections[...].astype(jnp.float32), None)
