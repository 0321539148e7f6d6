"""Huge pages for the memory of programs that compute on the CPU.

XLA asks glibc for the temporary arrays of every step anew, and Linux fills them page by page. With pages of 2 MiB
instead of 4 KiB, the quickstart's training steps take three quarters of the time. Where the kernel's setting is
`madvise`, as it often is, glibc asks for such pages only if a variable says so when the process starts.
"""

import os
import sys
from pathlib import Path

VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"  # glibc 2.35 or newer; older ones ignore it
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ACCELERATORS = ("nvidia[0-9]*", "accel[0-9]*", "vfio/[0-9]*", "kfd")  # in /dev: GPUs and TPUs


def start_with_huge_pages() -> None:
    """Starts this very command once more, as the same process, with glibc.malloc.hugetlb=1.

    It returns, and nothing has happened, where that would change nothing or is not wanted: the kernel's setting is not
    `madvise`, JAX_PLATFORMS or the machine has something else than a CPU, GLIBC_TUNABLES already names the setting (0
    declines), or the command runs inside another program.
    """
    if command := restarted_command():
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = f"{before}:{TUNABLE}=1" if before else f"{TUNABLE}=1"
        sys.stdout.flush()
        os.execv(command[0], command)


def restarted_command() -> list[str]:
    """The command to start once more; empty: none."""
    if TUNABLE in os.environ.get(VARIABLE, "") or not _asks_kernel() or not _computes_on_cpu():
        return []
    return [sys.executable, *sys.orig_argv[1:]] if _is_own_process() and sys.executable else []


def _asks_kernel() -> bool:
    try:
        return "[madvise]" in SETTING.read_text()
    except OSError:  # not Linux
        return False


def _computes_on_cpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not any(path for pattern in ACCELERATORS for path in Path("/dev").glob(pattern))


def _is_own_process() -> bool:
    """Whether the interpreter was started for this command, as by `python train.py` or `python -m package.train`."""
    arguments, spec = sys.argv[1:], sys.modules["__main__"].__spec__
    own = [sys.argv[0]] if spec is None else ["-m", spec.name.removesuffix(".__main__")]
    return sys.orig_argv[1:][-len(own + arguments) :] == own + arguments
