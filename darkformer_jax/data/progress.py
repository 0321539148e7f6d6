"""Progress bars for library code. The verbs hand down `cli.progress.progress_bar`."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import tqdm

Item = TypeVar("Item")


class ProgressBar(Protocol):
    """Makes a tqdm bar that is used as a context manager. total: None = not known."""

    def __call__(self, total: float | None, unit: str, label: str = "") -> Any: ...


def no_progress(total: float | None, unit: str, label: str = "") -> Any:
    """The `ProgressBar` that shows nothing."""
    return tqdm.tqdm(disable=True)


def with_progress(items: Sequence[Item], unit: str, progress_bar: ProgressBar, label: str = "") -> Iterator[Item]:
    """The items, with a bar that counts those that were used."""
    with progress_bar(len(items), unit, label) as bar:
        for item in items:
            yield item
            bar.update()


@contextlib.contextmanager
def time_shown(progress_bar: ProgressBar, label: str) -> Iterator[None]:
    """Shows every second how long the block has taken, for work that does not say how much is left."""
    finished = threading.Event()

    def tick() -> None:
        while not finished.wait(1.0):
            bar.update()

    with progress_bar(None, "s", label) as bar:
        clock = threading.Thread(target=tick, daemon=True)
        clock.start()
        try:
            yield
        finally:
            finished.set()
            clock.join()
