"""The progress of a command: one live line on a terminal, plain lines elsewhere."""

import os
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any, TextIO

import tqdm

from darkformer_jax.data.progress import no_progress
from darkformer_jax.distributed import processes

_CLEAR = "\r\x1b[K"  # back to the first column, erase to the end of the line
_SECONDS_BETWEEN_LINES = 30.0  # where the output is no terminal
_bars: weakref.WeakSet[tqdm.tqdm] = weakref.WeakSet()


def progress_bar(total: float | None, unit: str, label: str = "") -> Any:
    """A tqdm bar on stderr. It counts bytes and tokens (`unit` "B" and "token") in thousands, millions and so on.

    Without a total it shows the label and the time.
    """
    interval = 0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES
    large = unit in ("B", "token")
    form = "{desc}: {elapsed}" if total is None else None
    bar = tqdm.tqdm(desc=label or None, total=total, unit=unit, unit_scale=large, mininterval=interval, bar_format=form)
    _bars.add(bar)
    return bar


def end_bars() -> None:
    """Ends the lines of all bars, so that what is printed next stands on a line of its own.

    An error leaves a bar open if it comes from what was between two of its items.
    """
    for bar in list(_bars):
        bar.close()


class Progress:
    """Shows `step 120/1000  loss 2.345  12.3k tok/s  mfu 3.1%  memory 1.2 GiB  eta 03:21`.

    On a terminal it is one line, rewritten in place and never wider than the window. Elsewhere (a file, a pipe) it is a
    line per `log_every` steps and one for the last step, which tqdm cannot do. Only process 0 prints.

    Args:
      num_steps: the run's last step.
      log_every: steps between plain lines.
      stream: the output; None = stderr, so that a verb's output stays clean on stdout.
      clock: monotonic seconds; tests pass their own.
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
        self._live = self._stream.isatty()
        self._line = ""
        self._first: tuple[int, float] | None = None  # step and time of the first update, after the compile

    def update(
        self, step: int, loss: float, tokens_per_second: float | None, mfu: float | None, memory_bytes: int
    ) -> None:
        """Shows a finished step; call it for every step.

        Args:
          step: optimizer step, from 1.
          loss: nats per token, or per example; the mean over the steps since the last line of metrics.jsonl.
          tokens_per_second: over all devices; None = not known yet, after the step that was compiled.
          mfu: model FLOP/s over the devices' peak, from 0 to 1; None = not known.
          memory_bytes: of the device, or of the host if the device is the CPU.
        """
        fields = {
            "step": f"step {step}/{self._num_steps}",
            "loss": f"loss {loss:.3f}",
            "speed": "" if tokens_per_second is None else f"{tqdm.tqdm.format_sizeof(tokens_per_second)} tok/s",
            "mfu": "" if mfu is None else f"mfu {100 * mfu:.1f}%",
            "memory": f"memory {memory_bytes / 2**30:.1f} GiB",
            "eta": f"eta {self._time_left(step)}",
        }
        if self._live:
            self._line = _fit(fields, self._columns() - 1)  # some terminals wrap when the last column is written
            self._write(_CLEAR + self._line)
        elif step % self._log_every == 0 or step == self._num_steps:
            self._write(_join(fields) + "\n")

    def note(self, text: str) -> None:
        """Prints a line that stays, such as the result of an evaluation, above the live line."""
        self._write(f"{_CLEAR}{text}\n{self._line}" if self._live else text + "\n")

    def bar(self, total: float | None, unit: str, label: str = "") -> Any:
        """A `progress_bar` for work before the first step."""
        return (progress_bar if processes.process_index() == 0 else no_progress)(total, unit, label)

    def close(self) -> None:
        """Ends the live line, so that what is printed next starts on its own line."""
        if self._line:
            self._write("\n")
            self._line = ""

    def _time_left(self, step: int) -> str:
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
        first_step, first_time = self._first
        left = self._num_steps - step
        if left > 0 and step == first_step:
            return "--:--"
        seconds = left * (now - first_time) / (step - first_step) if left > 0 else 0.0
        return tqdm.tqdm.format_interval(round(seconds))

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80  # 0 where the terminal does not know
        except (OSError, ValueError):
            return 80

    def _write(self, text: str) -> None:
        if processes.process_index() == 0:
            self._stream.write(text)
            self._stream.flush()


def _fit(fields: dict[str, str], width: int) -> str:
    shown = dict(fields)
    for name in ("mfu", "memory", "speed", "eta", "loss"):  # in the order in which a narrow terminal drops them
        if len(_join(shown)) <= width:
            break
        shown.pop(name)
    return _join(shown)[: max(width, 0)]


def _join(fields: dict[str, str]) -> str:
    return "  ".join(text for text in fields.values() if text)
