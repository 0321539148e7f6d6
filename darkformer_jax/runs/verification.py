"""Decides which steps may be restored: compares a step's bytes with its manifest before anything is read back.

Orbax alone reads a flipped bit, or a hole of zeros, as if nothing had happened.
"""

from collections.abc import Callable

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from darkformer_jax.errors import UserError
from darkformer_jax.runs.manifest import FORMAT, Damaged, check_files, read_manifest
from darkformer_jax.runs.step_files import StepFiles

_NO_STEP, _ONLY_DAMAGED = -1, -2  # instead of a step, when process 0 tells the others


class Verification:
    """Chooses steps by their bytes. Process 0 reads and judges; all processes get its answer.

    Attributes:
      damage: step -> why, for the steps found damaged so far.
    """

    def __init__(self, files: StepFiles) -> None:
        self._files = files
        self.damage: dict[int, str] = {}

    def newest(self) -> int | None:
        """The newest step whose bytes match its manifest; None if there is no step at all.

        A warning says which newer steps are damaged, and how. Raises UserError if all steps are damaged, or if a newer
        version saved the step.
        """
        step = _from_process_0(self._newest_good)
        if step == _ONLY_DAMAGED:
            raise UserError(f"every checkpoint in {self._files.directory} is damaged: {self._reasons()}")
        if step == _NO_STEP:
            return None
        self._refuse_newer_format(step)
        return step

    def require(self, step: int) -> None:
        """Raises UserError if `step` is absent or damaged, or if a newer version saved it."""
        answer = _from_process_0(lambda: self._judged(step))
        if answer == _NO_STEP:
            there = ", ".join(map(str, self._files.committed())) or "none"
            raise UserError(f"no checkpoint step {step} in {self._files.directory}; there are: {there}")
        if answer == _ONLY_DAMAGED:
            raise UserError(f"checkpoint step {step} in {self._files.directory} is damaged: {self._reasons()}")
        self._refuse_newer_format(step)

    def best(self, steps: list[int], metric: str) -> int | None:
        """The one of `steps` with the smallest `metric`, the newest of several; None if no step has the metric."""
        values = {}
        for step in steps:
            try:
                value = read_manifest(self._files.manifest(step), step)["metrics"].get(metric)
            except Damaged as damage:
                self.damage[step] = str(damage)
                continue
            if value is not None:
                values[step] = value
        return min(values, key=lambda step: (values[step], -step), default=None)

    def _newest_good(self) -> int:
        steps = self._all_steps()
        return next((step for step in reversed(steps) if self._is_good(step)), _ONLY_DAMAGED if steps else _NO_STEP)

    def _judged(self, step: int) -> int:
        if step not in self._all_steps():
            return _NO_STEP
        return step if self._is_good(step) else _ONLY_DAMAGED

    def _all_steps(self) -> list[int]:
        return sorted({*self._files.committed(), *self._files.without_manifest()})

    def _is_good(self, step: int) -> bool:
        try:
            manifest = read_manifest(self._files.manifest(step), step)
            if manifest["format"] <= FORMAT:  # `_refuse_newer_format` refuses a newer one on every process
                check_files(self._files.path(step), manifest["files"])
        except Damaged as damage:
            self.damage[step] = str(damage)
            where = self._files.directory
            logging.warning("checkpoint step %d in %s is damaged and not used: %s", step, where, damage)
            return False
        self.damage.pop(step, None)
        return True

    def _refuse_newer_format(self, step: int) -> None:
        saved = read_manifest(self._files.manifest(step), step)["format"]
        if saved > FORMAT:
            raise UserError(
                f"checkpoint step {step} in {self._files.directory} was saved by a newer version of darkformer_jax "
                f"(format {saved}, this version reads up to {FORMAT}); update darkformer_jax"
            )

    def _reasons(self) -> str:
        known = [f"step {step}: {reason}" for step, reason in sorted(self.damage.items(), reverse=True)]
        return "; ".join(known) or "see the warnings of process 0"


def _from_process_0(answer: Callable[[], int]) -> int:
    # One process reads and judges: P processes need not hash the same files, and must not disagree.
    if jax.process_count() == 1:
        return answer()
    value = answer() if jax.process_index() == 0 else _NO_STEP
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
