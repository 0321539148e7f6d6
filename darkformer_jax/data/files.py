"""Small files, read whole and replaced at once; and directories that are there whole or not at all."""

import atexit
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
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces `path` by `content` so that a kill at any moment leaves the old file or the new one, never a part.

    The bytes and the directory entry are on the disk when it returns. Raises OSError.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_file(path: str, data: bytes) -> None:
    """`write_atomically` for a user's path: raises UserError naming it when it cannot be written."""
    try:
        write_atomically(Path(path), data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def refuse_url(path: str) -> None:
    """Raises UserError for gs://bucket/x and the like, where only a workdir may be: to a file system it is a name."""
    if "://" in path:
        raise UserError(f"{path!r} is not a local path; mount a bucket and give the mount point")


def make_directory(path: str) -> None:
    """Makes a directory and its parents unless it is there. Raises UserError naming it when it cannot be made."""
    refuse_url(path)
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make directory {path}: {error.strerror}") from error


@contextlib.contextmanager
def whole_directory(path: str) -> Iterator[Path]:
    """A directory beside `path` to fill, which takes its place at the end and vanishes on an error.

    `~` is expanded: of `--out=~/x` a shell leaves it as it is.

    Raises:
      UserError: `path` is a file, a directory that is not empty or one that cannot be replaced; or the disk is full, or
        its parent cannot be written.
    """
    if not path:
        raise UserError(f"{path!r} is not a path")
    refuse_url(path)
    try:
        target = Path(path).expanduser().resolve()  # of a link, what it points to
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{path} is there already; give a new or an empty directory")
        if target.is_mount():
            raise UserError(f"{path} is a mount point; give a directory inside it")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links and a NUL are none of the operating system's
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} cannot be written: {reason}") from error
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise UserError(f"{path} cannot be written: {error.strerror}{place}") from error
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
            # Once more at the end of the process: Orbax's threads may still write after an interruption.
            atexit.register(shutil.rmtree, temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
