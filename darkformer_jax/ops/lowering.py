"""What the program under way is compiled for."""

import jax


def target_platform() -> str:
    """As jax.default_backend(), but of the current mesh's devices (`jax.set_mesh`), which may be elsewhere."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
