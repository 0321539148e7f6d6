"""What libtpu must be told on a machine without TPUs, where it is installed to compile for them."""

import os
from collections.abc import Mapping
from pathlib import Path

# Without these, libtpu asks the cloud's metadata server what it runs on, and complains that nobody answers.
WITHOUT_TPUS: Mapping[str, str] = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any; what is compiled for is named separately
}
_DEVICES = ("accel*", "vfio/[0-9]*")  # of a TPU, by its generation


def quiet_libtpu(devices: Path = Path("/dev")) -> None:
    """Where there are no TPUs, keeps libtpu from printing that it finds none. Before JAX looks for devices.

    devices: the directory of the machine's devices.
    """
    if not any(any(devices.glob(pattern)) for pattern in _DEVICES):
        for name, value in WITHOUT_TPUS.items():
            os.environ.setdefault(name, value)
