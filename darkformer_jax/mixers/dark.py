"""DARK: random features in a learned geometry (Farzam et al., arXiv 2603.04127)."""

import jax.numpy as jnp
from jaxtyping import Array

from darkformer_jax.errors import UserError
from darkformer_jax.mixers.features import Inputs
from darkformer_jax.mixers.performer import Performer
from darkformer_jax.mixers.spec import Geometry, MixerSpec


class Dark(Performer):
    """exp(q^T M^T M k); M is learned per key/value head and shared by that head's queries.

    With `learn_projections`, w is trained as well; the features then no longer estimate a kernel.
    """

    uses = Performer.uses | {"geometry_init", "learn_projections", "window_kernel"}
    has_geometry = True
    learns_kernel = True

    def __init__(self, spec: MixerSpec, layer: int | Array) -> None:
        super().__init__(spec, layer)
        if spec.learn_projections:
            self.projections = Geometry(self.projections[...], axes=("kv_heads", "features", None))
        identity = jnp.eye(spec.head_dim, dtype=jnp.float32)
        start = jnp.tile(spec.geometry_init * identity, (spec.num_kv_heads, 1, 1))
        self.M = Geometry(start, axes=("kv_heads", None, None))

    @classmethod
    def check(cls, spec: MixerSpec) -> None:
        super().check(spec)
        if spec.learn_projections and spec.redraw_every:
            raise UserError(
                f"model.attention.redraw_every = {spec.redraw_every} with learn_projections = True; allowed: 0"
            )

    def inputs(self, q: Array, k: Array, positions: Array) -> Inputs:
        return Inputs(q, k, self.projections[...].astype(jnp.float32), self.M[...].astype(jnp.float32))
