"""What a comma-separated list of names, globs and directories stands for.

`glob` and `rglob` are not used: they leave out, without a word, folders that may not be read; one of them leaves out
directories behind links, and the other follows a loop of links for ever.
"""

import fnmatch
import glob
import os
from collections.abc import Iterator
from typing import NoReturn

from darkformer_jax.data.files import local_path
from darkformer_jax.errors import UserError


def entries(names: str) -> list[str]:
    """The names and globs of a comma-separated list, with `~` expanded. What exists may have commas in its name.

    Raises UserError for a URL.
    """
    found: list[str] = []
    parts = names.split(",")
    while parts:
        joined = ((count, ",".join(parts[:count]).strip()) for count in range(len(parts), 1, -1))
        existing = (count for count, name in joined if os.path.lexists(os.path.expanduser(name)))
        count = next(existing, 1)
        if name := ",".join(parts[:count]).strip():
            found.append(local_path(name))
        parts = parts[count:]
    return found


def matching(pattern: str) -> list[str]:
    """The existing paths that a glob matches, or that it names: a name that exists comes before a glob.

    `**` stands for any number of directories, none included. As in a shell, neither `*` nor `**` matches a name that
    begins with a point. Raises UserError for a folder that cannot be read.
    """
    if os.path.basename(pattern) == "**":
        pattern = os.path.join(pattern, "*")
    here = "" if pattern.startswith("./") else "./"  # which a `**` at the beginning leaves
    return sorted({path.removeprefix(here) for path in _matching(pattern)})


def directories_below(top: str, hidden: bool = True) -> Iterator[tuple[str, list[str]]]:
    """(path, names of its files) of a directory and of all below it, behind links, too. Each of them comes once.

    hidden: also those whose names begin with a point. Raises UserError for a directory that cannot be read.
    """
    seen: set[str] = set()
    links = [top]  # they come last, so that a directory is called as it is called without links
    while links:
        for directory, names, files in os.walk(links.pop(0), onerror=_unreadable):
            real = os.path.realpath(directory)
            if real in seen:
                names.clear()
                continue
            seen.add(real)
            names[:] = sorted(name for name in names if hidden or not name.startswith("."))
            links += [path for path in (os.path.join(directory, name) for name in names) if os.path.islink(path)]
            yield directory, files


def _matching(pattern: str) -> list[str]:
    if _exists(pattern):
        return [pattern]
    if not glob.has_magic(pattern):
        return []
    parent, name = os.path.split(pattern)
    parents = [path for path in _matching(parent) if os.path.isdir(path)] if parent else [""]
    if name == "**":
        return [path for top in parents for path, _ in directories_below(top or os.curdir, hidden=False)]
    if not glob.has_magic(name):
        return [path for path in (os.path.join(parent, name) for parent in parents) if _exists(path)]
    return [
        os.path.join(parent, found)
        for parent in parents
        for found in fnmatch.filter(_listed(parent or os.curdir), name)
        if name.startswith(".") or not found.startswith(".")
    ]


def _exists(path: str) -> bool:
    """os.path.lexists, but a folder that may not be searched is an error."""
    try:
        os.lstat(path)
    except PermissionError as error:
        _unreadable(error)
    except (OSError, ValueError):  # ValueError: a NUL
        return False
    return True


def _listed(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError as error:
        _unreadable(error)


def _unreadable(error: OSError) -> NoReturn:
    raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
