"""Small files, read whole and replaced atomically; and directories that appear whole or not at all."""

import atexit
import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from darkformer_jax.errors import UserError, one_line


def read_file(path: str) -> bytes:
    """The bytes of a file. Raises UserError, which names it, if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def read_json_object(path: str) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, which names the file, if there is none."""
    try:
        value = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` to `path` so that a kill at any moment leaves the old file or the new one, never a part.

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
    """`write_atomically` for a user's path. Makes its directory. Raises UserError if it cannot be written."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def write_json(path: str | Path, value: Mapping[str, Any], *, sort_keys: bool = False) -> None:
    """Writes an indented JSON object by `write_file`."""
    write_file(str(path), (json.dumps(value, indent=2, sort_keys=sort_keys) + "\n").encode("utf-8"))


def new_file(flag: str, path: str) -> str:
    """The path that `flag` gives, expanded. Raises UserError if it exists, or its directory does not."""
    if not path:
        raise UserError(f"{flag}=: give the name of a file")
    path = local_path(path)
    if os.path.lexists(path):
        raise UserError(f"{flag}={path}: the file exists, and results are not overwritten")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise UserError(f"{flag}={path}: its directory does not exist")
    return path


def write_new(flag: str, path: str, text: str) -> None:
    """Writes a file that does not exist, or none. Raises UserError, which names `flag`, if it cannot be written."""
    data = text.encode("utf-8")  # before there is a file
    try:
        with open(path, "xb") as file:
            file.write(data)
    except OSError as error:
        if not isinstance(error, FileExistsError):
            Path(path).unlink(missing_ok=True)
        raise UserError(f"{flag}={path} cannot be written: {error.strerror or error}") from error


def local_path(path: str) -> str:
    """A user's path, with `~` expanded, which a shell leaves to us in `--out=~/x`.

    Raises UserError for an unknown user's home, and for gs://bucket/x and other URLs: only a workdir may be one.
    """
    if "://" in path:
        raise UserError(f"{path!r} is not a local path; mount a bucket and give the mount point")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(f"{path}: there is no such home directory; for a file of this name, give ./{path}")
    return expanded


@contextlib.contextmanager
def whole_directory(path: str) -> Iterator[Path]:
    """A new directory beside `path` for the caller to fill. It replaces `path` at the end; an error removes it.

    Raises:
      UserError: `path` is no `local_path`, is a file, or a directory that is not empty or cannot be replaced; the
        disk is full, or the parent cannot be written.
    """
    if not path:
        raise UserError(f"{path!r} is not a path")
    expanded = local_path(path)
    try:
        target = Path(expanded).resolve()  # follows links
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{path} is there already; give a new or an empty directory")
        if target.is_mount():
            raise UserError(f"{path} is a mount point; give a directory inside it")
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        temporary.mkdir(parents=True)
    except (OSError, RuntimeError, ValueError) as error:  # the last two: a loop of links, a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} cannot be written: {reason}") from error
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise UserError(f"{path} cannot be written: {error.strerror}{place}") from error
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
            # Again at the end of the process: Orbax's threads may still write after an interruption.
            atexit.register(shutil.rmtree, temporary, ignore_errors=True)
