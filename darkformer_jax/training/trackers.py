"""Sends what a run measures to experiment trackers. None of them may end the run or hold it up."""

import contextlib
import importlib.util
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import jax

from darkformer_jax.errors import UserError, one_line
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.training.mlflow_tracker import MlflowTracker
from darkformer_jax.training.wandb_tracker import WandbTracker

_WAITING = 10_000  # calls that may wait for a slow tracker
_SECONDS_AT_THE_END = 30.0  # in which it may send what is left
_SECONDS_AFTER_A_STOP = 10.0  # the same, where a batch system may be about to kill the run


class Tracker(Protocol):
    """A run in an experiment tracker. Every method may block, and may raise whatever the tracker's library raises.

    Attributes:
      package: what to install.
      where: for people: where the run is to be seen.
    """

    package: ClassVar[str]

    @property
    def where(self) -> str: ...

    @classmethod
    def open(cls, workdir: Workdir, config: Mapping[str, Any]) -> Self:
        """Begins a run, or goes on with the one whose id is in the workdir.

        config: the fields by their dotted names; they become the run's parameters.
        """
        ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the numbers of one line of metrics.jsonl. A resumed run sends some lines once more, unchanged."""
        ...

    def picture(self, path: Path) -> None:
        """Sends a PNG."""
        ...

    def text(self, path: Path) -> None:
        """Sends a text file."""
        ...

    def close(self, finished: bool) -> None:
        """Sends what is left. finished: the run has come to its end; otherwise it may go on later."""
        ...


TRACKERS: Mapping[str, type[Tracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker}


def require_installed(names: str) -> None:
    """Raises UserError if the package of one of the trackers that `log.trackers` names is not installed."""
    for name in _split(names):
        package = TRACKERS[name].package
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:  # a folder ./wandb, which wandb makes, is found, too
            raise UserError(f"log.trackers = {names!r}: {package} is not installed; pip install {package}")


class Trackers(contextlib.AbstractContextManager["Trackers"]):
    """The trackers of a run, each with a thread of its own. Only process 0 has any.

    A tracker that fails, or that takes its calls too slowly, is given up with one line, and the run goes on. Leaving
    the context closes them.

    Args:
      names: `log.trackers`, comma-separated.
      note: prints a line.
    """

    def __init__(self, names: str, note: Callable[[str], None]) -> None:
        self._names, self._note = _split(names), note
        self._senders: list[_Sender] = []

    def start(self, workdir: Workdir, config: Mapping[str, Any]) -> None:
        """Opens the trackers, in the background. The workdir must be this run's."""
        if jax.process_index() == 0:
            self._senders = [_Sender(name, workdir, config) for name in self._names]

    def scalars(self, step: int, values: Mapping[str, Any], time: Mapping[str, Any] | None = None) -> None:
        """Sends what `MetricWriter.write` gets; times are called `time/...`, as in TensorBoard."""
        numbers = {**values, **{f"time/{name}": value for name, value in (time or {}).items()}}
        self._send(lambda tracker: tracker.scalars(step, numbers))

    def picture(self, path: Path) -> None:
        """Sends a PNG, which must stay where it is."""
        self._send(lambda tracker: tracker.picture(path))

    def text(self, path: Path) -> None:
        """Sends a text file, which must stay where it is."""
        self._send(lambda tracker: tracker.text(path))

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        finished = kind is None
        for sender in self._senders:
            sender.finish(finished)
        for sender in self._senders:
            sender.wait(_SECONDS_AT_THE_END if finished else _SECONDS_AFTER_A_STOP)
        self._tell()
        self._senders = []

    def _send(self, call: Callable[[Tracker], None]) -> None:
        for sender in self._senders:
            sender.send(call)
        self._tell()

    def _tell(self) -> None:
        """Prints the senders' news here, because two threads would write into each other's lines."""
        for sender in self._senders:
            while sender.news:
                self._note(sender.news.pop(0))


class _Sender:
    """Makes the calls of one tracker, one after another, in a thread that does not keep the process alive.

    Attributes:
      news: lines for people.
    """

    def __init__(self, name: str, workdir: Workdir, config: Mapping[str, Any]) -> None:
        self.news: list[str] = []
        self._name = name
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(_WAITING)
        self._given_up = False
        self._thread = threading.Thread(target=self._run, args=(workdir, config), name=name, daemon=True)
        self._thread.start()

    def send(self, call: Callable[[Tracker], None] | None) -> None:
        """Lets the thread make the call; None = it was the last one."""
        if self._given_up:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._give_up(f"{_WAITING:,} calls wait for it")

    def finish(self, finished: bool) -> None:
        """Lets the thread close the tracker and end."""
        self.send(lambda tracker: tracker.close(finished))
        self.send(None)

    def wait(self, seconds: float) -> None:
        """Returns when the thread has ended, or after so long."""
        if self._given_up:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._give_up(f"not all was sent within {seconds:.0f} s")

    def _run(self, workdir: Workdir, config: Mapping[str, Any]) -> None:
        try:
            tracker = TRACKERS[self._name].open(workdir, config)
            self.news.append(f"{self._name}: {tracker.where}")
            while (call := self._calls.get()) is not None:
                call(tracker)
        except Exception as error:  # no network, no login, a server's error: the libraries have no common one
            self._give_up(one_line(error)[:300] or type(error).__name__)

    def _give_up(self, why: str) -> None:
        self._given_up = True
        self.news.append(f"warning: {self._name} gets no more of this run: {why}")


def _split(names: str) -> list[str]:
    return names.split(",") if names else []
