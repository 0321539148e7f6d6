"""metrics.jsonl and TensorBoard events: what a run measured, in an order that a kill and a resume do not change."""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from time import time as clock
from typing import Any

import jax
import numpy as np
from absl import logging
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from darkformer_jax.data.files import write_atomically
from darkformer_jax.errors import Transient, UserError
from darkformer_jax.runs.workdir import Workdir

METRICS_FILE = "metrics.jsonl"


class MetricWriter:
    """Appends lines `{"step": 10, "loss": 2.3, ..., "time": {...}}` to metrics.jsonl, and the same to TensorBoard.

    A line is in the file when `write` returns, so kill -9 loses at most the line that is being written. Measured times
    go under `time` and nowhere else. Without that key, the file of a killed and resumed run equals that of an unbroken
    one, provided the lines of all steps <= N are written before checkpoint N is saved.
    On a pod, only process 0 writes.

    Args:
      workdir: the run's directory; created if absent.
      resumed_from: the restored step. Lines of later steps and a line that a kill tore are dropped, because the run
        writes them again. None = the run starts from scratch: all lines are dropped.

    Raises:
      UserError: metrics.jsonl cannot be read or written.
    """

    def __init__(self, workdir: Workdir, resumed_from: int | None = None) -> None:
        self._path = workdir / METRICS_FILE
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        first_step = 0 if resumed_from is None else resumed_from + 1
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                kept = [line for line in _parse(self._path) if line["step"] < first_step]
                write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
            self._events = _open_events(self._path.parent / "tensorboard", first_step)
        except OSError as error:
            raise self._not_written(error) from error

    def write(self, step: int, values: Mapping[str, Any], *, time: Mapping[str, Any] | None = None) -> None:
        """Writes one line.

        Args:
          step: the optimizer step that the values belong to.
          values: scalars (Python, numpy or jax) that are functions of the config and the step, such as `loss`; one
            that is not finite becomes null.
          time: scalars that depend on a clock or the machine's state, such as `tokens_per_second`.
        """
        if not self._writes:
            return
        if reserved := {"step", "time"} & values.keys():
            raise ValueError(f"{sorted(reserved)[0]!r} is not a metric's name")
        numbers = {name: _number(value) for name, value in values.items()}
        timings = {name: _number(value) for name, value in (time or {}).items()}
        line: dict[str, Any] = {"step": int(step), **_plain(numbers)}
        if timings:
            line["time"] = _plain(timings)
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            for name, number in {**numbers, **{f"time/{name}": number for name, number in timings.items()}}.items():
                self._events.write_event(Event(wall_time=clock(), step=int(step), summary=scalar(name, number)))
            self._events.flush()
        except OSError as error:
            raise self._not_written(error) from error

    def close(self) -> None:
        """Closes both files. `write` has flushed them, so an error here loses nothing."""
        if self._writes:
            for file in (self._file, self._events):
                with contextlib.suppress(OSError):
                    file.close()

    def _not_written(self, error: OSError) -> UserError:
        return Transient(f"{self._path} cannot be written: {error.strerror or error}")


def _open_events(directory: Path, first_step: int) -> EventsWriter:
    """A new event file that makes TensorBoard forget the steps that will be written again.

    tensorboardX's SummaryWriter is not used: a full disk silently ends its writing thread, and then its queue blocks.
    """
    directory.mkdir(exist_ok=True)
    events = EventsWriter(str(directory / "events"), f".{os.getpid()}")
    events.write_event(Event(wall_time=clock(), step=first_step, session_log=SessionLog(status=SessionLog.START)))
    events.flush()
    return events


def read_metrics(workdir: Workdir) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in file order, without torn ones. Raises UserError if there is no file."""
    path = workdir / METRICS_FILE
    try:
        return _parse(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _parse(path: Path) -> list[dict[str, Any]]:
    lines = []
    for number, text in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not text:
            continue
        try:
            line = json.loads(text)
            if not isinstance(line["step"], int):
                raise ValueError("step is not an integer")
        except (ValueError, KeyError, TypeError):
            logging.warning("%s: line %d is not a metrics line and is dropped", path, number)
            continue
        lines.append(line)
    return lines


def _number(value: Any) -> int | float:
    array = np.asarray(value)
    return int(array) if np.issubdtype(array.dtype, np.integer) else float(array)


def _plain(numbers: Mapping[str, int | float]) -> dict[str, int | float | None]:
    # JSON has no NaN or infinity. A run that meets one says so and stops.
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}
