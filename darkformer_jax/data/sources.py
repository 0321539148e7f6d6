"""Where documents come from: the Python standard library, text files, the One Billion Word release.

A `Corpus` can be read any number of times and always yields the same documents in the same order.
"""

import collections
import dataclasses
import fnmatch
import functools
import importlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from absl import logging

from darkformer_jax.data import parquet_files
from darkformer_jax.data.files import local_path, read_file
from darkformer_jax.data.matching import Entry, directories_below, entries, looks_weighted, matching
from darkformer_jax.data.text_files import TEXT_FIELD, OnRead, read_json_lines, read_lines, read_pieces
from darkformer_jax.errors import UserError, printable

TEXT_SUFFIXES = (".txt", ".txt.gz", ".md", ".md.gz", ".jsonl", ".jsonl.gz", parquet_files.SUFFIX)
NEWS_PATTERN = "news.en-?????-of-?????"
CORPUS_SOURCES = ("stdlib", "text", "news")

# Tests of the library, and packages installed beside it, are not the standard library's own text.
_STDLIB_SKIPPED_DIRECTORIES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_TOPICS = "pydoc_data/topics.py"
_SHOWN_KINDS = 5  # in a message


class Document(NamedTuple):
    """One document and where it was found: a path, with a line or an offset if the file holds several documents."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order.

    Attributes:
      num_bytes: bytes on disk (of compressed files, the compressed size); `on_read` adds up to it over one pass.
      documents: `documents(on_read)` begins one pass.
      identity: the field of a document that the held-out split hashes: "text", so that copies of a document fall on
        the same side, or "name", so that the same modules are held out on every machine and Python version.
    """

    num_bytes: int
    documents: Callable[[OnRead], Iterator[Document]]
    identity: str = "text"


def open_corpus(source: str, files: str, text_field: str = TEXT_FIELD) -> Corpus:
    """The corpus named by `data.source` and `data.files`.

    Args:
      source: stdlib | text | news.
      files: text: comma-separated globs, or directories searched recursively; news: the release's directory;
        stdlib: unused.
      text_field: text: the field of a JSON object, or the column of a Parquet file, that holds the text.

    Raises:
      UserError: an unknown source, a glob or directory that matches nothing, a file of another kind.
    """
    if source == "stdlib":
        return _stdlib_corpus()
    if source == "text":
        return _text_corpus(find_text_files(files), text_field)
    if source == "news":
        return _file_corpus(find_news_files(files), _news_documents)
    raise UserError(f"data source {source!r} is unknown; allowed: {', '.join(CORPUS_SOURCES)}")


def open_text_sources(sources: Sequence[Entry], text_field: str) -> list[Corpus]:
    """The corpus of each source of a mixture: of the text files that its name or glob stands for.

    Raises UserError for what `open_corpus` refuses, and for a file that belongs to two sources: one could train on what
    the other holds out.
    """
    corpora = []
    owners: dict[str, int] = {}
    for number, source in enumerate(sources):
        try:
            paths = _each_text_file([source.name])
        except UserError as error:  # the weight may have been meant as a part of the name
            raise UserError(f"{error} (a source of weight {float(source.weight or 0):g})") from error
        for path in paths:
            owner = owners.setdefault(os.path.realpath(path), number)
            if owner != number:
                raise UserError(
                    f"{path} belongs to {sources[owner].name!r} and {source.name!r}; allowed: each file in one source"
                )
        corpora.append(_text_corpus(paths, text_field))
    return corpora


def _text_corpus(paths: list[str], text_field: str) -> Corpus:
    return _file_corpus(paths, functools.partial(_text_documents, text_field))


def _file_corpus(paths: list[str], read: Callable[[str, OnRead], Iterator[Document]]) -> Corpus:
    def documents(on_read: OnRead) -> Iterator[Document]:
        for path in paths:
            yield from read(path, on_read)

    try:
        num_bytes = sum(os.path.getsize(path) for path in paths)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    return Corpus(num_bytes, documents)


def find_text_files(files: str) -> list[str]:
    """Sorted paths of the text files that comma-separated globs and directories name, each once."""
    return _each_text_file(entries(files))


def _each_text_file(patterns: Sequence[str]) -> list[str]:
    paths = _matching_files(patterns, TEXT_SUFFIXES, "text")
    for path in paths:
        if path.endswith(parquet_files.SUFFIX):
            parquet_files.require_pyarrow(path)  # now, not after the files before it
    return paths


def find_files(files: str, suffixes: tuple[str, ...], source: str) -> list[str]:
    """Sorted paths of the files with these suffixes that comma-separated globs and directories name, each once.

    source: the name of the source that reads them, for errors.
    """
    return _matching_files(entries(files), suffixes, source)


def _matching_files(patterns: Sequence[str], suffixes: tuple[str, ...], source: str) -> list[str]:
    if not patterns:
        raise UserError(
            f"data files are not given; data.files needs globs of {', '.join(suffixes)} for the {source} source"
        )
    found: set[str] = set()
    for pattern in patterns:
        if os.path.isdir(pattern):
            below = _files_below(pattern)
            matches = [path for path in below if path.endswith(suffixes)]
            kind = f"directory {pattern!r} holds no {', '.join(suffixes)} file; it holds {_kinds(below)}"
            if matches and (others := [path for path in set(below) - set(matches) if not _is_hidden(path)]):
                logging.warning("of directory %s these files are not read: %s", pattern, _kinds(others))
        else:
            matches = [path for path in matching(pattern) if not os.path.isdir(path)]
            kind = f"no file matches {pattern!r}"
            if looks_weighted(pattern):
                kind += "; weights are for the sources text and array_record of training"
            elif len(patterns) > 1:
                kind += f" (one of {len(patterns)} names between commas)"
        if not matches:
            raise UserError(kind)
        found.update(matches)
    for path in sorted(found):
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path} is not a regular file")
        if not path.endswith(suffixes):
            raise UserError(f"{path} is not a file the {source} source reads; allowed: {', '.join(suffixes)}")
    return _each_once(found)


def find_news_files(directory: str) -> list[str]:
    """Sorted paths of the `news.en-?????-of-?????` files below a One Billion Word release's directory."""
    directory = local_path(directory)
    if not os.path.isdir(directory):
        raise UserError(f"{directory!r} is not a directory; the news source needs that of the One Billion Word release")
    # The release's test set is cut from shard 0, which is in its held-out folder: never train on that folder.
    paths = [
        path
        for path in _files_below(directory)
        if fnmatch.fnmatchcase(os.path.basename(path), NEWS_PATTERN)
        and not os.path.basename(os.path.dirname(path)).startswith("heldout-")
    ]
    if not paths:
        raise UserError(f"directory {directory!r} holds no {NEWS_PATTERN} file (searched recursively)")
    return _each_once(paths)


def _each_once(paths: Iterable[str]) -> list[str]:
    """Sorted paths of different files. A file that has several, by links, goes by that in the fewest directories."""
    names: dict[str, str] = {}
    for path in sorted(paths, key=lambda path: (path.count(os.sep), path)):
        names.setdefault(os.path.realpath(path), path)
    return sorted(names.values(), key=os.path.normpath)


def _files_below(directory: str) -> list[str]:
    return [os.path.join(path, name) for path, names in directories_below(directory) for name in names]


def _is_hidden(path: str) -> bool:
    return os.path.basename(path).startswith(".")


def _kinds(paths: Iterable[str]) -> str:
    """What kinds of files there are most of: `3 .zst, 1 .csv`."""
    kinds = collections.Counter(sorted(os.path.splitext(path)[1] or "without a suffix" for path in paths))
    return ", ".join(f"{count} {printable(kind)}" for kind, count in kinds.most_common(_SHOWN_KINDS)) or "no file"


def _text_documents(text_field: str, path: str, on_read: OnRead) -> Iterator[Document]:
    if path.endswith((".jsonl", ".jsonl.gz")):
        for number, text in read_json_lines(path, text_field, on_read):
            if text:
                yield Document(f"{path}:{number}", text)
    elif path.endswith(parquet_files.SUFFIX):
        for number, text in parquet_files.read_parquet(path, text_field, on_read):
            if text:
                yield Document(f"{path}:{number}", text)
    else:
        for offset, text in read_pieces(path, on_read):
            yield Document(f"{path}@{offset}" if offset else path, text)


def _news_documents(path: str, on_read: OnRead) -> Iterator[Document]:
    for number, line in read_lines(path, on_read):
        if sentence := line.strip():
            yield Document(f"{path}:{number}", sentence)


def _stdlib_corpus() -> Corpus:
    """The running Python's own modules, outside its tests, and the English help texts of `pydoc_data.topics`."""
    root = sysconfig.get_path("stdlib")
    modules: list[tuple[str, str]] = []  # (name relative to the library, path)
    for parent, directories, names in os.walk(root):
        # config-* directories and _sysconfigdata* are written when Python is built: they differ between machines.
        directories[:] = [
            d for d in directories if d not in _STDLIB_SKIPPED_DIRECTORIES and not d.startswith("config-")
        ]
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = os.path.join(parent, name)
                modules.append((os.path.relpath(path, root).replace(os.sep, "/"), path))
    modules = sorted(module for module in modules if module[0] != _TOPICS)
    if not modules:
        raise UserError(f"the stdlib source found no .py file of the running Python in {root!r}")
    topics = _help_topics()

    def documents(on_read: OnRead) -> Iterator[Document]:
        for name, path in modules:
            data = read_file(path)
            on_read(len(data))
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError:
                continue  # PEP 263 allows other encodings; a byte model of UTF-8 text has no use for them
            if text:
                yield Document(name, text)
        for topic, text in topics:
            on_read(len(text.encode("utf-8")))
            yield Document(f"{_TOPICS}/{topic}", text)

    num_bytes = sum(os.path.getsize(path) for _, path in modules if os.path.exists(path))  # no dangling links
    num_bytes += sum(len(text.encode("utf-8")) for _, text in topics)
    return Corpus(num_bytes, documents, identity="name")


def _help_topics() -> list[tuple[str, str]]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # minimal system Pythons leave it out
        return []
    return sorted((name, text) for name, text in topics.items() if text)
