"""A control: attention whose weights are random and do not depend on the input."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from darkformer_jax.mixers.features import PROJECTION_FIELDS, Inputs
from darkformer_jax.mixers.performer import Performer
from darkformer_jax.mixers.spec import MixerSpec, Projection
from darkformer_jax.ops.keys import key_of_data
from darkformer_jax.ops.projections import projection_key


class NoiseKey(Projection):
    """Key data for the noise of each position; never redrawn."""


class Random(Performer):
    """Fixed random weights: a Performer whose q and k are N(0, I) draws, functions of (seed, layer, position, head).

    The weight of position j for position n is thus a fixed positive random number. The cost is linear and the state
    constant. The DARKFormer paper names this control but does not define it; the definition is this project's own.
    """

    role = "control"
    uses = PROJECTION_FIELDS
    reads_q_and_k = False

    def __init__(self, spec: MixerSpec, layer: int | Array) -> None:
        super().__init__(spec, layer)
        self.noise_key = NoiseKey(jax.random.key_data(projection_key(spec.seed + 1, layer, 0)), axes=(None,))

    @classmethod
    def mixing_flops(cls, spec: MixerSpec, length: int) -> float:
        """FLOPs of the weights times the values; the weights themselves are constants."""
        visible = (length + 1) / 2 if spec.causal else length
        return 2 * spec.num_heads * spec.head_dim * visible

    def inputs(self, q: Array, k: Array, positions: Array) -> Inputs:
        key = key_of_data(self.noise_key[...])
        num_heads, num_kv_heads, dim = q.shape[2], k.shape[2], q.shape[3]

        def draw(position: Array) -> Array:
            # Drawn in float32: another dtype would give other weights, not rounded ones.
            noise = jax.random.normal(jax.random.fold_in(key, position), (num_heads + num_kv_heads, dim), jnp.float32)
            return noise.astype(q.dtype)

        noise = jax.vmap(jax.vmap(draw))(positions)
        return Inputs(noise[:, :, :num_heads], noise[:, :, num_heads:], self.projections[...].astype(jnp.float32), None)
