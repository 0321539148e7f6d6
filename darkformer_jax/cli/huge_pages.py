"""Huge pages for the memory of programs that compute on the CPU.

XLA asks glibc for the temporary arrays of every step anew, and Linux fills them page by page. With pages of 2 MiB
instead of 4 KiB, the quickstart's training steps take three quarters of the time. Where the kernel's setting is
`madvise`, as it often is, glibc asks for such pages only if a variable says so when the process starts.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from darkformer_jax.distributed.platform import computes_on_cpu

VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"  # glibc 2.35 or newer; older ones ignore it
STARTED = "DARKFORMER_STARTED_AGAIN"  # the id of the process that was started once more
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def start_with_huge_pages() -> None:
    """Starts this very command once more, as the same process, with glibc.malloc.hugetlb=1.

    It returns, and nothing has happened, where that would change nothing or is not wanted: the kernel's setting is not
    `madvise`, JAX_PLATFORMS or the machine has something else than a CPU, GLIBC_TUNABLES already names the setting (0
    declines), the command runs inside another program, such as a debugger, or its file cannot be read twice.
    """
    if command := restarted_command():
        before = os.environ.get(VARIABLE)
        environment = os.environ | {VARIABLE: f"{before}:{TUNABLE}=1" if before else f"{TUNABLE}=1"}
        sys.stdout.flush()
        with contextlib.suppress(OSError):  # the command runs as well without huge pages
            os.execve(command[0], command, environment | {STARTED: str(os.getpid())})


def restarted_command() -> list[str]:
    """The command to start once more; empty: none."""
    if TUNABLE in os.environ.get(VARIABLE, "") or _was_started_again():
        return []
    if not _asks_kernel() or not computes_on_cpu():
        return []
    return [sys.executable, *sys.orig_argv[1:]] if _is_own_process() and sys.executable else []


def _was_started_again() -> bool:
    """Whether this is the second start, although the variable is gone.

    glibc takes it from programs with capabilities, and an interpreter may be a script that clears the environment.
    Without this question, such a command would start again for ever.
    """
    return os.environ.get(STARTED) == str(os.getpid())


def _asks_kernel() -> bool:
    try:
        return "[madvise]" in SETTING.read_text()
    except OSError:  # not Linux
        return False


def _is_own_process() -> bool:
    """Whether the interpreter was started for this command, as by `python train.py` or `python -m package.train`.

    Debuggers and profilers set sys.argv as if it were so, but stand before the command in the original arguments.
    """
    spec = sys.modules["__main__"].__spec__
    if spec is None and not os.path.isfile(sys.argv[0]):  # a script from standard input or a pipe: it is read by now
        return False
    own = [*([sys.argv[0]] if spec is None else ["-m", spec.name.removesuffix(".__main__")]), *sys.argv[1:]]
    given = sys.orig_argv[1:]
    return given[-len(own) :] == own and _are_options(given[: -len(own)])


def _are_options(words: Sequence[str]) -> bool:
    """Whether these are options of the interpreter and nothing else."""
    rest = iter(words)
    return all(word.startswith("-") and (word not in ("-X", "-W") or next(rest, "")) for word in rest)
