"""The files of a checkpoints directory. Their names alone tell which steps are there.

    checkpoints/<step>/              what Orbax wrote
    checkpoints/<step>.sha256.json   the manifest: size and sha256 of each of its files, and the step's metrics
    checkpoints/<step>.unfinished    a mark, there while the step is written or removed
    checkpoints/<step>.damaged       a damaged step that a new one has replaced; yours to remove

A step exists if its manifest does. If a step has no manifest but has the mark, a kill left it; if it has neither, its
manifest was lost. All answers are read from the disk, never from memory.
"""

import contextlib
import itertools
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from absl import logging

from darkformer_jax.errors import UserError
from darkformer_jax.runs.store import list_directory

_MANIFEST, _UNFINISHED = ".sha256.json", ".unfinished"
_ENTRY = re.compile(r"(0|[1-9][0-9]*)(|\.sha256\.json|\.unfinished)")
_TEMPORARY = re.compile(r"(0|[1-9][0-9]*)\.(orbax-checkpoint-tmp.*|sha256\.json\.tmp)")
_OF_ORBAX = ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "d")  # tell a checkpoint from another directory


class StepFiles:
    """The entries of one directory, on a disk (pathlib's path) or in a bucket (etils').

    If the directory cannot be read or written, methods raise one of `errors`, unless they say otherwise.
    """

    def __init__(self, directory: Any) -> None:
        self.directory = directory
        self._on_disk = isinstance(directory, Path)
        # A store's library passes on the errors of its network libraries.
        self.errors: tuple[type[Exception], ...] = (OSError,) if self._on_disk else (Exception,)

    def path(self, step: int) -> Any:
        """The directory of a step."""
        return self.directory / str(step)

    def manifest(self, step: int) -> Any:
        """The manifest of a step."""
        return self._entry(step, _MANIFEST)

    def committed(self) -> list[int]:
        """All steps that have a manifest, ascending. Their bytes are not checked."""
        return sorted(self._found()[_MANIFEST])

    def without_manifest(self) -> list[int]:
        """Finished checkpoints that have lost their manifest, ascending."""
        lost, found = [], self._found()
        for step in sorted(found[""] - found[_MANIFEST]):
            # The mark is looked for twice, because a run may be writing or removing the step just now.
            ends = (_UNFINISHED, _MANIFEST, _UNFINISHED)
            if not any(self._entry(step, end).exists() for end in ends) and self._is_orbax(step):
                lost.append(step)
        return lost

    def is_foreign(self, step: int) -> bool:
        """Whether the directory of `step` has files that no run is known to have written."""
        found, path = self._found(), self.path(step)
        return step not in found[_MANIFEST] | found[_UNFINISHED] and path.is_dir() and any(path.iterdir())

    def require_space(self, step: int, size: int) -> None:
        """Makes the directory. Raises UserError if the disk has fewer than `size` bytes free; a bucket has no limit."""
        if not self._on_disk:
            return
        # Checked beforehand because Orbax fails in a thread, with a page of traceback on stderr.
        self.directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.directory):
            free = shutil.disk_usage(self.directory).free
        if free < size:
            raise UserError(
                f"checkpoint step {step}: {self.directory} has {_megabytes(free)} free, {_megabytes(size)} needed"
            )

    def begin(self, step: int) -> None:
        """Marks `step` as unfinished: until `finish`, its files are leftovers."""
        self._entry(step, _UNFINISHED).touch()
        self.manifest(step).unlink(missing_ok=True)

    def finish(self, step: int) -> None:
        """Removes the mark. To be called once the manifest is written."""
        self._entry(step, _UNFINISHED).unlink()

    def remove(self, step: int) -> None:
        """Removes a committed step: first its manifest, then its files. A half-removed step must not count."""
        self.begin(step)
        self._remove_unfinished(step)

    def remove_leftovers(self, step: int) -> None:
        """Removes all that killed saves and removals left, except the mark of `step`, which is saved next."""
        for name, is_directory in self._entries().items():
            if _TEMPORARY.fullmatch(name):
                path = self.directory / name
                self._remove_tree(path) if is_directory else path.unlink()
        found = self._found()
        for unfinished in found[_UNFINISHED] - {step}:
            if unfinished in found[_MANIFEST]:
                self.finish(unfinished)
            else:
                self._remove_unfinished(unfinished)

    def set_aside(self, step: int) -> None:
        """Renames the files of `step` to <step>.damaged, with a warning."""
        names = (f"{step}.damaged" + (f"-{count}" if count > 1 else "") for count in itertools.count(1))
        name = next(n for n in names if not any((self.directory / f"{n}{end}").exists() for end in ("", _MANIFEST)))
        there = [end for end in (_MANIFEST, "") if self._entry(step, end).exists()]
        for end in there:
            self._entry(step, end).rename(self.directory / f"{name}{end}")
        if there:
            where = f"{self.directory}/{name}"
            logging.warning("what is left of the damaged step %d is now %s; remove it when you like", step, where)

    def _entry(self, step: int, end: str) -> Any:
        return self.directory / f"{step}{end}"

    def _found(self) -> dict[str, set[int]]:
        """end -> the steps that have an entry `<step><end>`."""
        found: dict[str, set[int]] = {"": set(), _MANIFEST: set(), _UNFINISHED: set()}
        for entry in self._entries():
            if name := _ENTRY.fullmatch(entry):
                found[name[2]].add(int(name[1]))
        return found

    def _entries(self) -> dict[str, bool]:
        """Name -> whether it is a directory, for each entry; empty if there is no directory yet."""
        if not self._on_disk:
            return list_directory(self.directory)
        return {entry.name: entry.is_dir() for entry in self.directory.iterdir()} if self.directory.is_dir() else {}

    def _is_orbax(self, step: int) -> bool:
        return any((self.path(step) / name).exists() for name in _OF_ORBAX)

    def _remove_unfinished(self, step: int) -> None:
        with contextlib.suppress(OSError):
            self._remove_tree(self.path(step))
        if not self.path(step).exists():
            self.finish(step)

    def _remove_tree(self, path: Any) -> None:
        shutil.rmtree(path) if self._on_disk else path.rmtree()


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
