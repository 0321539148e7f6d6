"""The devices of a TPU that this machine does not have, for the compiler."""

import importlib.util
import os
from typing import Any

import jax

from darkformer_jax.distributed.libtpu import WITHOUT_TPUS
from darkformer_jax.errors import UserError, one_line

_INSTALL = "bash launch/install.sh aot, or pip install libtpu (the version that jax[tpu] names)"
# Without the last one, libtpu fails if another process holds its lock.
_ENVIRONMENT = {**WITHOUT_TPUS, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def topology_devices(name: str, num_slices: int = 1) -> list[jax.Device]:
    """The devices of `num_slices` slices of the TPU topology `name`, such as "v5e:16x16", in libtpu's order.

    Must be called before jax looks for devices, because it keeps jax on the CPU.

    Raises:
      UserError: libtpu does not know the topology, or there is no libtpu.
    """
    if num_slices < 1:
        raise UserError(f"--num_slices={num_slices}: must be at least 1")
    if ":" not in name or name.startswith(("cuda", "gpu", "h100")):
        raise UserError(
            f"--topology={name}: expected a TPU's generation and shape in chips, like v5e:4x4, v5e:16x16, v6e:16x16, "
            "v5p:4x4x4, tpu7x:4x4x4; compiling for a GPU needs a GPU"
        )
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={name} needs libtpu, which compiles for TPUs: {_INSTALL}")
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    if name.endswith(":1x1"):  # otherwise a host has four or eight chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        raise UserError(f"--topology={name}: {one_line(error)}") from error
