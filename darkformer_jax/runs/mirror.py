"""Uploads of the small files of a workdir in a bucket."""

import concurrent.futures
import contextlib
import time

from darkformer_jax.runs.store import as_user_error
from darkformer_jax.runs.workdir import Workdir

_SECONDS_BETWEEN_UPLOADS = 30.0  # a kill loses the lines since then, and the resumed run writes them again


class Mirror(contextlib.AbstractContextManager["Mirror"]):
    """Uploads the files that this process changes in the local copy of a workdir. A local workdir needs no uploads.

    Leaving the context uploads the rest, however the run ends.
    """

    def __init__(self, workdir: Workdir) -> None:
        self._workdir = workdir
        self._uploaded = self._changed({}) if self._workdir.is_remote else {}
        self._last = time.monotonic()
        self._worker = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="mirror")
        self._running: concurrent.futures.Future[None] | None = None

    def __exit__(self, *exception: object) -> None:
        try:
            self.upload()
        finally:
            self._worker.shutdown()

    def soon(self) -> None:
        """Uploads in the background if the last upload was a while ago. May be called at every step."""
        idle = self._running is None or self._running.done()
        if self._workdir.is_remote and idle and time.monotonic() - self._last > _SECONDS_BETWEEN_UPLOADS:
            self._last = time.monotonic()
            self._running = self._worker.submit(self._upload)

    def upload(self) -> None:
        """Uploads all changes and returns when they are in the bucket. Raises Transient if it cannot be written."""
        if not self._workdir.is_remote:
            return
        if self._running is not None:
            concurrent.futures.wait([self._running])  # what failed there is retried below
        with as_user_error(str(self._workdir), "written"):
            self._upload()

    def _upload(self) -> None:
        for name, state in self._changed(self._uploaded).items():
            (self._workdir.shared / name).write_bytes((self._workdir / name).read_bytes())
            self._uploaded[name] = state

    def _changed(self, known: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """Name -> (time, size) of the files that differ from `known`."""
        found, local = {}, self._workdir.local
        for path in sorted(local.rglob("*")):
            if path.is_file() and not path.name.startswith(".") and path.suffix != ".tmp":
                stat = path.stat()
                found[path.relative_to(local).as_posix()] = (stat.st_mtime_ns, stat.st_size)
        return {name: state for name, state in found.items() if known.get(name) != state}
