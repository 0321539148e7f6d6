"""What a run computes with: devices, processor and versions, for people who read its results later."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import jax

from darkformer_jax.distributed.platform import num_cores

HARDWARE = "hardware"
_ROOT = Path(__file__).parents[2]  # of the clone, or of site-packages
_CPU_INFO = Path("/proc/cpuinfo")


def environment() -> dict[str, str]:
    """Name -> text: hardware (all devices, and the host's processor), version (of darkformer_jax, jax and Python)."""
    return {HARDWARE: _hardware(), "version": versions()}


def versions() -> str:
    """The versions of darkformer_jax, jax and Python, in one line."""
    return f"darkformer_jax {_version()}, jax {jax.__version__}, Python {platform.python_version()}"


def _hardware() -> str:
    devices, cores = jax.devices(), num_cores()
    kind = "CPU" if devices[0].platform == "cpu" else devices[0].device_kind
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{len(devices)} x {kind}{processes}; {_processor()}, {cores} core{'' if cores == 1 else 's'}"


def _processor() -> str:
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version() -> str:
    """The package's version, and in a clone its commit, with `-dirty` if files were changed since."""
    try:
        version = metadata.version("darkformer_jax")  # as darkformer_jax.__version__
    except metadata.PackageNotFoundError:  # a clone that is not installed
        version = "(not installed)"
    if not (_ROOT / ".git").exists():
        return version
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or a clone that git does not trust
        return version
    return f"{version} at {said}"
