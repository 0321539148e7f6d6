"""Labelled texts of a published set as JSON lines, with the figures that a reader of results needs."""

import json
import statistics
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from darkformer_jax.data.files import whole_directory, write_json
from darkformer_jax.errors import UserError

LABEL_COLUMN = "label"


class LabelledText(NamedTuple):
    """A text, its label, and the bytes of each document in it before any cut."""

    text: str
    label: str
    lengths: Sequence[int]


def write_text_set(
    directory: str, column: str, splits: Mapping[str, Iterable[LabelledText]], cuts: Sequence[int]
) -> dict[str, Any]:
    """Writes <split>.jsonl and statistics.json; the directory appears whole or not at all.

    Args:
      column: the field of the text. The label is in LABEL_COLUMN.
      cuts: bytes; how many documents are longer than each is counted.

    Returns:
      what statistics.json has: per split the number of examples, the share of each label and the largest of these; of
      the documents the shortest, the median and the longest in bytes, and by cut the share that is longer.

    Raises UserError if the directory exists and is not empty, or a split has no example.
    """
    result = {}
    with whole_directory(directory) as path:
        for split, rows in splits.items():
            labels: Counter[str] = Counter()
            lengths = array("q")
            with open(path / f"{split}.jsonl", "w", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps({column: row.text, LABEL_COLUMN: row.label}, ensure_ascii=False) + "\n")
                    labels[row.label] += 1
                    lengths.extend(row.lengths)
            if not labels:
                raise UserError(f"the files have no example for {split}")
            shares = {label: labels[label] / labels.total() for label in sorted(labels)}
            result[split] = {
                "examples": labels.total(),
                "shares": shares,
                "majority_class": max(shares.values()),
                "shortest_bytes": min(lengths),
                "median_bytes": int(statistics.median(lengths)),
                "longest_bytes": max(lengths),
                "cut_shares": {str(cut): sum(length > cut for length in lengths) / len(lengths) for cut in cuts},
            }
        write_json(path / "statistics.json", result)
    return result
