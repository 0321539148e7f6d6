"""Labelled texts small enough that a test can learn them."""

import json
import random
from pathlib import Path
from typing import Any

import ml_collections

from tests.tiny_runs import tiny_config

LABELLED: dict[str, Any] = {"task.name": "classification", "data.source": "labelled"}


def labelled_config(files: str, **changes: Any) -> ml_collections.ConfigDict:
    """`tiny_config` of a classification of `files`."""
    own = {name.replace("__", "."): value for name, value in changes.items()}
    return tiny_config(**{"data.files": files, "data.heldout_fraction": 0.3} | LABELLED | own)


def write_labelled(path: Path, labels: tuple[Any, ...] = ("ham", "spam"), count: int = 60) -> str:
    """A .jsonl file of texts in which the word `cheap` says that the label is the second one; returns its path."""
    choose = random.Random(0)
    lines = []
    for number in range(count):
        words = choose.choices(("we", "met", "at", "noon", "to", "talk"), k=choose.randint(1, 8))
        is_second = number % 3 == 0
        words[choose.randrange(len(words))] = "cheap" if is_second else "dear"
        lines.append(json.dumps({"text": " ".join(words), "label": labels[is_second]}))
    path.write_text("\n".join(lines) + "\n")
    return str(path)
