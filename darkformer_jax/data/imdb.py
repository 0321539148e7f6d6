"""Reviews of films from aclImdb (Maas et al., 2011), the Text task of Long Range Arena.

aclImdb has train/pos, train/neg, test/pos and test/neg, with a file per review, <number>_<rating>.txt; train/unsup has
no labels. The release has no validation split, and others choose on the test split; here a tenth of the training
reviews, chosen by a hash of the text, is for validation, so that copies of a review are in one split.
"""

import re
from pathlib import Path
from typing import Any

from darkformer_jax.data.heldout import hash_fraction
from darkformer_jax.data.progress import ProgressBar, no_progress, with_progress
from darkformer_jax.data.text_files import read_pieces
from darkformer_jax.data.text_sets import LabelledText, write_text_set
from darkformer_jax.errors import UserError, printable

TEXT_COLUMN = "review"
CUTS = (1000, 4000)  # bytes: the lengths of configs/lra.py
_DIRECTORY = "aclImdb"
_RATINGS = {"neg": range(1, 5), "pos": range(7, 11)}
_NAME = re.compile(r"\d+_(\d+)\.txt")
_VAL_SHARE = 0.1


def write_imdb(directory: str, files: str, progress_bar: ProgressBar = no_progress) -> dict[str, Any]:
    """Writes train.jsonl, val.jsonl, test.jsonl and statistics.json, as `write_text_set` does, and returns the last.

    files: aclImdb, or the directory that has it.

    Raises UserError, which names the file, if one is missing, empty or not UTF-8, or has another rating than its
    directory; and if none is for validation.
    """
    inner = Path(files) / _DIRECTORY
    source = inner if inner.is_dir() else Path(files)
    places = [(split, label) for split in ("train", "test") for label in _RATINGS]
    listed = [(*place, path) for place in places for path in _reviews(source, *place)]
    splits: dict[str, list[LabelledText]] = {"train": [], "val": [], "test": []}
    for split, label, path in with_progress(listed, "review", progress_bar):
        text = "".join(piece for _, piece in read_pieces(str(path)))
        if not text.strip():
            raise UserError(f"{path}: the text is empty")
        is_val = split == "train" and hash_fraction(text, "IMDb validation") < _VAL_SHARE
        splits["val" if is_val else split].append(LabelledText(text, label, [len(text.encode("utf-8"))]))
    if not splits["val"]:
        raise UserError(f"{source}: its {len(splits['train'])} training reviews are too few: none is for validation")
    for rows in splits.values():
        rows.sort(key=lambda row: hash_fraction(row.text, "IMDb order"))  # a part of a split has both labels
    return write_text_set(directory, TEXT_COLUMN, splits, CUTS)


def _reviews(source: Path, split: str, label: str) -> list[Path]:
    """The sorted files of a directory. Raises UserError if there is none or a name is none of the release."""
    directory = source / split / label
    paths = sorted(directory.glob("*.txt"))
    if not paths:
        wanted = ", ".join(f"{split}/{label}" for split in ("train", "test") for label in _RATINGS)
        raise UserError(f"{directory} has no review; --files is {_DIRECTORY}, with {wanted} and a .txt file per review")
    for path in paths:
        found = _NAME.fullmatch(path.name)
        if not found or int(found[1]) not in (ratings := _RATINGS[label]):
            shown = f"{ratings[0]} to {ratings[-1]}"
            raise UserError(f"{printable(str(path))}: the name is <number>_<rating>.txt, with a rating of {shown}")
    return paths
