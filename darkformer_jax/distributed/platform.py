"""What a command will compute on, before JAX is imported."""

import os
from pathlib import Path

from darkformer_jax.errors import one_line

ACCELERATORS = ("nvidia[0-9]*", "accel[0-9]*", "vfio/[0-9]*", "kfd")  # in /dev: GPUs and TPUs

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # in a container with version 2 of Linux's control groups


def computes_on_cpu() -> bool:
    """Whether JAX_PLATFORMS names the CPU first or, where it names nothing, the machine has no accelerator."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not any(path for pattern in ACCELERATORS for path in Path("/dev").glob(pattern))


def jax_does_not_start(error: RuntimeError) -> str | None:
    """The line for a user whose JAX finds no devices, with what the environment asks of it; None for other errors."""
    if not str(error).startswith("Unable to initialize backend"):
        return None
    asked = [f"{name}={os.environ[name]!r}" for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES") if name in os.environ]
    return f"JAX does not start{' with ' if asked else ''}{' and '.join(asked)}: {one_line(error)}"


def num_cores() -> int:
    """The cores that this process may use: not more than a container's share of time is worth."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # there is no quota, or "max"
        return cores
