"""Progress bars for library code. The verbs hand down `cli.progress.progress_bar`."""

from typing import Any, Protocol

import tqdm


class ProgressBar(Protocol):
    """Makes a tqdm bar that is used as a context manager."""

    def __call__(self, total: float, unit: str, label: str = "") -> Any: ...


def no_progress(total: float, unit: str, label: str = "") -> Any:
    """The `ProgressBar` that shows nothing."""
    return tqdm.tqdm(disable=True)
