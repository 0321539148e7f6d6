"""SIGTERM and Ctrl-C end a run after the current step, and that step is saved."""

import signal
from types import FrameType
from typing import Any

from darkformer_jax.distributed import processes


class Stopped(Exception):
    """The run was asked to stop by a signal, and has saved what it had."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"{signal.Signals(signum).name}: saved step {step}; the same command resumes there")
        self.exit_status = 128 + signum


class StopSignals:
    """While active, remembers the first SIGTERM or Ctrl-C; a second one ends the process at once.

    With several processes, a signal to any one stops all after the same step.

    Args:
      step: the last finished step.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self.received: int | None = None
        self._announced = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        # jax agrees on the step after the last one that any process has asked about. So it must know where this run
        # begins before a signal can come. No signal is announced yet, so there is no answer to read here.
        processes.stop_agreed(self._step)
        self._previous = {signum: signal.signal(signum, self._remember) for signum in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def to_stop(self, step: int) -> int | None:
        """The signal to stop for after `step`, if there is one. Call it at every step."""
        if not processes.is_distributed():
            return self.received
        if self.received is not None and not self._announced:
            self._announced = True
            processes.announce_stop(self.received)
        return processes.stop_agreed(step)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        # The next signal gets the system's action: a Python handler would wait until a long evaluation or compile ends.
        for name in self._previous:
            signal.signal(name, signal.SIG_DFL)
