"""Random keys of one kind, so that a seed means the same numbers everywhere."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from darkformer_jax.errors import UserError

_KIND = "threefry2x32"  # JAX's default, which JAX_DEFAULT_PRNG_IMPL changes


def key_of_seed(seed: int) -> Array:
    """What `jax.random.key(seed)` is where nothing changes JAX's defaults. The lowest 32 bits of the seed count.

    Raises UserError if JAX is told to draw other numbers from the same key.
    """
    if not jax.config.jax_threefry_partitionable:  # type: ignore[attr-defined]
        raise UserError(
            "jax_threefry_partitionable = False (JAX_THREEFRY_PARTITIONABLE): every seed would mean other numbers; "
            "allowed: True, which is JAX's default"
        )
    return key_of_data(jnp.array([0, seed % 2**32], jnp.uint32))


def key_of_data(data: UInt32[Array, "2"]) -> Array:
    """The key that has this `jax.random.key_data`."""
    return jax.random.wrap_key_data(data, impl=_KIND)
