"""Checkpoints that survive kill -9 and notice damaged bytes: Orbax's asynchronous writer and one manifest per step.

A step exists if its manifest does. The manifest is written after Orbax's commit, and compared with the bytes before
anything is read back. If a step has no manifest but is marked as unfinished, a kill left it, and the next save removes
it. If it has neither, its manifest was lost; it counts as damaged, because its bytes cannot be checked. Every decision
(which steps exist, which are the newest and the best) is read from the disk, never from memory, so a killed run leaves
nothing to repair. step_files.py names the files; verification.py judges their bytes.

Orbax's CheckpointManager is not used because it counts stray directories as steps, and because it removes older steps
on its own once a step is committed: before the new step has its manifest, even if the new step is damaged. The
manifests are our own because Orbax does not notice damage.
"""

import concurrent.futures
import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from darkformer_jax.distributed import processes
from darkformer_jax.errors import Transient, UserError, one_line
from darkformer_jax.runs.manifest import Damaged, hash_files, read_manifest, write_manifest
from darkformer_jax.runs.step_files import StepFiles
from darkformer_jax.runs.verification import Verification
from darkformer_jax.runs.workdir import Workdir

PyTree = Any


class Checkpoints:
    """The checkpoints of one run: the newest `keep` and the best one.

    Nothing is created or removed before the first `save`, so a reader may open the workdir of a running run. On a pod,
    every process makes the same calls on a shared workdir.

    Args:
      workdir: the run's directory.
      keep: newest steps kept, at least 1. Only `save` uses it.
      save_every: steps between saves, for `due`; 0 = never due.
      best: the metric whose smallest value is the best step's. Only `save` uses it.
      compress: False writes arrays as they are. `save` then makes no compressed copies, which take as much memory
        again if all arrays are written at once.
    """

    def __init__(
        self,
        workdir: Workdir,
        keep: int = 1,
        save_every: int = 0,
        best: str = "heldout_loss",
        compress: bool = True,
    ) -> None:
        if keep < 1:
            raise UserError(f"checkpoint.keep = {keep}: must be at least 1")
        if save_every < 0:
            raise UserError(f"checkpoint.every = {save_every}: must be at least 0")
        self._files = StepFiles(workdir.checkpoints)
        self._verification = Verification(self._files)
        self._keep = keep
        self._save_every = save_every
        self._best = best
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(use_compression=compress),
            async_options=ocp.options.AsyncOptions(timeout_secs=int(processes.WORK_SECONDS)),
        )
        self._committer = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint_commit")
        self._pending: concurrent.futures.Future[None] | None = None
        self._held: int | None = None  # the step whose state is both in this process and on the disk

    @property
    def directory(self) -> Any:
        """Where the steps are: a Path, or etils' path in a bucket."""
        return self._files.directory

    def due(self, step: int) -> bool:
        """Whether `step` is one of the regular saves. Depends on the step alone, so all processes agree."""
        return self._save_every > 0 and step % self._save_every == 0

    # Writing

    def save(
        self,
        step: int,
        state: PyTree,
        metrics: Mapping[str, float] | None = None,
        carried: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts saving `state` and returns once it is copied to host memory; the caller may donate it right away.

        It first waits for the save before it. The step exists once its manifest is on disk. Only then are older steps
        removed, and with them steps newer than `step` (from a continuation that was given up). Damaged steps are
        renamed to `<step>.damaged`, with a warning. Saving the step that was just saved or restored writes only its
        metrics: the state, and what it carries, are functions of the step.

        Args:
          step: at least 0.
          state: nested dicts of jax.Arrays, none of size 0; on a pod, of global arrays.
          metrics: numbers that belong to the step. The one that `best` names decides which step is the best.
          carried: JSON values that a run needs to resume at the step as if it had not stopped; see `carried`.

        Raises:
          UserError: the directory cannot be written or the disk is full, in this save or in the one before it.
        """
        self.wait()
        known = _finite(metrics or {})
        with self._writing(step):
            if step == self._held:
                self._update_metrics(step, known)
                return
            if jax.process_index() == 0:
                self._prepare(step, state)
            self._held = None
            self._checkpointer.save(self._files.path(step), args=ocp.args.PyTreeSave(state), force=True)
        self._held = step
        self._pending = self._committer.submit(self._commit, step, known, dict(carried or {}))

    def wait(self) -> None:
        """Returns when the last save is committed. Raises UserError, once, if it could not be written."""
        if self._pending is None:
            return
        try:
            self._pending.result()
        except Exception as error:
            step, self._held, self._pending = self._held, None, None
            raise self._not_written(step, error) from error
        self._pending = None

    def close(self) -> None:
        """Waits, then frees the threads. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._committer.shutdown()
            self._checkpointer.close()

    def _prepare(self, step: int, state: PyTree) -> None:
        self._files.require_space(step, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        self._set_aside_damaged(step)
        self._files.begin(step)
        self._files.remove_leftovers(step)

    def _set_aside_damaged(self, step: int) -> None:
        """Renames damaged and foreign steps that are in the way of `step` or later steps and are not ours to delete."""
        lost = {number for number in self._files.without_manifest() if number >= step}
        foreign = {step} if self._files.is_foreign(step) else set()
        for number in sorted({*self._verification.damage, *lost, *foreign}):
            self._files.set_aside(number)
            self._verification.damage.pop(number, None)

    def _commit(self, step: int, metrics: dict[str, float | None], carried: dict[str, Any]) -> None:
        self._checkpointer.wait_until_finished()  # Orbax has renamed its temporary directory to <step>
        if jax.process_index() == 0:
            write_manifest(self._files.manifest(step), step, hash_files(self._files.path(step)), metrics, carried)
            self._files.finish(step)
            self._verification.damage.pop(step, None)
            self._prune(step)
        processes.barrier("checkpoint")  # no process may end the run before the manifest is there

    def _prune(self, newest: int) -> None:
        damage, steps = self._verification.damage, self.committed_steps()
        live = [step for step in steps if step <= newest and step not in damage]
        kept = {*live[-self._keep :], self._verification.best(live, self._best)}
        for step in sorted(set(steps) - kept - damage.keys()):  # damaged ones are set aside before the next save
            self._files.remove(step)

    def _update_metrics(self, step: int, metrics: dict[str, float | None]) -> None:
        if metrics and jax.process_index() == 0:
            path = self._files.manifest(step)
            manifest = read_manifest(path, step)
            write_manifest(path, step, manifest["files"], {**manifest["metrics"], **metrics}, manifest["carried"])

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        errors: tuple[type[Exception], ...] = (Damaged, *self._files.errors)
        try:
            yield
        except UserError:
            raise
        except errors as error:
            raise self._not_written(step, error) from error

    def _not_written(self, step: int | None, error: Exception) -> UserError:
        reason = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
        first_line = reason.splitlines()[0]
        if error.__cause__ is not None:  # for a time-out: which process is missing
            first_line += f" ({one_line(error.__cause__)[:300]})"
        return Transient(f"checkpoint step {step} could not be written to {self.directory}: {first_line}")

    # Reading

    def committed_steps(self) -> list[int]:
        """All steps that have a manifest, ascending. Their bytes are not checked."""
        return self._files.committed()

    def steps_without_manifest(self) -> list[int]:
        """Finished checkpoints that have lost their manifest, ascending. They count as damaged."""
        return self._files.without_manifest()

    def latest_good_step(self) -> int | None:
        """The newest step whose bytes match its manifest; None if no step was ever committed.

        A warning says which newer steps are damaged, and how. Raises UserError if all steps are damaged, or if a newer
        version saved the step.
        """
        self.wait()
        return self._verification.newest()

    def good_step(self, step: int | None = None) -> int:
        """`step`, or the newest undamaged one. Raises UserError if `step`, or every step, is damaged or absent."""
        self.wait()
        if step is not None:
            self._verification.require(step)
            return step
        newest = self.latest_good_step()
        if newest is None:
            raise UserError(f"no checkpoint in {self.directory}")
        return newest

    def restore(
        self, abstract_state: PyTree, step: int | None = None, *, partial: bool = False, verify: bool = True
    ) -> tuple[int, PyTree]:
        """Reads a step back, bit for bit, onto the given shardings, which need not be those it was saved with.

        Args:
          abstract_state: nested dicts of jax.ShapeDtypeStruct with shardings (without one: the default device).
          step: None = the newest undamaged one. A warning says which damaged steps are passed over, and why.
          partial: `abstract_state` may leave out leaves of the checkpoint, which are then not read.
          verify: compare the hashes; not needed for a step that comes from `good_step`.

        Returns:
          The step and its state.

        Raises:
          UserError: `step`, or every step, is damaged or absent; or names, shapes or dtypes differ.
        """
        if step is None or verify:
            step = self.good_step(step)
        self._require_fit(abstract_state, step, partial)
        abstract_state = jax.tree.map(_with_sharding, abstract_state)
        state = self._checkpointer.restore(
            self._files.path(step),
            args=ocp.args.PyTreeRestore(
                item=abstract_state,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_state),
                partial_restore=partial,
            ),
        )
        if not partial:
            self._held = step
        return step, state

    def carried(self, step: int) -> dict[str, Any]:
        """What `save` was given to carry to a run that resumes at `step`, which `good_step` has checked.

        Empty for a step that an earlier version saved.
        """
        carried: dict[str, Any] = read_manifest(self._files.manifest(step), step)["carried"]
        return carried

    def saved_shapes(self, step: int) -> PyTree:
        """The tree of `step` as jax.ShapeDtypeStruct without shardings, nested dicts keyed by str."""
        saved = self._checkpointer.metadata(self._files.path(step)).item_metadata.tree
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved)

    def _require_fit(self, abstract_state: PyTree, step: int, partial: bool) -> None:
        saved, wanted = _leaves(self.saved_shapes(step)), _leaves(abstract_state)
        problems = [
            f"{name}: {_shown(saved.get(name))} saved, {_shown(wanted.get(name))} expected"
            for name in sorted(wanted.keys() | (set() if partial else saved.keys()))
            if _shown(saved.get(name)) != _shown(wanted.get(name))
        ]
        if problems:
            more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
            raise UserError(
                f"checkpoint step {step} in {self.directory} belongs to another model: "
                + "; ".join(problems[:4])
                + more
            )


def best_step(workdir: Workdir, metric: str = "heldout_loss") -> int | None:
    """The step that `Checkpoints.save` keeps as the best one, of those that are there; None if none has the metric."""
    files = StepFiles(workdir.checkpoints)
    return Verification(files).best(files.committed(), metric)


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    # A loss that is not finite is never the best; null keeps the file plain JSON.
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}


def _with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _leaves(tree: PyTree) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _shown(leaf: Any) -> str:
    return "nothing" if leaf is None else f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
