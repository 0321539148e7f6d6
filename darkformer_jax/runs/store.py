"""Google Cloud Storage, for workdirs at gs://bucket/run of machines that share no file system.

An object store can neither append to a file nor rename a directory nor lock. So the small files of such a workdir
(config, tokenizer, metrics, ...) are read and written in a local copy, `local_copy`, and a `Mirror` uploads what this
process changes there; checkpoints go from every process straight to the bucket, through Orbax and etils. Other stores
have to be mounted: Orbax's array driver knows files and gs:// alone.
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
    """Whether it is a URL. Raises UserError for one that cannot be a workdir."""
    if "://" not in workdir:
        return False
    bucket, _, name = workdir.removeprefix(_SCHEME).partition("/")
    if not workdir.startswith(_SCHEME) or not bucket or not name.strip("/"):
        raise UserError(f"workdir {workdir}: allowed: a local or mounted directory, or gs://<bucket>/<name>")
    if odd := sorted(set(workdir) & _NOT_IN_NAMES):
        # TensorStore, which writes the arrays, takes what follows # or ? for another part of the URL; gcsfs globs.
        raise UserError(f"workdir {workdir}: {odd[0]!r} may not be in the name of a bucket's directory")
    return True


def remote_path(url: str) -> Any:
    """The etils path of a remote directory. Raises UserError where the packages for it are not installed."""
    from etils import epath

    file_system()
    return epath.Path(url)


@functools.cache
def file_system() -> Any:
    """gcsfs, without its cache of listings: Orbax writes objects that gcsfs would not know of."""
    try:
        import fsspec
        import gcsfs  # noqa: F401 (what fsspec needs)
    except ImportError as error:
        raise UserError(
            f"gs:// needs the extra gcs, which is not installed ({error}): pip install 'darkformer_jax[gcs]', "
            "or mount the bucket and give the mount point"
        ) from error
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # tracebacks of what is told in a line
    return fsspec.filesystem("gcs")


@functools.cache
def local_copy(url: str) -> Path:
    """The small files of a remote workdir, copied into a temporary directory that goes with the process.

    Raises UserError where they cannot be read, or the copy cannot be written.
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
            (copy / name).mkdir(parents=True)  # empty: so that a directory which is no run's is noticed
        for name, content in contents.items():
            copy.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(content)
    except OSError as error:
        reason = error.strerror or error
        raise Transient(f"{root}, where the small files of {url} go (TMPDIR), cannot be written: {reason}") from error
    return copy


def list_directory(path: str | os.PathLike[str]) -> dict[str, bool]:
    """The names in a remote directory, and whether each is a directory; none where there is no such directory.

    (etils' own `is_dir` says no where a store cannot be reached, too.) Raises UserError where there is no such bucket,
    or an object of this name, and Transient where it cannot be listed.
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
    """Each object below a remote directory by its relative name: {"bytes": size, "md5": hex}, by one listing.

    The store computes the md5 of what it is sent; an object that was put together from parts has none. (Every object
    has a CRC32C, but some of a checkpoint's files end in their own, which makes it the same for all of them.)
    """
    prefix = os.fspath(directory).removeprefix(_SCHEME).rstrip("/") + "/"
    with as_user_error(os.fspath(directory), "read"):
        found = file_system().find(prefix, detail=True)
    listed = {}
    for name, entry in found.items():
        if not name.endswith("/"):  # what some tools leave for a directory
            md5 = {"md5": base64.b64decode(entry["md5Hash"]).hex()} if "md5Hash" in entry else {}
            listed[name.removeprefix(prefix)] = {"bytes": int(entry["size"]), **md5}
    return listed


@contextlib.contextmanager
def as_user_error(url: str, what: str) -> Any:
    """Every other error becomes one: gcsfs raises OSError, its own HttpError, and aiohttp's and google-auth's.

    Transient, but for what would be so the next time: no such bucket, and no permission.
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
    """Of what a store's library has raised: Transient, but where permission is missing."""
    refused = "Forbidden" in str(error) or getattr(error, "code", None) in (401, 403)
    kind = UserError if refused else Transient
    return kind(f"{url} cannot be {what}: {type(error).__name__}: {one_line(error)[:200]}")
