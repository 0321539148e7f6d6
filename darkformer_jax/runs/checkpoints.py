"""Checkpoints that survive kill -9 and notice damaged bytes: Orbax's asynchronous writer and one hash manifest a step.

    workdir/checkpoints/<step>/              what Orbax wrote
    workdir/checkpoints/<step>.sha256.json   size and sha256 of each of its files, and the step's metrics: manifest.py
    workdir/checkpoints/<step>.unfinished    there while the step is written or removed
    workdir/checkpoints/<step>.damaged       a damaged step that a new one took the place of; yours to remove

Orbax reads a flipped bit, or a hole of zeros, as if nothing had happened. So a step exists when its manifest does: the
manifest is written after Orbax's commit, and checked before anything is read back. A step without one is what a kill
left where it is marked as unfinished, and is removed by the next save; elsewhere its manifest was lost, which is damage
like any other: its bytes cannot be checked. Every decision (which steps exist, which are the newest and the best) is
read from the disk, never from memory, so a killed run leaves nothing to repair. Orbax's CheckpointManager is not used
because it counts stray directories as steps and, once a step is committed, removes older ones on its own: before the
new step has its manifest, or though the new step is damaged.
"""

import concurrent.futures
import contextlib
import itertools
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from darkformer_jax.distributed import processes
from darkformer_jax.errors import Transient, UserError, one_line
from darkformer_jax.runs.manifest import (
    FORMAT,
    Damaged,
    check_files,
    hash_files,
    read_manifest,
    write_manifest,
)
from darkformer_jax.runs.store import CHECKPOINTS, is_remote, list_directory, remote_path

PyTree = Any

BEST_METRIC = "heldout_loss"  # smaller is better

_MANIFEST, _UNFINISHED = ".sha256.json", ".unfinished"
_ENTRY = re.compile(r"(0|[1-9][0-9]*)(|\.sha256\.json|\.unfinished)")
_TEMPORARY = re.compile(r"(0|[1-9][0-9]*)\.(orbax-checkpoint-tmp.*|sha256\.json\.tmp)")
_OF_ORBAX = ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "d")  # tell a checkpoint from another directory
_NO_STEP, _ONLY_DAMAGED = -1, -2  # instead of a step, when process 0 tells the others


class Checkpoints:
    """The checkpoints of one run: the newest `keep` and, beside them, the one with the lowest held-out loss.

    Nothing is created or removed before the first `save`, so a reader may open the workdir of a running run. On a pod,
    every process makes the same calls on a shared workdir.

    Args:
      workdir: the run's directory, or gs://bucket/name.
      keep: newest steps kept, at least 1. Only `save` uses it.
      save_every: steps between saves, for `due`; 0 = never due.
      compress: False writes arrays as they are: `save` makes no compressed copies, which for arrays that are written
        all at once would take as much memory again.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], keep: int = 1, save_every: int = 0, compress: bool = True
    ) -> None:
        if keep < 1:
            raise UserError(f"checkpoint.keep = {keep}: must be at least 1")
        if save_every < 0:
            raise UserError(f"checkpoint.every = {save_every}: must be at least 0")
        remote = is_remote(workdir)
        self.directory: Any = (remote_path(workdir) if remote else Path(workdir).absolute()) / CHECKPOINTS
        # A store's library raises what its network does.
        self._store_errors: tuple[type[Exception], ...] = (Exception,) if remote else (OSError,)
        self._keep = keep
        self._save_every = save_every
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(use_compression=compress),
            async_options=ocp.options.AsyncOptions(timeout_secs=int(processes.WORK_SECONDS)),
        )
        self._committer = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint_commit")
        self._pending: concurrent.futures.Future[None] | None = None
        self._held: int | None = None  # the step whose state this process holds and the disk has
        self._damage: dict[int, str] = {}  # steps found damaged, and why

    def due(self, step: int) -> bool:
        """Whether `step` is one of the regular saves. Depends on the step alone, so all processes agree."""
        return self._save_every > 0 and step % self._save_every == 0

    # Writing

    def save(self, step: int, state: PyTree, metrics: Mapping[str, float] | None = None) -> None:
        """Starts saving `state` and returns once it is copied to host memory; the caller may donate it right away.

        A save still under way is waited for first. The step counts from the moment its manifest is on disk; only then
        are older steps removed. Steps newer than `step` (a continuation that was given up) go with them; damaged ones
        are kept beside as `<step>.damaged`, and a warning says so. Saving the step that was just saved or restored
        writes nothing but its metrics: the state is a function of the step.

        Args:
          step: at least 0.
          state: nested dicts of jax.Arrays, none of size 0; on a pod, of global arrays.
          metrics: numbers that belong to the step; `heldout_loss` decides which step is the best.

        Raises:
          UserError: the directory cannot be written or the disk is full, in this save or in the one before it.
        """
        self.wait()
        known = _finite(metrics or {})
        if step == self._held:
            if known and jax.process_index() == 0:
                self._update_metrics(step, known)
            return
        if jax.process_index() == 0:
            self._prepare(step, state)
        self._held = None
        try:
            self._checkpointer.save(self._path(step), args=ocp.args.PyTreeSave(state), force=True)
        except self._store_errors as error:
            raise self._not_written(step, error) from error
        self._held = step
        self._pending = self._committer.submit(self._commit, step, known)

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
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        try:
            if isinstance(self.directory, Path):
                self._require_space(step, size)
            self._set_aside_damaged(step)
            self._entry(step, _UNFINISHED).touch()
            self._entry(step, _MANIFEST).unlink(missing_ok=True)  # from here on an old <step> is a leftover, too
            self._remove_leftovers(step)
        except UserError:
            raise
        except self._store_errors as error:
            raise self._not_written(step, error) from error

    def _require_space(self, step: int, size: int) -> None:
        # Asked beforehand because Orbax fails in a thread, with a page of traceback on stderr.
        self.directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.directory):
            free = shutil.disk_usage(self.directory).free
        if free < size:
            raise UserError(
                f"checkpoint step {step}: {self.directory} has {_megabytes(free)} free, {_megabytes(size)} needed"
            )

    def _commit(self, step: int, metrics: dict[str, float | None]) -> None:
        self._checkpointer.wait_until_finished()  # Orbax has renamed its temporary directory to <step>
        if jax.process_index() == 0:
            write_manifest(self._entry(step, _MANIFEST), step, hash_files(self._path(step)), metrics)
            self._entry(step, _UNFINISHED).unlink()
            self._damage.pop(step, None)
            self._prune(step)
        processes.barrier("checkpoint")  # no process may end the run before the manifest is there

    def _update_metrics(self, step: int, metrics: dict[str, float | None]) -> None:
        path = self._entry(step, _MANIFEST)
        try:
            manifest = read_manifest(path, step)
            write_manifest(path, step, manifest["files"], {**manifest["metrics"], **metrics})
        except UserError:
            raise
        except Damaged as error:
            raise self._not_written(step, error) from error
        except self._store_errors as error:
            raise self._not_written(step, error) from error

    def _prune(self, newest: int) -> None:
        steps = self.committed_steps()
        live = [step for step in steps if step <= newest and step not in self._damage]
        keep = {*live[-self._keep :], self._best(live)}
        for step in steps:
            if step not in keep and step not in self._damage:  # those are set aside before the next save
                self._entry(step, _UNFINISHED).touch()
                self._entry(step, _MANIFEST).unlink()  # before the files: a step half deleted must not count
                self._remove_unfinished(step)

    def _remove_unfinished(self, step: int) -> None:
        with contextlib.suppress(OSError):
            _remove_tree(self._path(step))
        if not self._path(step).exists():
            self._entry(step, _UNFINISHED).unlink()

    def _remove_leftovers(self, step: int) -> None:
        """All that killed saves and removals left, but for the mark of `step`, which is about to be written."""
        for name, is_directory in self._entries().items():
            if _TEMPORARY.fullmatch(name):
                _remove_tree(self.directory / name) if is_directory else (self.directory / name).unlink()
        found = self._found()
        for unfinished in found[_UNFINISHED] - {step}:
            if unfinished in found[_MANIFEST]:
                self._entry(unfinished, _UNFINISHED).unlink()
            else:
                self._remove_unfinished(unfinished)

    def _set_aside_damaged(self, step: int) -> None:
        """Renames what must not be in the way of `step` and those after it, and is not ours to delete."""
        damaged = {*self._damage, *(lost for lost in self.steps_without_manifest() if lost >= step)}
        found = self._found()
        path = self._path(step)
        if step not in found[_MANIFEST] | found[_UNFINISHED] and path.is_dir() and any(path.iterdir()):
            damaged.add(step)  # whatever it is
        for number in sorted(damaged):
            self._set_aside(number)

    def _set_aside(self, step: int) -> None:
        names = (f"{step}.damaged" + (f"-{count}" if count > 1 else "") for count in itertools.count(1))
        name = next(n for n in names if not any((self.directory / f"{n}{end}").exists() for end in ("", _MANIFEST)))
        there = [end for end in (_MANIFEST, "") if self._entry(step, end).exists()]
        for end in there:
            self._entry(step, end).rename(self.directory / f"{name}{end}")
        self._damage.pop(step, None)
        if there:
            where = f"{self.directory}/{name}"
            logging.warning("what is left of the damaged step %d is now %s; remove it when you like", step, where)

    def _not_written(self, step: int | None, error: Exception) -> UserError:
        reason = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
        first_line = reason.splitlines()[0]
        if error.__cause__ is not None:  # of a time-out, who did not come
            first_line += f" ({one_line(error.__cause__)[:300]})"
        return Transient(f"checkpoint step {step} could not be written to {self.directory}: {first_line}")

    # Reading

    def committed_steps(self) -> list[int]:
        """All steps that have a manifest, ascending. Their bytes are not checked. Empty for a run without any."""
        return sorted(self._found()[_MANIFEST])

    def steps_without_manifest(self) -> list[int]:
        """Checkpoints that were finished once and have lost their manifest, ascending. They count as damaged."""
        lost, found = [], self._found()
        for step in sorted(found[""] - found[_MANIFEST]):
            # Looked at one by one, and the mark twice, because a run may be writing or removing the step just now.
            ends = (_UNFINISHED, _MANIFEST, _UNFINISHED)
            if not any(self._entry(step, end).exists() for end in ends) and self._is_orbax(step):
                lost.append(step)
        return lost

    def _found(self) -> dict[str, set[int]]:
        """The steps of which there is `<step><end>`, by end."""
        found: dict[str, set[int]] = {"": set(), _MANIFEST: set(), _UNFINISHED: set()}
        for entry in self._entries():
            if name := _ENTRY.fullmatch(entry):
                found[name[2]].add(int(name[1]))
        return found

    def _entries(self) -> dict[str, bool]:
        """The names in the directory, and whether each is one; none where there is no directory yet."""
        if not isinstance(self.directory, Path):
            return list_directory(self.directory)
        return {entry.name: entry.is_dir() for entry in self.directory.iterdir()} if self.directory.is_dir() else {}

    def _is_orbax(self, step: int) -> bool:
        return any((self._path(step) / name).exists() for name in _OF_ORBAX)

    def latest_good_step(self) -> int | None:
        """The newest step whose bytes match its manifest; None if no step was ever committed.

        Says in a warning which newer steps are damaged, and how. Raises UserError if all are, or if the step was saved
        by a newer version.
        """
        self.wait()
        step = _from_process_0(self._newest_good() if jax.process_index() == 0 else _NO_STEP)
        if step == _ONLY_DAMAGED:
            raise UserError(f"every checkpoint in {self.directory} is damaged: {self._reasons()}")
        if step == _NO_STEP:
            return None
        self._refuse_newer(step)
        return step

    def best_step(self) -> int | None:
        """The kept step with the lowest held-out loss; None if no step has one."""
        return self._best(self.committed_steps())

    def good_step(self, step: int | None = None) -> int:
        """`step`, or the newest undamaged one. Raises UserError: no checkpoint, or the asked one damaged or absent."""
        self.wait()
        if step is not None:
            self._require_good(step)
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
          step: None = the newest undamaged one; a warning names each damaged step passed over, and why.
          partial: `abstract_state` may leave out leaves of the checkpoint, which are then not read.
          verify: compare the hashes; not needed for a step that comes from `good_step`.

        Returns:
          The step and its state.

        Raises:
          UserError: no checkpoint, none undamaged, the asked one damaged or absent, or names, shapes or dtypes differ.
        """
        if step is None or verify:
            step = self.good_step(step)
        self._require_fit(abstract_state, step, partial)
        abstract_state = jax.tree.map(_with_sharding, abstract_state)
        state = self._checkpointer.restore(
            self._path(step),
            args=ocp.args.PyTreeRestore(
                item=abstract_state,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_state),
                partial_restore=partial,
            ),
        )
        if not partial:
            self._held = step
        return step, state

    def saved_shapes(self, step: int) -> PyTree:
        """The tree of `step` as jax.ShapeDtypeStruct without shardings, nested dicts keyed by str."""
        saved = self._checkpointer.metadata(self._path(step)).item_metadata.tree
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved)

    def _newest_good(self) -> int:
        steps = sorted({*self.committed_steps(), *self.steps_without_manifest()})
        for step in reversed(steps):
            if self._is_good(step):
                return step
        return _ONLY_DAMAGED if steps else _NO_STEP

    def _is_good(self, step: int) -> bool:
        try:
            manifest = read_manifest(self._entry(step, _MANIFEST), step)
            if manifest["format"] <= FORMAT:  # what a newer one means, `_refuse_newer` says on every process
                check_files(self._path(step), manifest["files"])
        except Damaged as damage:
            self._damage[step] = str(damage)
            logging.warning("checkpoint step %d in %s is damaged and not used: %s", step, self.directory, damage)
            return False
        self._damage.pop(step, None)
        return True

    def _require_good(self, step: int) -> None:
        answer = _NO_STEP
        if jax.process_index() == 0 and step in (*self.committed_steps(), *self.steps_without_manifest()):
            answer = step if self._is_good(step) else _ONLY_DAMAGED
        answer = _from_process_0(answer)
        if answer == _NO_STEP:
            there = ", ".join(map(str, self.committed_steps())) or "none"
            raise UserError(f"no checkpoint step {step} in {self.directory}; there are: {there}")
        if answer == _ONLY_DAMAGED:
            raise UserError(f"checkpoint step {step} in {self.directory} is damaged: {self._reasons()}")
        self._refuse_newer(step)

    def _refuse_newer(self, step: int) -> None:
        saved = read_manifest(self._entry(step, _MANIFEST), step)["format"]
        if saved > FORMAT:
            raise UserError(
                f"checkpoint step {step} in {self.directory} was saved by a newer version of darkformer_jax (format "
                f"{saved}, this version reads up to {FORMAT}); update darkformer_jax"
            )

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

    def _best(self, steps: list[int]) -> int | None:
        losses = {}
        for step in steps:
            try:
                loss = read_manifest(self._entry(step, _MANIFEST), step)["metrics"].get(BEST_METRIC)
            except Damaged as damage:
                self._damage[step] = str(damage)
                continue
            if loss is not None:
                losses[step] = loss
        return min(losses, key=lambda step: (losses[step], -step), default=None)

    def _reasons(self) -> str:
        known = [f"step {step}: {reason}" for step, reason in sorted(self._damage.items(), reverse=True)]
        return "; ".join(known) or "see the warnings of process 0"

    def _path(self, step: int) -> Any:
        return self.directory / str(step)

    def _entry(self, step: int, end: str) -> Any:
        return self.directory / f"{step}{end}"


def _remove_tree(path: Any) -> None:
    shutil.rmtree(path) if isinstance(path, Path) else path.rmtree()


def _from_process_0(value: int) -> int:
    # One process reads and judges: P processes need not hash the same files, and must not disagree.
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


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


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
