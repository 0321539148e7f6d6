"""What a command will compute on, before JAX is imported."""

import os
from pathlib import Path

ACCELERATORS = ("nvidia[0-9]*", "accel[0-9]*", "vfio/[0-9]*", "kfd")  # in /dev: GPUs and TPUs

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # in a container with version 2 of Linux's control groups


def computes_on_cpu() -> bool:
    """Whether JAX_PLATFORMS names the CPU first or, where it names nothing, the machine has no accelerator."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not any(path for pattern in ACCELERATORS for path in Path("/dev").glob(pattern))


def num_cores() -> int:
    """The cores that this process may use: not more than a container's share of time is worth."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # there is no quota, or "max"
        return cores
