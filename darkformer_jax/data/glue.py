"""The tasks of GLUE (Wang et al., arXiv 1804.07461) from its released files to JSON lines with a text and a label.

The release has a directory per task with tab-separated files whose quotes are text. A pair of sentences becomes one
text with a line feed between them. Rows with a label that lack a field are left out and counted: the release has some.
Test rows are all kept, each with its index in the release, because a submission needs an answer for each.
"""

import json
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from darkformer_jax.data.files import whole_directory, write_json
from darkformer_jax.data.progress import ProgressBar, no_progress, with_progress
from darkformer_jax.data.text_files import read_lines
from darkformer_jax.errors import UserError, printable

_TRUTH = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_SPLITS = ("train", "dev", "test")
_INDEX = ("index", "id")  # names of a test file's first column


class GlueTask(NamedTuple):
    """The layout of a task's files.

    Attributes:
      directory: its name in the release.
      texts: columns of the sentences.
      label: column of the label.
      classes: the labels; () = numbers from 0 to 5.
      metric: the official one.
      train_size: training examples of the release.
      splits: names of the files without .tsv; those that begin with `test` have no labels.
      header: the columns of files that do not name them. The test file names them always.
    """

    directory: str
    texts: tuple[str, ...]
    label: str
    classes: tuple[str, ...]
    metric: str
    train_size: int
    splits: tuple[str, ...] = _SPLITS
    header: tuple[str, ...] = ()


GLUE_TASKS = {
    "cola": GlueTask(
        *("CoLA", ("sentence",), "label", _TRUTH, "Matthews", 8551),
        header=("source", "label", "mark", "sentence"),
    ),
    "sst2": GlueTask("SST-2", ("sentence",), "label", _TRUTH, "accuracy", 67_349),
    "mrpc": GlueTask("MRPC", ("#1 String", "#2 String"), "Quality", _TRUTH, "F1", 3668),
    "stsb": GlueTask("STS-B", ("sentence1", "sentence2"), "score", (), "Spearman", 5749),
    "qqp": GlueTask("QQP", ("question1", "question2"), "is_duplicate", _TRUTH, "F1", 363_846),
    "mnli": GlueTask(
        *("MNLI", ("sentence1", "sentence2"), "gold_label", ("contradiction", "entailment", "neutral"), "accuracy"),
        train_size=392_702,
        splits=("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched"),
    ),
    "qnli": GlueTask("QNLI", ("question", "sentence"), "label", _ENTAILMENT, "accuracy", 104_743),
    "rte": GlueTask("RTE", ("sentence1", "sentence2"), "label", _ENTAILMENT, "accuracy", 2490),
    "wnli": GlueTask("WNLI", ("sentence1", "sentence2"), "label", _TRUTH, "accuracy", 635),
}


class _Table(NamedTuple):
    """The rows of a file, as JSON values, and how many were left out."""

    rows: list[dict[str, Any]]
    num_short: int


def write_glue(
    directory: str, name: str, release: str, progress_bar: ProgressBar = no_progress
) -> dict[str, dict[str, Any]]:
    """Writes <split>.jsonl and statistics.json; the directory appears whole or not at all.

    Args:
      name: a key of GLUE_TASKS.
      release: the task's directory in the release, or the one that holds all tasks.

    Returns:
      what statistics.json has: per split the number of examples and of rows left out, the median length in bytes, and
      with classes the share of each.

    Raises UserError if a file or a column is missing, a label is none of the task's, or a test row has no text; the
    line is named.
    """
    task = GLUE_TASKS[name]
    inner = os.path.join(release, task.directory)
    source = inner if os.path.isdir(inner) else release
    missing = [split for split in task.splits if not os.path.isfile(_path(source, split))]
    if missing:
        needed = f"{name} needs {', '.join(task.splits)} (.tsv)"
        if not os.path.isdir(release):
            what = "is a file" if os.path.exists(release) else "is not there"
            raise UserError(
                f"{release} {what}; --files is the directory of the release or its {task.directory}: {needed}"
            )
        raise UserError(f"{_path(source, missing[0])} is missing; {needed}")
    result = {}
    with whole_directory(directory) as path:
        for split in with_progress(task.splits, "file", progress_bar):
            table = _read(_path(source, split), task, is_test=split.startswith("test"))
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in table.rows)
            (path / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
            result[split] = _statistics(table, task)
        write_json(Path(path) / "statistics.json", result)
    return result


def _path(directory: str, split: str) -> str:
    return os.path.join(directory, f"{split}.tsv")


def _read(path: str, task: GlueTask, is_test: bool) -> _Table:
    lines = _fields(path)
    header = task.header
    if is_test or not header:
        _, names = next(lines)
        header = tuple(names)
    wanted = task.texts if is_test else (*task.texts, task.label)
    shown = ", ".join(map(printable, header))
    if is_test and header[0] not in _INDEX:
        raise UserError(f"{path} does not begin with the column {' or '.join(_INDEX)}; it has: {shown}")
    for column in wanted:
        if column not in header:
            raise UserError(f"{path} has no column {column!r}; it has: {shown}")
    places = [header.index(column) for column in wanted]
    rows: list[dict[str, Any]] = []
    num_short = 0
    for number, fields in lines:
        values = [fields[place].strip() if place < len(fields) else "" for place in places]
        text = "\n".join(values[: len(task.texts)])
        if is_test:
            if any(fields):  # not a blank line
                rows.append(_test_row(fields[0], text, f"{path}:{number}"))
        elif all(values):
            rows.append({"text": text, "label": _label(values[-1], task, f"{path}:{number}")})
        else:
            num_short += 1
    if not rows:
        raise UserError(f"{path} has no example")
    return _Table(rows, num_short)


def _fields(path: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in read_lines(path):
        yield number, line.rstrip("\r").split("\t")


def _test_row(index: str, text: str, place: str) -> dict[str, Any]:
    """A row to be predicted; one sentence of a pair may be missing."""
    if not text.strip():
        raise UserError(f"{place}: there is no sentence; a test row is predicted, and cannot be left out")
    return {"index": index, "text": text}


def _label(text: str, task: GlueTask, place: str) -> str | float:
    if task.classes:
        if text not in task.classes:
            raise UserError(f"{place}: the label {printable(text)!r}; allowed: {', '.join(task.classes)}")
        return text
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0 <= number <= 5:
        raise UserError(f"{place}: the label {printable(text)!r}; allowed: numbers from 0 to 5")
    return number


def _statistics(table: _Table, task: GlueTask) -> dict[str, Any]:
    lengths: Sequence[int] = [len(row["text"].encode("utf-8")) for row in table.rows]
    figures = {
        "examples": len(table.rows),
        "left_out": table.num_short,
        "median_bytes": int(statistics.median(lengths)),
    }
    counts = Counter(row["label"] for row in table.rows if "label" in row)
    if not counts or not task.classes:
        return figures
    return figures | {"shares": {label: counts[label] / len(table.rows) for label in task.classes}}
