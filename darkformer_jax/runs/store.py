"""Google Cloud Storage: workdirs at gs://bucket/run, for machines that share no file system.

An object store can neither append to a file nor rename a directory nor lock. So each process reads and writes the small
files of such a workdir (config, tokenizer, metrics, ...) in a local copy, `local_copy`, and a `Mirror` uploads its
changes. Checkpoints go from every process straight to the bucket, through Orbax and etils. Other stores must be
mounted: Orbax's array driver knows only files and gs://.
"""

import atexit
import base64
import contextlib
import functools
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from darkformer_jax.errors import Transient, UserError, one_line

_SCHEME = "gs://"
_NOT_IN_NAMES = set("#?*[]\\\n\r\t")


def is_remote(workdir: str) -> bool:
    """Whether `workdir` is a URL. Raises UserError for a URL that cannot be a workdir."""
    if "://" not in workdir:
        return False
    bucket, _, name = workdir.removeprefix(_SCHEME).partition("/")
    if not workdir.startswith(_SCHEME) or not bucket or not name.strip("/"):
        raise UserError(f"workdir {workdir}: allowed: a local or mounted directory, or gs://<bucket>/<name>")
    if odd := sorted(set(workdir) & _NOT_IN_NAMES):
        # TensorStore, which writes the arrays, splits a URL at # and ?; gcsfs expands globs.
        raise UserError(f"workdir {workdir}: {odd[0]!r} may not be in the name of a bucket's directory")
    return True


def remote_path(url: str) -> Any:
    """The etils path of a remote directory. Raises UserError if the packages for it are not installed."""
    from etils import epath

    file_system()
    return epath.Path(url)


@functools.cache
def file_system() -> Any:
    """gcsfs, without its cache of listings, which would miss the objects that Orbax writes."""
    try:
        import fsspec
        import gcsfs  # noqa: F401 (what fsspec needs)
    except ImportError as error:
        raise UserError(
            f"gs:// needs the package gcsfs, which is not installed ({error}): bash launch/install.sh gcs, or "
            "pip install gcsfs; or mount the bucket and give the mount point"
        ) from error
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # its tracebacks repeat what our errors say in one line
    return fsspec.filesystem("gcs")


@functools.cache
def local_copy(url: str) -> Path:
    """The small files of a remote workdir, copied into a temporary directory that is removed when the process ends.

    Raises UserError if they cannot be read or the copy cannot be written.
    """
    root = Path(tempfile.mkdtemp(prefix="darkformer-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    copy = root / url.removeprefix(_SCHEME)
    entries = list_directory(url)
    with as_user_error(url, "read"):
        contents = {
            name: file_system().cat_file(f"{url}/{name}")
            for name, is_directory in entries.items()
            if not is_directory and not name.startswith(".")
        }
    try:
        for name in filter(entries.get, entries):
            (copy / name).mkdir(parents=True)  # empty, so that foreign directories are noticed
        for name, content in contents.items():
            copy.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(content)
    except OSError as error:
        reason = error.strerror or error
        raise Transient(f"{root}, where the small files of {url} go (TMPDIR), cannot be written: {reason}") from error
    return copy


def list_directory(path: str | os.PathLike[str]) -> dict[str, bool]:
    """Name -> whether it is a directory, for each entry of a remote directory; empty if there is no such directory.

    Raises UserError if there is no such bucket or if `path` is an object, and Transient if it cannot be listed. (etils'
    own `is_dir` would say False if the store cannot be reached.)
    """
    url = os.fspath(path).rstrip("/")
    own = url.removeprefix(_SCHEME)
    with as_user_error(url, "read"):
        try:
            found = file_system().ls(own, detail=True, refresh=True)
        except FileNotFoundError:
            file_system().ls(own.partition("/")[0], refresh=True)
            return {}
    entries = {}
    for entry in found:
        name = entry["name"].rstrip("/")
        if name == own and entry["type"] == "file" and not entry["name"].endswith("/"):
            raise UserError(f"{url} is an object of the bucket, not a directory")
        if name != own:  # some tools leave an object for the directory itself
            entries[name.removeprefix(own + "/")] = entry["type"] == "directory"
    return entries


def objects(directory: Any) -> dict[str, dict[str, Any]]:
    """Relative name -> {"bytes": size, "md5": hex} of each object below a remote directory, from one listing.

    The store computes the md5 of what it is sent; an object that was composed of parts has none. (Every object has a
    CRC32C. But some files of a checkpoint end in their own CRC32C, and theirs are therefore all the same.)
    """
    prefix = os.fspath(directory).removeprefix(_SCHEME).rstrip("/") + "/"
    with as_user_error(os.fspath(directory), "read"):
        found = file_system().find(prefix, detail=True)
    listed = {}
    for name, entry in found.items():
        if not name.endswith("/"):  # some tools leave an object for a directory
            md5 = {"md5": base64.b64decode(entry["md5Hash"]).hex()} if "md5Hash" in entry else {}
            listed[name.removeprefix(prefix)] = {"bytes": int(entry["size"]), **md5}
    return listed


@contextlib.contextmanager
def as_user_error(url: str, what: str) -> Any:
    """Turns every error into a UserError: gcsfs raises OSError, its own HttpError, and aiohttp's and google-auth's.

    It is Transient unless a retry would fail too: no such bucket, or no permission.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        bucket = url.removeprefix(_SCHEME).partition("/")[0]
        raise UserError(f"{url} cannot be {what}: not found; is there a bucket {bucket}?") from error
    except Exception as error:
        raise store_error(url, what, error) from error


def store_error(url: str, what: str, error: Exception) -> UserError:
    """The UserError for an error of a store's library: Transient, unless permission is missing."""
    refused = "Forbidden" in str(error) or getattr(error, "code", None) in (401, 403)
    kind = UserError if refused else Transient
    return kind(f"{url} cannot be {what}: {type(error).__name__}: {one_line(error)[:200]}")
