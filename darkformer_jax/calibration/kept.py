"""What a calibration has found so far, kept on the disk: a command that was stopped goes on when it is given again."""

import contextlib
import hashlib
import io
import shutil
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from darkformer_jax.calibration.hybrids import Quality
from darkformer_jax.data.files import local_path, write_file

Arrays = dict[str, np.ndarray]
_DIGITS = 16  # of the hash in a directory's name


class Remember(Protocol):
    """Gives what `compute` finds, or what an earlier run of the same command found under this name."""

    def __call__(self, name: str, compute: Callable[[], Arrays]) -> Arrays: ...


def keep_nothing(name: str, compute: Callable[[], Arrays]) -> Arrays:
    """The `Remember` without a disk."""
    return compute()


class Kept:
    """Arrays by name, in a hidden directory beside `out`. It is made with the first of them.

    Args:
      out: what is written at the end.
      about: all that decides the arrays. The directory's name has a hash of it, so another command finds nothing.
    """

    def __init__(self, out: str, about: Iterable[bytes]) -> None:
        digest = hashlib.sha256()
        for part in about:
            digest.update(hashlib.sha256(part).digest())
        self._target = Path(local_path(out)).resolve()
        self._directory = self._target.with_name(f".{self._target.name}.{digest.hexdigest()[:_DIGITS]}.begun")

    def __call__(self, name: str, compute: Callable[[], Arrays]) -> Arrays:
        """`Remember`."""
        path = self._directory / f"{name}.npz"
        if path.is_file():
            damaged = contextlib.suppress(EOFError, ValueError, zipfile.BadZipFile)  # it is computed again
            with damaged, path.open("rb") as file, np.load(file) as found:  # NumPy would leave it open
                return dict(found)
        arrays, content = compute(), io.BytesIO()
        np.savez(content, **arrays)  # type: ignore[arg-type]
        write_file(str(path), content.getvalue())
        return arrays

    def forget(self) -> None:
        """Removes what commands with this `out` have kept, once it is there."""
        begun = f".{self._target.name}."
        for directory in self._target.parent.iterdir():
            if directory.name.startswith(begun) and directory.name[len(begun) + _DIGITS :] == ".begun":
                shutil.rmtree(directory, ignore_errors=True)


def recall(remember: Remember, name: str, measure: Callable[[], Quality | list[Quality]]) -> Any:
    """`remember` of the figures of a `Quality`, or of several: [2] or [models, 2]."""
    return remember(name, lambda: {"qualities": np.array(measure(), np.float64)})["qualities"].tolist()
