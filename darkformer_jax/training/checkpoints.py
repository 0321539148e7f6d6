"""Checkpoints that survive kill -9 and notice damaged bytes: Orbax's asynchronous writer and one hash manifest a step.

    workdir/checkpoints/<step>/              what Orbax wrote
    workdir/checkpoints/<step>.sha256.json   size and sha256 of each of its files, and the step's metrics

Orbax reads a flipped bit, or a hole of zeros, as if nothing had happened. So a step exists when its manifest does: the
manifest is written after Orbax's commit, and checked before anything is read back. Every decision (which steps exist,
which are the newest and the best) is read from the manifests on disk, never from memory, so a killed run leaves nothing
to repair. Orbax's CheckpointManager is not used because it counts stray directories as steps and, once a step is
committed, removes older ones on its own: before the new step has its manifest, or though the new step is damaged.
"""

import concurrent.futures
import hashlib
import json
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

from darkformer_jax.errors import UserError
from darkformer_jax.training.workdir import write_atomically

PyTree = Any

BEST_METRIC = "heldout_loss"  # smaller is better

_MANIFEST = re.compile(r"(0|[1-9][0-9]*)\.sha256\.json")
# Names that only this class and Orbax make; what has no manifest is left over from a killed save or deletion.
_LEFTOVER = re.compile(r"([0-9]+)(\.orbax-checkpoint-tmp.*|\.sha256\.json\.tmp)?")
_NO_STEP, _ONLY_DAMAGED = -1, -2  # instead of a step, when process 0 tells the others


class _Damaged(Exception):
    """Why a step must not be restored, in words that follow `step 100: `."""


class Checkpoints:
    """The checkpoints of one run: the newest `keep` and, beside them, the one with the lowest held-out loss.

    Nothing is created or removed before the first `save`, so a reader may open the workdir of a running run. On a pod,
    every process makes the same calls on a shared workdir.

    Args:
      workdir: the run's directory.
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
        self.directory = Path(workdir).absolute() / "checkpoints"
        self._keep = keep
        self._save_every = save_every
        self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=compress))
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
        are older steps removed. Steps newer than `step` (a continuation that was given up) go with them. Saving the
        step that was just saved or restored writes nothing but its metrics: the state is a function of the step.

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
        except OSError as error:
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
            self.directory.mkdir(parents=True, exist_ok=True)
            # Asked beforehand because Orbax fails in a thread, with a page of traceback on stderr.
            with tempfile.TemporaryFile(dir=self.directory):
                free = shutil.disk_usage(self.directory).free
            if free < size:
                raise UserError(
                    f"checkpoint step {step}: {self.directory} has {_megabytes(free)} free, {_megabytes(size)} needed"
                )
            self._manifest_path(step).unlink(missing_ok=True)  # from here on an old <step> is a leftover, too
            self._remove_leftovers()
        except OSError as error:
            raise self._not_written(step, error) from error

    def _commit(self, step: int, metrics: dict[str, float | None]) -> None:
        self._checkpointer.wait_until_finished()  # Orbax has renamed its temporary directory to <step>
        if jax.process_index() == 0:
            self._write_manifest(step, _hash_files(self._path(step)), metrics)
            self._damage.pop(step, None)
            self._prune(step)

    def _write_manifest(self, step: int, files: Mapping[str, Any], metrics: Mapping[str, float | None]) -> None:
        content = {"step": step, "metrics": metrics, "files": files}
        content["digest"] = _digest(content)
        write_atomically(self._manifest_path(step), (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())

    def _update_metrics(self, step: int, metrics: dict[str, float | None]) -> None:
        try:
            manifest = self._read_manifest(step)
            self._write_manifest(step, manifest["files"], {**manifest["metrics"], **metrics})
        except (OSError, _Damaged) as error:
            raise self._not_written(step, error) from error

    def _prune(self, newest: int) -> None:
        steps = self.committed_steps()
        live = [step for step in steps if step <= newest and step not in self._damage]
        keep = {*live[-self._keep :], self._best(live)}
        for step in steps:
            if step not in keep:
                self._manifest_path(step).unlink()  # first: a step half deleted must not count
                shutil.rmtree(self._path(step), ignore_errors=True)

    def _remove_leftovers(self) -> None:
        committed = self.committed_steps()
        for entry in self.directory.iterdir():
            name = _LEFTOVER.fullmatch(entry.name)
            if name and name[2] is not None and entry.is_file():
                entry.unlink()
            elif name and entry.is_dir() and (name[2] is not None or int(name[1]) not in committed):
                shutil.rmtree(entry)

    def _not_written(self, step: int | None, error: Exception) -> UserError:
        reason = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
        first_line = reason.splitlines()[0]
        return UserError(f"checkpoint step {step} could not be written to {self.directory}: {first_line}")

    # Reading

    def committed_steps(self) -> list[int]:
        """All steps that have a manifest, ascending. Their bytes are not checked. Empty for a run without any."""
        if not self.directory.is_dir():
            return []
        names = (_MANIFEST.fullmatch(entry.name) for entry in self.directory.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def steps_without_manifest(self) -> list[int]:
        """Step directories that Orbax finished and that do not count, ascending."""
        if not self.directory.is_dir():
            return []
        names = {entry.name for entry in self.directory.iterdir() if entry.is_dir() and entry.name.isdecimal()}
        return sorted({int(name) for name in names} - set(self.committed_steps()))

    def latest_good_step(self) -> int | None:
        """The newest step whose bytes match its manifest; None if no step was ever committed.

        Says in a warning which newer steps are damaged, and how. Raises UserError if all are.
        """
        self.wait()
        step = _from_process_0(self._newest_good() if jax.process_index() == 0 else _NO_STEP)
        if step == _ONLY_DAMAGED:
            raise UserError(f"every checkpoint in {self.directory} is damaged: {self._reasons()}")
        return None if step == _NO_STEP else step

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
        steps = self.committed_steps()
        for step in reversed(steps):
            if self._is_good(step):
                return step
        return _ONLY_DAMAGED if steps else _NO_STEP

    def _is_good(self, step: int) -> bool:
        try:
            files = self._read_manifest(step)["files"]
            with concurrent.futures.ThreadPoolExecutor() as pool:
                list(pool.map(lambda name: _check_file(self._path(step), name, files[name]), files))
        except _Damaged as damage:
            self._damage[step] = str(damage)
            logging.warning("checkpoint step %d in %s is damaged and not used: %s", step, self.directory, damage)
            return False
        self._damage.pop(step, None)
        return True

    def _require_good(self, step: int) -> None:
        answer = _NO_STEP
        if jax.process_index() == 0 and step in self.committed_steps():
            answer = step if self._is_good(step) else _ONLY_DAMAGED
        answer = _from_process_0(answer)
        if answer == _NO_STEP:
            there = ", ".join(map(str, self.committed_steps())) or "none"
            raise UserError(f"no checkpoint step {step} in {self.directory}; there are: {there}")
        if answer == _ONLY_DAMAGED:
            raise UserError(f"checkpoint step {step} in {self.directory} is damaged: {self._reasons()}")

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

    def _read_manifest(self, step: int) -> dict[str, Any]:
        path = self._manifest_path(step)
        try:
            manifest = json.loads(path.read_bytes())
            digest = manifest.pop("digest")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _Damaged(f"{path.name} cannot be read") from error
        if digest != _digest(manifest) or manifest["step"] != step:
            raise _Damaged(f"{path.name} has changed")
        return manifest

    def _best(self, steps: list[int]) -> int | None:
        losses = {}
        for step in steps:
            try:
                loss = self._read_manifest(step)["metrics"].get(BEST_METRIC)
            except _Damaged:
                continue
            if loss is not None:
                losses[step] = loss
        return min(losses, key=lambda step: (losses[step], -step), default=None)

    def _reasons(self) -> str:
        known = [f"step {step}: {reason}" for step, reason in sorted(self._damage.items(), reverse=True)]
        return "; ".join(known) or "see the warnings of process 0"

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _manifest_path(self, step: int) -> Path:
        return self.directory / f"{step}.sha256.json"


def _from_process_0(value: int) -> int:
    # One process reads and judges: P processes need not hash the same files, and must not disagree.
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _hash_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Each file below `directory` by its relative name: {"bytes": size, "sha256": hex}."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    with concurrent.futures.ThreadPoolExecutor() as pool:
        hashes = pool.map(_sha256, paths)
        return {
            path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256}
            for path, sha256 in zip(paths, hashes, strict=True)
        }


def _check_file(directory: Path, name: str, expected: Mapping[str, Any]) -> None:
    try:
        size = (directory / name).stat().st_size
        if size != expected["bytes"]:
            raise _Damaged(f"file {name} has {size} bytes, {expected['bytes']} were written")
        if _sha256(directory / name) != expected["sha256"]:
            raise _Damaged(f"file {name} does not match its sha256")
    except FileNotFoundError as error:
        raise _Damaged(f"file {name} is missing") from error
    except OSError as error:
        raise _Damaged(f"file {name} cannot be read: {error.strerror}") from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
