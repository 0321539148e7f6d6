"""Labelled texts: from tables and JSON lines to rows of tokens, one label per row.

.tsv    a header, then a line per example; quotes are text, as in the files of GLUE
.csv    a header, then an example per record; a field in double quotes may hold commas and line ends (RFC 4180)
.jsonl  an object per line
.parquet  an example per row
.txt    a text without a label, to be predicted

A row of a batch is one example, encoded like a prompt: BOS if the tokenizer's family has one, then the text's tokens.
It is cut at `sequence_length` and padded at the end.
"""

import csv
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from darkformer_jax.data import parquet_files
from darkformer_jax.data.files import read_json_object, write_atomically
from darkformer_jax.data.heldout import hash_fraction
from darkformer_jax.data.sources import find_files
from darkformer_jax.data.text_files import read_json_records, read_lines, read_pieces, string_field
from darkformer_jax.data.tokenizers import Tokenizer
from darkformer_jax.errors import UserError, printable

LABELS_FILE = "labels.json"

_HELDOUT_FRACTION = 0.15  # more than of text: labelled sets are small

_TABLE_SUFFIXES = (".tsv", ".tsv.gz", ".csv", ".csv.gz")
_SUFFIXES = (*_TABLE_SUFFIXES, ".jsonl", ".jsonl.gz", parquet_files.SUFFIX)
_PLAIN_SUFFIXES = (".txt", ".txt.gz")
_MAX_FIELD_CHARACTERS = 64 << 20  # the csv module's own limit, 128 KiB, is less than a long e-mail
_ENCODED_AT_ONCE = 1024  # examples
_SHOWN_CLASSES = 10  # in an error
_SHOWN_CHARACTERS = 40  # of a label
_LARGEST_NUMBER = 1e15  # float32 can add 10^8 squares of it: the errors of a split, the elements of a gradient


class Columns(NamedTuple):
    """Names of the table's columns, or of the object's fields, that hold the text and the label.

    The text may have several names between commas, `sentence1,sentence2`: it is then theirs, a line each.
    """

    text: str
    label: str


class Text(NamedTuple):
    """A text without a label, and its place: `file:line`."""

    text: str
    place: str


class Example(NamedTuple):
    """A text, its label as the file spells it, and its place: `file:line`."""

    text: str
    label: str
    place: str


def read_examples(files: str, columns: Columns) -> list[Example]:
    """All examples of the files that comma-separated globs and directories name, in order.

    Raises:
      UserError: there is no such file, or one column for text and another for labels, or an example has no text or
        label; the line is named.
    """
    names = _text_names(columns.text)
    if columns.label in names:
        raise UserError(f"text and label have the same column {columns.label!r}; allowed: two columns")
    examples: list[Example] = []
    for path in find_labelled_files(files):
        records = _records(path, (*names, columns.label))
        examples += [_example(record, names, columns.label, place) for place, record in records]
    if not examples:
        raise UserError(f"{files}: there is no example")
    return examples


def examples_fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 (hexadecimal) that changes with any text, any label and their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update((json.dumps([example.text, example.label]) + "\n").encode("utf-8"))
    return digest.hexdigest()


def find_labelled_files(files: str) -> list[str]:
    """Sorted paths of the files that `read_examples` reads. Raises UserError if there is none."""
    return find_files(files, _SUFFIXES, "labelled")


def read_texts(files: str, column: str) -> list[Text]:
    """The texts of .tsv, .csv, .jsonl and .parquet files, and each .txt file as one text, in order.

    column: as `Columns.text`.

    Raises:
      UserError: there is no such file or column, or a text is empty; the file and its line are named.
    """
    names = _text_names(column)
    texts: list[Text] = []
    for path in find_files(files, _SUFFIXES + _PLAIN_SUFFIXES, "text"):
        if path.endswith(_PLAIN_SUFFIXES):
            text = "".join(piece for _, piece in read_pieces(path))
            if not text.strip():
                raise UserError(f"{path}: the text is empty")
            texts.append(Text(text, path))
        else:
            texts += [Text(_text_of(record, names, place), place) for place, record in _records(path, names)]
    if not texts:
        raise UserError(f"{files}: there is no text")
    return texts


def _records(path: str, columns: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(`file:line`, record) of a file. columns: what a record must have, first a text's."""
    records: Iterable[tuple[int, Any]]
    if path.endswith(_TABLE_SUFFIXES):
        records = table_records(path, columns)
    elif path.endswith(parquet_files.SUFFIX):
        parquet_files.require_pyarrow(path)
        option = "task.text_column or task.label_column"
        records = parquet_files.read_parquet_records(path, columns[0], columns[1:], option=option)
    else:
        records = read_json_records(path)
    return ((f"{path}:{line}", record) for line, record in records)


def table_records(path: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, field by column) of each record of a .tsv or .csv file; a field that a record lacks is not there.

    Raises UserError if a column is missing or there twice, or a record is none.
    """
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    lines = (line + "\n" for _, line in read_lines(path))
    if path.removesuffix(".gz").endswith(".tsv"):
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(lines, strict=True)
    begin = 1
    try:
        header = [name.strip() for name in next(reader)]
        if not any(header):
            raise UserError(f"{path}: line 1 is blank; the first line names the columns")
        for column in columns:
            if column not in header:
                raise UserError(f"{path} has no column {column!r}; it has: {', '.join(header)}")
            if header.count(column) > 1:
                raise UserError(f"{path} has {header.count(column)} columns {column!r}; allowed: one")
        begin = reader.line_num + 1
        for fields in reader:
            if len(fields) > len(header):
                raise UserError(f"{path}:{begin}: {len(fields)} fields, but the header has {len(header)}")
            if fields:  # not a blank line
                yield begin, dict(zip(header, fields, strict=False))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{begin}: not a record: {error}") from error


def _text_names(column: str) -> tuple[str, ...]:
    """The names in `Columns.text`. Raises UserError for one that is empty or there twice."""
    names = tuple(column.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise UserError(f"task.text_column = {column!r}; allowed: a name, or different names between commas")
    return names


def _text_of(record: Any, names: Sequence[str], place: str) -> str:
    texts = [string_field(record, name, place, "task.text_column") for name in names]
    for name, text in zip(names, texts, strict=True):
        if not text.strip():
            raise UserError(f"{place}: the text in {name!r} is empty")
    return "\n".join(texts)


def _example(record: Any, names: Sequence[str], label_column: str, place: str) -> Example:
    text = _text_of(record, names, place)
    value = record.get(label_column)
    is_nan = isinstance(value, float) and math.isnan(value)  # how some programs write that a value is missing
    if value is None or is_nan or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{place}: there is no label in {label_column!r}")
    if not isinstance(value, str | int | float):
        raise UserError(f"{place}: the label in {label_column!r} is neither a string nor a number")
    if isinstance(value, str):
        label = string_field(record, label_column, place, "task.label_column").strip()
    else:
        label = json.dumps(value)
    return Example(text, label, place)


def split_examples(
    files: str, heldout_files: str, heldout_fraction: float, columns: Columns
) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples.

    The held-out examples are those of `heldout_files`. If that is empty, they are the examples of `files` whose text's
    hash is below the fraction.

    Args:
      files, heldout_files: see `read_examples`.
      heldout_fraction: 0 = 0.15.

    Raises:
      UserError: what `read_examples` raises, or one side has no example.
    """
    examples = read_examples(files, columns)
    if heldout_files:
        return examples, read_examples(heldout_files, columns)
    fraction = heldout_fraction or _HELDOUT_FRACTION
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        sides[hash_fraction(example.text, "heldout") < fraction].append(example)
    if not all(sides):
        raise UserError(
            f"{files}: {len(sides[0])} of its {len(examples)} examples are for training, {len(sides[1])} are held out; "
            "change data.heldout_fraction or give task.heldout_files"
        )
    return sides


def shown_label(label: str) -> str:
    """A label for a message or a table: without control characters, and cut if it is long."""
    return printable(label if len(label) <= _SHOWN_CHARACTERS else label[:_SHOWN_CHARACTERS] + "...")


def class_names(examples: Sequence[Example]) -> tuple[str, ...]:
    """The distinct labels, sorted: class i has the i-th label.

    Raises:
      UserError: there is only one label, or all labels are numbers and some have fractions, as in a regression.
    """
    names = sorted({example.label for example in examples})
    if len(names) == 1:
        file = examples[0].place.rpartition(":")[0]
        raise UserError(
            f"{file}: all {len(examples)} training examples have the label '{shown_label(names[0])}'; "
            "a classification needs two classes or more"
        )
    numbers = [_number(name) for name in names]
    fractions = [
        name
        for name, number in zip(names, numbers, strict=True)
        if number is not None and math.isfinite(number) and not number.is_integer()
    ]
    if fractions and None not in numbers:
        place = next(example.place for example in examples if example.label == fractions[0])
        raise UserError(
            f"{place}: the label '{shown_label(fractions[0])}' is for a regression, but task.name = 'classification'; "
            "allowed: names or whole numbers, or task.name = 'regression'"
        )
    return tuple(names)


def class_labels(examples: Sequence[Example], names: Sequence[str]) -> np.ndarray:
    """[n] int32: the class of each example. Raises UserError, which names its place, for a label not in `names`."""
    classes = {name: number for number, name in enumerate(names)}
    for example in examples:
        if example.label not in classes:
            seen = ", ".join(map(shown_label, names[:_SHOWN_CLASSES])) + (
                ", ..." if len(names) > _SHOWN_CLASSES else ""
            )
            label = shown_label(example.label)
            raise UserError(f"{example.place}: training has not seen the label '{label}'; it has seen: {seen}")
    return np.array([classes[example.label] for example in examples], np.int32)


def number_labels(examples: Sequence[Example]) -> np.ndarray:
    """[n] float32: each label as a number.

    Raises UserError, which names its place, for a label that is no number or too large for sums of squares.
    """
    numbers = [_number(example.label) for example in examples]
    for example, number in zip(examples, numbers, strict=True):
        if number is None or math.isnan(number):
            raise UserError(
                f"{example.place}: the label '{shown_label(example.label)}' is not a number, but task.name = "
                "'regression'; allowed: finite numbers, or task.name = 'classification'"
            )
        if abs(number) > _LARGEST_NUMBER:
            raise UserError(
                f"{example.place}: the label '{shown_label(example.label)}' is too large for squared errors in "
                f"float32; allowed: up to {_LARGEST_NUMBER:g}"
            )
    return np.array(numbers, np.float32)


def _number(label: str) -> float | None:
    """The number that a label spells, infinite if it is too large, or NaN; None for other labels."""
    try:
        return float(label)
    except ValueError:
        return None


class LabelledRows:
    """One split, tokenised: row i is example i.

    Args:
      examples: the split.
      labels: [n]: each example's class (int32) or number (float32).
      tokenizer: of the texts.
      sequence_length: tokens per row.

    Attributes:
      texts: as they were read.
      labels: see above.
      num_tokens: [n]: tokens of each example before it is cut.
      fingerprint: SHA-256 (hexadecimal) that changes with any token of a row and any label.

    Raises UserError, which names the place, for a text with a word that has no id, or of which the tokenizer makes no
    token: its label would be predicted from BOS alone.
    """

    def __init__(
        self,
        examples: Sequence[Example] | Sequence[Text],
        labels: np.ndarray,
        tokenizer: Tokenizer,
        sequence_length: int,
    ) -> None:
        self.texts = tuple(example.text for example in examples)
        self.labels = labels
        self._sequence_length = sequence_length
        rows, num_tokens = [], []
        for begin in range(0, len(self.texts), _ENCODED_AT_ONCE):
            for ids in _encoded(examples[begin : begin + _ENCODED_AT_ONCE], tokenizer):
                prefix = [tokenizer.bos_id] if tokenizer.adds_bos else []
                kept = ids[: sequence_length - len(prefix)].astype(np.int32)  # ids may be uint32: together, int64
                rows.append(np.concatenate([np.array(prefix, np.int32), kept]))
                num_tokens.append(len(prefix) + len(ids))
        self.num_tokens = np.array(num_tokens)
        self._tokens = np.concatenate(rows)
        self._ends = np.cumsum([len(row) for row in rows])
        digest = hashlib.sha256(self._tokens.data)  # without a copy: there may be gigabytes
        digest.update(self._ends.astype(np.int64).data)
        digest.update(labels.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def cut_share(self) -> float:
        """Share of the examples that are longer than a row."""
        return float(np.mean(self.num_tokens > self._sequence_length))

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The batch of the given rows [B]; rows past the last example are padding of weight 0.

        Returns:
          inputs, segment_ids (1, 0 = padding) and positions [B, L] int32; labels [B]; weights [B] float32.
        """
        is_row = rows < len(self)
        index = np.where(is_row, rows, 0)
        begins = np.where(index > 0, self._ends[index - 1], 0)
        lengths = np.where(is_row, self._ends[index] - begins, 0)
        column = np.arange(self._sequence_length)
        is_token = column < lengths[:, None]
        places = np.minimum(begins[:, None] + column, len(self._tokens) - 1)
        return {
            "inputs": np.where(is_token, self._tokens[places], 0),
            "segment_ids": is_token.astype(np.int32),
            "positions": np.where(is_token, column, 0).astype(np.int32),
            "labels": np.where(is_row, self.labels[index], 0).astype(self.labels.dtype),
            "weights": is_row.astype(np.float32),
        }


def _encoded(examples: Sequence[Example] | Sequence[Text], tokenizer: Tokenizer) -> list[np.ndarray]:
    """The ids of each text, at least one. Raises UserError, with its place, for a word or a text that has none."""
    try:
        encoded = tokenizer.encode_batch([example.text for example in examples])
    except UserError:
        for example in examples:
            for word in (*example.text.split(), example.text):
                if error := _refusal(word, tokenizer):
                    raise UserError(f"{example.place}: '{shown_label(word)}': {error}") from error
        raise
    for number, ids in enumerate(encoded):
        if not len(ids):
            example = examples[number]
            raise UserError(
                f"{example.place}: the tokenizer makes no token of the text '{shown_label(example.text)}'; allowed: "
                "texts with a token"
            )
    return encoded


def _refusal(text: str, tokenizer: Tokenizer) -> UserError | None:
    try:
        tokenizer.encode_batch([text])
    except UserError as error:
        return error
    return None


def save_class_names(directory: str | os.PathLike[str], names: Sequence[str]) -> None:
    """Writes labels.json, which `load_class_names` reads."""
    content = json.dumps({"labels": list(names)}, ensure_ascii=False, indent=2) + "\n"
    write_atomically(Path(directory) / LABELS_FILE, content.encode("utf-8"))


def load_class_names(directory: str | os.PathLike[str]) -> tuple[str, ...]:
    """The class names of a workdir's model. Raises UserError if its labels.json cannot be read."""
    path = os.path.join(directory, LABELS_FILE)
    names = read_json_object(path).get("labels")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) < 2:
        raise UserError(f"{path} has no list of two labels or more")
    return tuple(names)
