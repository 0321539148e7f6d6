"""SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C end a run after the current step, and that step is saved."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from darkformer_jax.distributed import processes

# SIGHUP comes when a terminal closes; batch systems warn with SIGUSR1 before they end a job.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

# The time that a step has to end after a signal, unless earlier steps took longer: then so many times the longest.
_STEP_SECONDS = 60.0
_TIMES_LONGEST = 4
_POLL_SECONDS = 0.5
_ECHO_SECONDS = 0.5  # after a signal, in which another one is its echo: `timeout` signals a program, then its group
_HANDLER_SECONDS = 0.2  # which Python's handler gets before the watchdog ends the process


class Stopped(Exception):
    """The run was asked to stop by a signal, and has saved what it had."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"{_name(signum)}: saved step {step}; the same command resumes there")
        self.exit_status = 128 + signum


class StopSignals:
    """While active, remembers the first signal to stop; a second one ends the process at once.

    A step that then does not end (in `step`) ends the process, too, without a save: a message between devices may never
    come. With several processes, a signal to any one stops all after the same step.

    SIGHUP is no second signal, because a terminal that closes sends several; nor is any that comes within half a second
    of the first. If the run was started to ignore SIGHUP (`nohup`), it is ignored.

    Args:
      step: the last finished step.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self.received: int | None = None
        self._came = 0.0  # when, by the monotonic clock
        self._announced = False
        self._previous: dict[int, Any] = {}
        self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        self._watchdog = _Watchdog()

    def __enter__(self) -> "StopSignals":
        # jax agrees on the step after the last one that any process has asked about. So it must know where this run
        # begins before a signal can come. No signal is announced yet, so there is no answer to read here.
        processes.stop_agreed(self._step)
        handled = [s for s in _SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
        self._watchdog.start(handled)
        self._previous = {signum: signal.signal(signum, self._remember) for signum in handled}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._watchdog.stop()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around the work of each step, and around waiting for the last one's result: this must end after a signal."""
        with self._watchdog.step():
            yield

    def to_stop(self, step: int) -> int | None:
        """The signal to stop for after `step`, if there is one. Call it at every step."""
        if not processes.is_distributed():
            return self.received
        if self.received is not None and not self._announced:
            self._announced = True
            processes.announce_stop(self.received)
        return processes.stop_agreed(step)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._came = signum, time.monotonic()
            if signal.SIGHUP in self._previous:
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
            if signum == signal.SIGHUP:
                _forget_closed(self._terminals)
        elif time.monotonic() - self._came > _ECHO_SECONDS:  # the system's action, now
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)


class _Watchdog:
    """Ends the process where a handler cannot: Python runs handlers between two instructions of the main thread.

    That thread may wait in jax, for minutes or for ever. So another one reads the signals' numbers, which Python writes
    to a socket, and answers the first signal in words.
    """

    def __init__(self) -> None:
        self._signals: list[signal.Signals] = []
        self._began: float | None = None  # the step that is under way
        self._longest = 0.0  # seconds of a step so far

    def start(self, signals: list[signal.Signals]) -> None:
        """Call it in the main thread."""
        self._signals = signals
        self._numbers, self._written = socket.socketpair()
        self._written.setblocking(False)
        self._before = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        signal.set_wakeup_fd(self._before)
        self._written.close()
        self._thread.join()
        self._numbers.close()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        self._began = began = time.monotonic()
        try:
            yield
        finally:
            self._began = None
            self._longest = max(self._longest, time.monotonic() - began)

    def _run(self) -> None:
        first, came, is_answered = 0, 0.0, False
        while True:
            try:
                number = self._numbers.recv(1)
            except TimeoutError:
                if not is_answered:  # compiling takes minutes, in which nothing else would answer
                    is_answered = True
                    _answer(first)
                patience = max(_STEP_SECONDS, _TIMES_LONGEST * self._longest)
                began = self._began
                if began is not None and time.monotonic() - max(began, came) > patience:
                    _end(first, f"the step did not end within {patience:.0f} s")
                continue
            if not number:  # `stop`
                return
            if number[0] not in self._signals:
                continue
            if not first:
                first, came = number[0], time.monotonic()
                self._numbers.settimeout(_POLL_SECONDS)
            elif number[0] != signal.SIGHUP and time.monotonic() - came > _ECHO_SECONDS:
                time.sleep(_HANDLER_SECONDS)
                _end(number[0], "the second signal")


def _end(signum: int, why: str) -> None:
    processes.end_at_once(
        f"{_name(signum)}: {why}; the same command resumes from the last checkpoint, if any", 128 + signum
    )


def _answer(signum: int) -> None:
    words = f"\n{_name(signum)}: the run ends after this step and saves it; a second signal ends it at once\n"
    with contextlib.suppress(OSError):  # of a terminal that is closed
        os.write(2, words.encode())  # not through sys.stderr, whose lock the main thread may hold


def _name(signum: int) -> str:
    return signal.Signals(signum).name


def _forget_closed(terminals: list[int]) -> None:
    """Lets what is written to closed terminals go nowhere: it would be an error, before the save."""
    closed = [stream for stream in terminals if not os.isatty(stream)]
    if closed:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in closed:
            os.dup2(nowhere, stream)
        os.close(nowhere)
