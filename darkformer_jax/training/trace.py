"""Profiles some steps of a run."""

from typing import Any

import jax
from absl import logging

from darkformer_jax.runs.workdir import Workdir

PROFILE_DIRECTORY = "profile"


class TraceWindow:
    """Records steps first .. first + count - 1 with jax's profiler, into <workdir>/profile; first = 0 records nothing.

    TensorBoard's profile plugin and xprof read it.
    """

    def __init__(self, workdir: Workdir, first: int, count: int) -> None:
        self._directory = str(workdir / PROFILE_DIRECTORY)
        self._first, self._last = first, first + count - 1
        self._runs = False

    def begin(self, step: int, last_step: int) -> None:
        """Begins a session from the weights after `step` to `last_step`. Warns if the window does not begin in it."""
        if self._first and not step < self._first <= last_step:
            logging.warning(
                "profile.first_step = %d records nothing: this session's steps are %d to %d",
                self._first,
                step + 1,
                last_step,
            )

    def before(self, step: int) -> None:
        """Call it before step `step` is dispatched."""
        if self._first and step == self._first:
            jax.profiler.start_trace(self._directory)
            self._runs = True

    def after(self, step: int, state: Any) -> None:
        """Call it after step `step` was dispatched; `state` is its result."""
        if self._runs and step >= self._last:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends a recording that is running, because a signal or an error may come within the window."""
        if self._runs:
            self._runs = False
            jax.profiler.stop_trace()
