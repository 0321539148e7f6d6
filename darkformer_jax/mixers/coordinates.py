"""Coordinates of queries and keys in which random features vary less."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from darkformer_jax.mixers.spec import Coordinates, MixerSpec


class BalancedCoordinates(nnx.Module):
    """q' = A q and k' = B (k - b), with A^T B = I for each key/value head.

    Then q'.k' = q.k - q.b. The logits of a query shift together, which attention does not see: the coordinates change
    no weight of exact attention. But the variance of random features grows with |q' + k'|^2, which they can make small;
    `calibration.geometry.balanced_maps` finds them. They start as A = B = I, b = 0 and are not trained.
    """

    def __init__(self, spec: MixerSpec) -> None:
        identity = jnp.tile(jnp.eye(spec.head_dim, dtype=jnp.float32), (spec.num_kv_heads, 1, 1))
        self.query_map = Coordinates(identity, axes=("kv_heads", None, None))
        self.key_map = Coordinates(identity, axes=("kv_heads", None, None))
        self.key_center = Coordinates(jnp.zeros((spec.num_kv_heads, spec.head_dim)), axes=("kv_heads", None))

    def __call__(
        self, q: Float[Array, "b p hq d"], k: Float[Array, "b n hkv d"]
    ) -> tuple[Float[Array, "b p hq d"], Float[Array, "b n hkv d"]]:
        """(q', k') in the dtypes of q and k, whose tokens need not be the same, of the last hkv key/value heads."""
        a, b, center = (x[...][-k.shape[2] :] for x in (self.query_map, self.key_map, self.key_center))
        grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3]).astype(jnp.float32)
        queries = jnp.einsum("bngrd,ged->bngre", grouped, a, precision="highest")
        centred = k.astype(jnp.float32) - center[None, None]
        keys = jnp.einsum("bngd,ged->bnge", centred, b, precision="highest")
        return queries.reshape(q.shape).astype(q.dtype), keys.astype(k.dtype)
