"""The platform that a program is compiled for while it is traced."""

import jax


def target_platform() -> str:
    """The platform of the current mesh's devices (`jax.set_mesh`), or the default backend where there is no mesh.

    A mesh's devices may be of a platform that this machine does not have.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def is_one_cpu() -> bool:
    """Whether the program is for one CPU device: no mesh of several is current, and the platform is the CPU."""
    return target_platform() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1
