"""A control: attention that takes the mean of the visible values."""

import jax.numpy as jnp
from jaxtyping import Array

from darkformer_jax.mixers.attention import ATTENTION_FIELDS
from darkformer_jax.mixers.features import FeatureAttention, Inputs
from darkformer_jax.mixers.spec import MixerSpec


class Constant(FeatureAttention):
    """The mean of the visible values: one feature, equal to one for every query and key.

    The DARKFormer paper names this control but does not define it; the definition is this project's own.
    """

    role = "control"
    uses = ATTENTION_FIELDS | {"chunk_size"}
    reads_q_and_k = False

    def __init__(self, spec: MixerSpec, layer: int | Array) -> None:
        super().__init__(spec, layer)
        self.key_dim = self.num_features = 1

    @classmethod
    def mixing_flops(cls, spec: MixerSpec, length: int) -> float:
        """A running mean needs no products."""
        return 0.0

    def inputs(self, q: Array, k: Array, positions: Array) -> Inputs:
        return Inputs(jnp.zeros_like(q[..., :1]), jnp.zeros_like(k[..., :1]), jnp.zeros((1, 1)), None)
