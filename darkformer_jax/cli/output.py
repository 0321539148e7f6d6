"""What a command does where its output cannot be written."""

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def lost_output_is_no_crash() -> Iterator[None]:
    """Around a whole command, because Python would end it with a traceback, or with status 120 as it exits.

    Where `head` or a pager has closed the pipe, the command ends without a word, as by SIGPIPE. Where the disk is full,
    it ends with one line and status 2. What is printed to a closed stream (`>&-`) goes nowhere.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="replace"))  # noqa: SIM115 (until the end)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _forget_output()
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        _forget_output()
        print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(2)


def _forget_output() -> None:
    """Lets what is still to be flushed go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
