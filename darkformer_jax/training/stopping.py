"""SIGTERM and Ctrl-C end a run after the step under way, with that step saved."""

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

    Of several processes, a signal to any one stops all after the same step.

    Args:
      step: the last one that is finished.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self.received: int | None = None
        self._announced = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        # jax agrees on the step after the last that a process has asked about: it must know where this run begins
        # before there can be a signal. Nobody has announced one that would be answered here.
        processes.stop_agreed(self._step)
        self._previous = {signum: signal.signal(signum, self._remember) for signum in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def to_stop(self, step: int) -> int | None:
        """The signal to stop for after `step`, if there is one. To be called at every step."""
        if not processes.is_distributed():
            return self.received
        if self.received is not None and not self._announced:
            self._announced = True
            processes.announce_stop(self.received)
        return processes.stop_agreed(step)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        # The system's own action for the next one: a Python handler would wait for a long evaluation or compile to end.
        for name in self._previous:
            signal.signal(name, signal.SIG_DFL)
