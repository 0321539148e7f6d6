"""Workdirs in Google Cloud Storage, gs://bucket/run, for machines that share no file system.

An object store can neither append to a file nor rename a directory nor lock. So the small files of such a workdir
(config, tokenizer, metrics, ...) are read and written in a local copy, `local_path`, and a `Mirror` uploads what this
process changes there; checkpoints go from every process straight to the bucket, through Orbax and etils. Other stores
have to be mounted: Orbax's array driver knows files and gs:// alone.
"""

import atexit
import base64
import concurrent.futures
import contextlib
import functools
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from darkformer_jax.errors import Transient, UserError, one_line

CHECKPOINTS = "checkpoints"
_SCHEME = "gs://"
_SECONDS_BETWEEN_UPLOADS = 30.0  # a kill loses the lines since then, and the resumed run writes them again


def is_remote(workdir: str | os.PathLike[str]) -> bool:
    """Whether it is a URL. Raises UserError for another scheme than gs://, or without a bucket and a name in it."""
    text = os.fspath(workdir)
    if "://" not in text:
        return False
    bucket, _, name = text.removeprefix(_SCHEME).partition("/")
    if not text.startswith(_SCHEME) or not bucket or not name.strip("/"):
        raise UserError(f"workdir {text}: allowed: a local or mounted directory, or gs://<bucket>/<name>")
    return True


def remote_path(workdir: str | os.PathLike[str]) -> Any:
    """The etils path of a remote workdir. Raises UserError where the packages for it are not installed."""
    from etils import epath

    file_system()
    return epath.Path(os.fspath(workdir))


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
    return fsspec.filesystem("gcs")


def local_path(workdir: str | os.PathLike[str]) -> Path:
    """Where this process reads and writes the small files of a workdir: itself, or the local copy of a remote one.

    The copy is made when it is first asked for, and goes with the process. Raises UserError.
    """
    return _local_copy(os.fspath(workdir).rstrip("/")) if is_remote(workdir) else Path(workdir)


@functools.cache
def _local_copy(url: str) -> Path:
    root = Path(tempfile.mkdtemp(prefix="darkformer-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    copy = root / url.removeprefix(_SCHEME)
    source = remote_path(url)
    with as_user_error(url, "read"):
        if source.is_dir():
            copy.mkdir(parents=True)
            for entry in source.iterdir():
                if entry.is_dir():
                    (copy / entry.name).mkdir()  # empty: so that a directory which is no run's is noticed
                elif not entry.name.startswith("."):
                    (copy / entry.name).write_bytes(entry.read_bytes())
    return copy


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


class Mirror(contextlib.AbstractContextManager["Mirror"]):
    """Uploads the files that this process changes in the local copy of a workdir. For a local one it does nothing.

    Leaving the context uploads what is left, however the run ends.
    """

    def __init__(self, workdir: str | os.PathLike[str]) -> None:
        self._remote: Any = remote_path(workdir) if is_remote(workdir) else None
        self._url, self._local = os.fspath(workdir), local_path(workdir)
        self._uploaded = self._changed({}) if self._remote is not None else {}
        self._last = time.monotonic()
        self._worker = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="mirror")
        self._running: concurrent.futures.Future[None] | None = None

    def __exit__(self, *exception: object) -> None:
        try:
            self.upload()
        finally:
            self._worker.shutdown()

    def soon(self) -> None:
        """Uploads in the background if the last time is a while ago. To be called as often as one likes."""
        idle = self._running is None or self._running.done()
        if self._remote is not None and idle and time.monotonic() - self._last > _SECONDS_BETWEEN_UPLOADS:
            self._last = time.monotonic()
            self._running = self._worker.submit(self._upload)

    def upload(self) -> None:
        """Returns when all is in the bucket. Raises Transient where it cannot be written."""
        if self._remote is None:
            return
        if self._running is not None:
            concurrent.futures.wait([self._running])  # what failed there is tried again here
        with as_user_error(self._url, "written"):
            self._upload()

    def _upload(self) -> None:
        for name, state in self._changed(self._uploaded).items():
            (self._remote / name).write_bytes((self._local / name).read_bytes())
            self._uploaded[name] = state

    def _changed(self, known: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """Name -> (time, size) of the files that are not as in `known`."""
        found = {}
        for path in sorted(self._local.rglob("*")):
            if path.is_file() and not path.name.startswith(".") and path.suffix != ".tmp":
                stat = path.stat()
                found[path.relative_to(self._local).as_posix()] = (stat.st_mtime_ns, stat.st_size)
        return {name: state for name, state in found.items() if known.get(name) != state}


@contextlib.contextmanager
def as_user_error(url: str, what: str) -> Any:
    """Every other error becomes Transient: gcsfs raises OSError, its own HttpError, and aiohttp's and google-auth's."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise Transient(f"workdir {url} cannot be {what}: {type(error).__name__}: {one_line(error)[:200]}") from error
