"""Which labelled files a run has seen, so that its figures on them are none of a test."""

import os

from darkformer_jax.data.labelled import find_labelled_files
from darkformer_jax.data.matching import entries
from darkformer_jax.errors import UserError


def seen_file(files: str, training: str, heldout: str) -> tuple[str, str] | None:
    """(a file of `files` that a run has seen, the config field that names it); None = there is none.

    training, heldout: the run's data.files and task.heldout_files. Links are resolved; relative paths are relative to
    the current directory.
    """
    for field, seen in (("data.files", training), ("task.heldout_files", heldout)):
        if common := _real_paths(files) & _real_paths(seen):
            return min(common), field
    return None


def _real_paths(files: str) -> set[str]:
    """The files behind names, globs and directories; of what is not there any more, the names."""
    if not files:
        return set()
    try:
        found = find_labelled_files(files)
    except UserError:
        found = entries(files)
    return {os.path.realpath(path) for path in found}
