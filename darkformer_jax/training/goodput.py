"""Where a run's time went, over all its restarts: steps that count, and everything else."""

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging

from darkformer_jax.data.files import write_atomically
from darkformer_jax.errors import UserError, one_line
from darkformer_jax.runs.workdir import Workdir

SESSIONS_FILE = "sessions.jsonl"
PARTS = ("starting", "steps", "evaluation", "saves")  # "starting": to the end of the first step

_SECONDS_BETWEEN_WRITES = 10.0  # a kill loses this much of the account


class Stopwatch:
    """Keeps an account of a run's time in <workdir>/sessions.jsonl, with a line for every start of the run.

    `lap` adds the time since the last lap to a part. Only process 0 writes.

    Args:
      workdir: the run's directory.
      clock: seconds since the epoch; tests pass their own.
    """

    def __init__(self, workdir: Workdir, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = workdir / SESSIONS_FILE, clock
        self._began = self._last = self._written = clock()
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._earlier: list[dict[str, Any]] | None = None
        self._facts: dict[str, Any] = {}
        self._first_step = self._step = 0

    def begin(self, step: int, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Begins a session with the weights after `step`. An account that cannot be read is renamed.

        Returns the facts of the session before; empty if there is none, and in all processes but the first.

        facts: what the session computes, and on what, as JSON values; they stand in its line under `facts`.
        """
        if jax.process_index() != 0:
            return {}
        try:
            self._earlier = _read(self._path)
        except UserError as error:
            logging.warning("%s; a new account begins", error)
            with contextlib.suppress(OSError):
                self._path.replace(self._path.with_suffix(".damaged"))
            self._earlier = []
        self._first_step = self._step = step
        self._facts = dict(facts or {})
        return self._earlier[-1].get("facts", {}) if self._earlier else {}

    def lap(self, part: str, step: int) -> None:
        """Adds the time since the last lap to `part`. step: the last finished step."""
        now = self._clock()
        # A clock that was set back must not make time negative.
        self._seconds[part] += max(0.0, now - self._last)
        self._last, self._step = now, step
        if now - self._written >= _SECONDS_BETWEEN_WRITES or now < self._written:
            self.write()

    def close(self) -> None:
        """Ends the session; the time since the last lap was a wait for the last save."""
        self.lap("saves", self._step)
        self.write()

    def write(self) -> None:
        """Writes the account. If the file cannot be written, training continues without it.

        A session without a step is not written, so that a finished run's command changes nothing when it runs again.
        """
        if self._earlier is None or self._step == self._first_step:
            return
        self._written = self._last
        session = {
            "began": self._began,
            "ended": max(self._last, self._began),
            "first_step": self._first_step,
            "last_step": self._step,
            "seconds": self._seconds,
            "facts": self._facts,
        }
        lines = [json.dumps(line) + "\n" for line in (*self._earlier, session)]
        try:
            write_atomically(self._path, "".join(lines).encode())
        except OSError as error:
            logging.warning("%s cannot be written: %s", self._path, error)


def read_sessions(workdir: Workdir) -> list[dict[str, Any]]:
    """The accounts of all sessions so far; empty if there is no file.

    Raises UserError if the file is damaged.
    """
    return _read(workdir / SESSIONS_FILE)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error


def goodput(sessions: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of the time from the first start to the last end, which sum to one.

    steps: those whose result was kept. repeated: steps after the checkpoint that a later session started from.
    stopped: time between sessions. other: time without a lap. The rest are as in PARTS.
    """
    total = sessions[-1]["ended"] - sessions[0]["began"]
    shares = dict.fromkeys((*PARTS, "repeated", "stopped"), 0.0)
    for index, session in enumerate(sessions):
        later = sessions[index + 1 :]
        seconds = session["seconds"]
        for part in PARTS:
            shares[part] += seconds[part]
        if later:
            shares["stopped"] += max(0.0, later[0]["began"] - session["ended"])
            made = session["last_step"] - session["first_step"]
            # A session may start before the previous one's first step, if the checkpoints in between are damaged.
            lost = max(0, session["last_step"] - min(other["first_step"] for other in later))
            repeated = seconds["steps"] * min(1.0, lost / made) if made else 0.0
            shares["steps"] -= repeated
            shares["repeated"] += repeated
    shares["other"] = max(0.0, total - sum(shares.values()))
    whole = max(total, sum(shares.values()))
    return {name: value / whole if whole else 0.0 for name, value in shares.items()}


def duration(seconds: float) -> str:
    """`seconds` for people: 38 s, 4.5 min, 2.1 h, 3.0 days."""
    if seconds < 59.5:  # which rounds to 60
        return f"{seconds:.0f} s"
    if seconds < 59.95 * 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def describe(sessions: list[dict[str, Any]]) -> str:
    """One line: the goodput, then what took the rest of the time, largest first. Needs at least one session."""
    shares = goodput(sessions)
    steps = shares.pop("steps")
    rest = sorted(((share, name) for name, share in shares.items() if share >= 5e-4), reverse=True)
    whole = duration(sessions[-1]["ended"] - sessions[0]["began"])
    starts = f"{len(sessions)} start" + "s" * (len(sessions) > 1)
    others = ", ".join(f"{name} {share:.1%}" for share, name in rest)
    return f"goodput: {steps:.1%} of {whole}, in {starts}, were steps that count; the rest: {others}"
