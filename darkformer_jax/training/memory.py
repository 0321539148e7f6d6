"""The memory that a run uses."""

import resource
import sys
from pathlib import Path

import jax


def host_memory_bytes() -> int:
    """Resident memory of this process now; its peak on systems that do not tell more (other than Linux)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return pages * resource.getpagesize()


def device_memory_bytes() -> int | None:
    """The largest peak of bytes in use among this process's devices; None if the backend does not count (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    return max((stat["peak_bytes_in_use"] for stat in stats if stat and "peak_bytes_in_use" in stat), default=None)
