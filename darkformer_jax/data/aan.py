"""Pairs of papers from the ACL Anthology Network, the Retrieval task of Long Range Arena: does one cite the other?

new_aan_pairs.train.tsv, .eval.tsv and .test.tsv, in tsv_data of lra_release, have no header and no quoting: a label,
two ids and two texts. A text is taken as it is spelled there. A pair becomes one text, as in GLUE: both papers, each
cut to the same number of bytes, with a line feed between them.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from darkformer_jax.data.lra_release import released
from darkformer_jax.data.progress import ProgressBar, no_progress
from darkformer_jax.data.text_files import read_lines
from darkformer_jax.data.text_sets import LabelledText, write_text_set
from darkformer_jax.errors import UserError, printable

TEXT_COLUMN = "papers"
LENGTH = 4000  # bytes of a paper, as Long Range Arena takes
_DIRECTORY = "tsv_data"
_FILES = {split: f"new_aan_pairs.{name}.tsv" for split, name in (("train", "train"), ("val", "eval"), ("test", "test"))}
_LABELS = {"0": "0", "0.0": "0", "1": "1", "1.0": "1"}
_FIELDS = "label, two ids and two texts"
_NO_TEXTS = f"has only the ids of papers; the files with {_FIELDS} are in {_DIRECTORY} of lra_release"


def write_aan(
    directory: str, files: str, length: int = LENGTH, progress_bar: ProgressBar = no_progress
) -> dict[str, Any]:
    """Writes train.jsonl, val.jsonl, test.jsonl and statistics.json, as `write_text_set` does, and returns the last.

    Args:
      files: the directory of new_aan_pairs.*.tsv, or lra_release.
      length: bytes of each paper that are kept, less the part of a character at the end.

    Raises UserError, which names file and line, for what is missing, a row that is no pair, another label than 0 and 1,
    or a paper without text.
    """
    if length < 1:
        raise UserError(f"--length={length}: must be at least 1")
    is_there = any((Path(files) / name).exists() for name in _FILES.values()) or _only_ids(Path(files))
    source = Path(files) if is_there else released(files, _DIRECTORY, f", or the directory of {_FILES['train']}")
    paths = {split: source / name for split, name in _FILES.items()}
    for path in paths.values():
        if not path.is_file():
            beside = f"; {ids.name} beside it {_NO_TEXTS}" if (ids := _only_ids(source)) else ""
            raise UserError(f"{path} is missing; the task needs {', '.join(_FILES.values())}{beside}")
    with progress_bar(sum(path.stat().st_size for path in paths.values()), "B") as bar:
        splits = {split: _pairs(str(path), length, bar.update) for split, path in paths.items()}
        return write_text_set(directory, TEXT_COLUMN, splits, (length,))


def _only_ids(source: Path) -> Path | None:
    """A file of pairs without texts."""
    return next(iter(sorted(source.glob("new_aan_pairs.*only_ids.tsv"))), None)


def _pairs(path: str, length: int, on_read: Callable[[int], Any]) -> Iterator[LabelledText]:
    for number, line in read_lines(path, on_read):
        place = f"{path}:{number}"
        label, *fields = line.rstrip("\r").split("\t")
        if not fields and not label.strip():
            continue
        if len(fields) == 2 and number == 1:
            raise UserError(f"{place} {_NO_TEXTS}")
        if len(fields) != 4:
            raise UserError(f"{place}: {1 + len(fields)} fields; allowed: {_FIELDS}")
        if label not in _LABELS:
            raise UserError(f"{place}: the label {printable(label)!r}; allowed: {', '.join(_LABELS)}")
        papers = [text.strip().encode("utf-8") for text in fields[2:]]
        if not all(papers):
            raise UserError(f"{place}: text {1 + papers.index(b'')} is empty")
        kept = [paper[:length].decode("utf-8", "ignore") for paper in papers]
        yield LabelledText("\n".join(kept), _LABELS[label], list(map(len, papers)))
