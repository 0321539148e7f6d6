"""The manifest of a checkpoint: size and sha256 of each of its files, and metrics; signed by a digest of its own.

    {"format": 1, "step": 100, "metrics": {...}, "files": {"d/1f0a": {"bytes": 812, "sha256": "..."}}, "digest": "..."}

`step`, `format` and `digest` mean the same in every format, so that a version tells a newer one's manifest from damage.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from darkformer_jax.training.workdir import write_atomically

FORMAT = 1  # of the whole checkpoint. Raise it when the versions before could not read it, or would read it wrongly


class Damaged(Exception):
    """Why a step must not be restored, in words that follow `step 100: `."""


def write_manifest(path: Path, step: int, files: Mapping[str, Any], metrics: Mapping[str, float | None]) -> None:
    """Writes the manifest of `step`, whole or not at all. `files` is what `hash_files` gave. Raises OSError."""
    content = {"format": FORMAT, "step": step, "metrics": metrics, "files": files}
    content["digest"] = _digest(content)
    write_atomically(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def read_manifest(path: Path, step: int) -> dict[str, Any]:
    """The manifest of `step` as it was written, perhaps in a newer format. Raises Damaged."""
    try:
        manifest = json.loads(path.read_bytes())
        digest = manifest.pop("digest")
    except FileNotFoundError as error:
        raise Damaged(f"{path.name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path.name} cannot be read") from error
    if digest != _digest(manifest) or manifest.get("step") != step:
        raise Damaged(f"{path.name} has changed")
    return {"format": 1, **manifest}  # the first manifests had no such field


def hash_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Each file below `directory` by its relative name: {"bytes": size, "sha256": hex}. All are on the disk then."""
    paths = sorted(directory.rglob("*"))
    files = [path for path in paths if path.is_file()]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        hashes = list(pool.map(_hash_and_sync, files))
    for path in (directory, *paths):
        if path.is_dir():
            _sync(path)
    return {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256}
        for path, sha256 in zip(files, hashes, strict=True)
    }


def check_files(directory: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises Damaged where a file of the manifest is not what was written."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: _check_file(directory, name, files[name]), files))


def _check_file(directory: Path, name: str, expected: Mapping[str, Any]) -> None:
    try:
        size = (directory / name).stat().st_size
        if size != expected["bytes"]:
            raise Damaged(f"file {name} has {size} bytes, {expected['bytes']} were written")
        with open(directory / name, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != expected["sha256"]:
            raise Damaged(f"file {name} does not match its sha256")
    except FileNotFoundError as error:
        raise Damaged(f"file {name} is missing") from error
    except OSError as error:
        raise Damaged(f"file {name} cannot be read: {error.strerror}") from error


def _hash_and_sync(path: Path) -> str:
    # Orbax leaves its small files to the system's time. Older steps are removed next: no power cut may undo this one.
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
