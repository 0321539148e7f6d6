"""The manifest of a checkpoint: size and checksum of each of its files, metrics, and a digest of the manifest itself.

    {"format": 1, "step": 100, "metrics": {...}, "files": {"d/1f0a": {"bytes": 812, "sha256": "..."}}, "carried": {...},
     "digest": "..."}

`carried` is what a run that resumes at the step needs besides its arrays; the manifests of earlier versions have none.

`step`, `format` and `digest` mean the same in every format, so that a version can tell a newer manifest from damage.
Paths are pathlib's on a disk, and etils' in a bucket.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from darkformer_jax.data.files import write_atomically
from darkformer_jax.runs.store import objects, store_error

FORMAT = 1  # of the whole checkpoint; raise it if earlier versions could not read a new one, or would read it wrongly


class Damaged(Exception):
    """Why a step must not be restored, in words that follow `step 100: `."""


def write_manifest(
    path: Any, step: int, files: Mapping[str, Any], metrics: Mapping[str, float | None], carried: Mapping[str, Any]
) -> None:
    """Writes the manifest of `step`, whole or not at all. `files` is what `hash_files` returned. Raises OSError."""
    content = {"format": FORMAT, "step": step, "metrics": metrics, "files": files, "carried": carried}
    content["digest"] = _digest(content)
    data = (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
    if isinstance(path, Path):
        write_atomically(path, data)
    else:
        path.write_bytes(data)  # an object is replaced whole


def read_manifest(path: Any, step: int) -> dict[str, Any]:
    """The manifest of `step` as it was written, perhaps in a newer format.

    Raises Damaged, or UserError if a bucket cannot be read.
    """
    try:
        with _reached(path):
            content = path.read_bytes()
        manifest = json.loads(content)
        digest = manifest.pop("digest")
    except FileNotFoundError as error:
        raise Damaged(f"{path.name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path.name} cannot be read") from error
    if digest != _digest(manifest) or manifest.get("step") != step:
        raise Damaged(f"{path.name} has changed")
    return {"format": 1, "carried": {}, **manifest}  # which earlier manifests do not have


def hash_files(directory: Any) -> dict[str, dict[str, Any]]:
    """Relative name -> {"bytes": size, "sha256": hex} of each file below `directory`. Syncs all files to the disk.

    In a bucket it is {"bytes": size, "md5": hex}. The store computed the md5; only files without one are read back.
    """
    if not isinstance(directory, Path):
        stored = objects(directory)
        for name in (name for name in stored if "md5" not in stored[name]):
            stored[name]["md5"] = _hash(directory / name, "md5")
        return stored
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


def check_files(directory: Any, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises Damaged if a file differs from what was written, and UserError if a bucket cannot be read."""
    stored = None if isinstance(directory, Path) else objects(directory)

    def check(name: str) -> None:
        try:
            _check_file(directory / name, files[name], stored if stored is None else stored.get(name, {}))
        except Damaged as damage:
            raise Damaged(f"file {name} {damage}") from damage.__cause__

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(check, files))


def _check_file(path: Any, expected: Mapping[str, Any], stored: Mapping[str, Any] | None) -> None:
    """Raises Damaged if the file is not as expected. `stored`: the bucket's listing of it; None = it is on a disk."""
    kind = "sha256" if "sha256" in expected else "md5"  # a step may have been copied from or to a bucket
    try:
        if stored == {}:
            raise FileNotFoundError(path)
        size = path.stat().st_size if stored is None else stored["bytes"]
        if size != expected["bytes"]:
            raise Damaged(f"has {size} bytes, {expected['bytes']} were written")
        with _reached(path):
            actual = stored[kind] if stored and kind in stored else _hash(path, kind)
        if actual != expected[kind]:
            raise Damaged(f"does not match its {kind}")
    except FileNotFoundError as error:
        raise Damaged("is missing") from error
    except OSError as error:
        raise Damaged(f"cannot be read: {error.strerror}") from error


def _hash(path: Any, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


@contextlib.contextmanager
def _reached(path: Any) -> Iterator[None]:
    """Turns errors of a bucket's library, which need not be OSErrors, into UserErrors. A disk's errors mean damage."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        if isinstance(path, Path):
            raise
        raise store_error(str(path), "read", error) from error


def _hash_and_sync(path: Path) -> str:
    # Orbax does not sync its small files. Older steps are removed next, so a power cut must not undo this one.
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
