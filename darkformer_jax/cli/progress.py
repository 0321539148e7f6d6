"""One live line with the time left on a terminal, plain lines elsewhere; and the memory a run uses."""

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import jax

_CLEAR = "\r\x1b[K"  # back to the first column, erase to the end of the line


class Progress:
    """Shows `step 120/1000  loss 2.345  12.3k tok/s  mfu 3.1%  1.2 GiB  eta 03:21`.

    On a terminal one line, rewritten in place and never wider than the window; elsewhere (a file, a pipe) a line every
    `log_every` steps and one for the last step. On a pod, only process 0 prints.

    Args:
      num_steps: the run's last step.
      log_every: steps between plain lines.
      stream: where to; None = stderr, so that a verb's output stays clean on stdout.
      clock: seconds that only grow; tests pass their own.
    """

    def __init__(
        self,
        num_steps: int,
        log_every: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_steps = num_steps
        self._log_every = log_every
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._prints = jax.process_index() == 0
        self._live = self._stream.isatty()
        self._line = ""
        self._first: tuple[int, float] | None = None  # step and time of the first update, after the compile

    def update(
        self,
        step: int,
        loss: float,
        tokens_per_second: float | None = None,
        mfu: float | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        """Shows a finished step; call it for every step that has figures.

        Args:
          step: optimizer step, from 1.
          loss: nats a token.
          tokens_per_second: over all devices; None = not shown, as for the figures below.
          mfu: model FLOP/s over the devices' peak, from 0 to 1.
          memory_bytes: of the device, or of the host where the device is the CPU.
        """
        left = self._time_left(step)
        if not self._prints:
            return
        fields = {
            "step": f"step {step}/{self._num_steps}",
            "loss": f"loss {loss:.3f}",
            "speed": "" if tokens_per_second is None else f"{_thousands(tokens_per_second)} tok/s",
            "mfu": "" if mfu is None else f"mfu {100 * mfu:.1f}%",
            "memory": "" if memory_bytes is None else f"{memory_bytes / 2**30:.1f} GiB",
            "eta": f"eta {_duration(left)}",
        }
        if self._live:
            self._line = _fit(fields, self._columns() - 1)  # some terminals wrap when the last column is written
            self._write(_CLEAR + self._line)
        elif step % self._log_every == 0 or step == self._num_steps:
            self._write(_join(fields) + "\n")

    def note(self, text: str) -> None:
        """Prints a line that stays, such as the result of an evaluation, above the live line."""
        if not self._prints:
            return
        if self._live:
            self._write(f"{_CLEAR}{text}\n{self._line}")
        else:
            self._write(text + "\n")

    def close(self) -> None:
        """Ends the live line, so that what is printed next starts on its own line."""
        if self._prints and self._live and self._line:
            self._write("\n")
            self._line = ""

    def _time_left(self, step: int) -> float | None:
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
        first_step, first_time = self._first
        if step <= first_step:
            return 0.0 if step >= self._num_steps else None
        return max(self._num_steps - step, 0) * (now - first_time) / (step - first_step)

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80  # 0 where the terminal does not know
        except (OSError, ValueError):
            return 80

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def host_memory_bytes() -> int:
    """Resident memory of this process now; where the system does not tell (not Linux), its peak."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return pages * resource.getpagesize()


def device_memory_bytes() -> int | None:
    """The largest peak of bytes in use among this process's devices; None where the backend does not count (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    return max((stat["peak_bytes_in_use"] for stat in stats if stat and "peak_bytes_in_use" in stat), default=None)


def _fit(fields: dict[str, str], width: int) -> str:
    shown = dict(fields)
    for name in ("mfu", "memory", "speed", "eta", "loss"):  # the first to give up on a narrow terminal comes first
        if len(_join(shown)) <= width:
            break
        shown.pop(name)
    return _join(shown)[: max(width, 0)]


def _join(fields: dict[str, str]) -> str:
    return "  ".join(text for text in fields.values() if text)


def _thousands(value: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.1f}{name}"
    return f"{value:.0f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "--:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute:02}:{second:02}"
