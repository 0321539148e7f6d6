"""The platform that a program is compiled for while it is traced."""

import jax
import jax.numpy as jnp

TPU_TILE = 16  # rows of a tile of bfloat16 on a TPU; those of float32 are half of them


def target_platform() -> str:
    """The platform of the current mesh's devices (`jax.set_mesh`), or the default backend where there is no mesh.

    A mesh's devices may be of a platform that this machine does not have.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def is_cpu_of_rows() -> bool:
    """Whether the program is for CPU devices of which each has whole rows of a batch and all parameters, or for one."""
    mesh = jax.sharding.get_abstract_mesh()
    return target_platform() == "cpu" and mesh.size <= mesh.shape.get("data", 1)


def dtype_of_sums(dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """In which arrays of `dtype` are sent where devices sum them, or their gradients, in a shard_map.

    float32 in the place of bfloat16 on CPUs, whose backend in XLA aborts the process on such a sum in bfloat16.
    """
    return jnp.float32 if jnp.dtype(dtype) == jnp.bfloat16 and target_platform() == "cpu" else dtype
