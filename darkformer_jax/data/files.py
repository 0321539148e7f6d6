"""Small files, read whole and replaced at once."""

import json
import os
from typing import Any

from darkformer_jax.errors import UserError


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
        raise UserError(f"{path} is not JSON: {' '.join(str(error).split())}") from error
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
