"""What a comma-separated list of names, globs and directories stands for.

`glob` and `rglob` are not used: they leave out, without a word, folders that may not be read; one of them leaves out
directories behind links, and the other follows a loop of links for ever.
"""

import fnmatch
import glob
import math
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple, NoReturn

from darkformer_jax.data.files import local_path
from darkformer_jax.errors import UserError


class Entry(NamedTuple):
    """A name or glob of a list, and the weight after its colon: `books/*.txt:0.7`."""

    name: str
    weight: Fraction | None


def entries(names: str) -> list[str]:
    """The names and globs of a comma-separated list, with `~` expanded.

    What exists, or is matched by a glob, may have commas in its name.

    Raises UserError for a URL.
    """
    return [local_path(name) for name in _split(names, lambda name: name)]


def weighted_entries(names: str) -> list[Entry]:
    """`entries`, each with its weight or all without. What exists may also end in a colon and a number.

    Raises UserError for a URL, a weight that is not a finite number above 0, and a list in which only some have one.
    """
    parts = _split(names, lambda name: _cut_weight(name)[0])
    found = [Entry(part, None) if _is_there(part) else _with_weight(part) for part in parts]
    without = [name for name, weight in found if weight is None]
    if without and len(without) < len(found):
        raise UserError(f"{names}: {without[0]!r} has no weight; allowed: a weight for every source, or for none")
    return [Entry(local_path(name), weight) for name, weight in found]


def looks_weighted(name: str) -> bool:
    """Whether a name ends in a colon and a number."""
    return bool(_cut_weight(name)[1])


def _split(names: str, cut: Callable[[str], str]) -> list[str]:
    """The parts of a comma-separated list. Parts that are there when they are joined belong together.

    So do parts that are a glob when they are joined, if there are such files but none that the first part stands for.

    cut: a part without its weight.
    """

    def is_there(name: str) -> bool:
        return _is_there(name) or _is_there(cut(name))

    def matches(name: str) -> bool:
        pattern = os.path.expanduser(cut(name))
        return glob.has_magic(pattern) and bool(_matching(pattern))

    found: list[str] = []
    parts = names.split(",")
    while parts:
        joined = [(count, ",".join(parts[:count]).strip()) for count in range(len(parts), 0, -1)]
        count = next((count for count, name in joined if is_there(name)), 0)
        if not count:
            count = next((count for count, name in reversed(joined) if matches(name)), 1)
        if name := ",".join(parts[:count]).strip():
            found.append(name)
        parts = parts[count:]
    return found


def _is_there(name: str) -> bool:
    return os.path.lexists(os.path.expanduser(name))


def _cut_weight(name: str) -> tuple[str, str]:
    """(the name, the text of its weight or "")."""
    before, _, weight = name.rpartition(":")
    try:
        float(weight)
    except ValueError:
        return name, ""
    return (before, weight) if before else (name, "")


def _with_weight(part: str) -> Entry:
    name, weight = _cut_weight(part)
    if not weight:
        return Entry(name, None)
    if not 0 < float(weight) < math.inf:
        raise UserError(f"{part!r} has the weight {weight}; allowed: a finite number above 0, or a path that exists")
    return Entry(name, Fraction(weight))


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
