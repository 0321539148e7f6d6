"""Small files, read whole and replaced at once; and directories that are there whole or not at all."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from darkformer_jax.errors import UserError, one_line


def read_file(path: str) -> bytes:
    """The bytes of a file. Raises UserError naming it when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def read_json_object(path: str) -> dict[str, Any]:
    """A JSON file that holds an object. Raises UserError naming the file."""
    try:
        value = json.loads(read_file(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def write_file(path: str, data: bytes) -> None:
    """Writes a file so that a reader, or a machine that lost power, sees all of it or the file that was there before.

    Raises UserError naming the path when it cannot be written.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def make_directory(path: str) -> None:
    """Makes a directory and its parents unless it is there. Raises UserError naming it when it cannot be made."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make directory {path}: {error.strerror}") from error


@contextlib.contextmanager
def whole_directory(path: str) -> Iterator[Path]:
    """A directory beside `path` to fill, which takes its place at the end and vanishes on an error.

    Raises:
      UserError: `path` is a file, a directory that is not empty or one that cannot be replaced; or the disk is full, or
        its parent cannot be written.
    """
    target = Path(path).resolve()  # of a link, what it points to
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{path} is there already; give a new or an empty directory")
    if target.is_mount():
        raise UserError(f"{path} is a mount point; give a directory inside it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise UserError(f"{path} cannot be written: {error.strerror}{place}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
