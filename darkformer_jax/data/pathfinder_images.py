"""Pathfinder of Long Range Arena from its published PNG images, in lra_release (`lra_release.released`).

pathfinder32, 64 and 128 have a directory per level, with PNG images, and with metadata/<n>.npy, which are text: a line
per image with its directory, its name, its number, its label and how it was drawn.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from darkformer_jax.data.files import read_file
from darkformer_jax.data.heldout import hash_fraction
from darkformer_jax.data.images import SPLITS, Images, write_splits
from darkformer_jax.data.lra_release import released
from darkformer_jax.data.progress import ProgressBar, no_progress, with_progress
from darkformer_jax.data.text_files import read_lines
from darkformer_jax.errors import UserError, one_line, printable

SIDES = {f"pathfinder{side}": side for side in (32, 64, 128)}  # pixels per row
LEVELS = {"easy": "curv_baseline", "intermediate": "curv_contour_length_9", "hard": "curv_contour_length_14"}
HARD = "hard"  # the level that Long Range Arena reports
_LABEL = 3  # its field in a line of the metadata
_EMPTY = "pathfinder32/curv_baseline/imgs/0/sample_172.png"  # was published so
_TENTHS = ("val", "test")  # what an image is in if its hash is in the first tenth or in the second


class _Listed(NamedTuple):
    """An image as the metadata have it: its file, its label, and the line."""

    path: Path
    label: int
    place: str


def write_pathfinder_release(
    directory: str, files: str, name: str, level: str, progress_bar: ProgressBar = no_progress
) -> dict[str, Any]:
    """Writes what `images.write_splits` does, of the published images; a tenth each is for validation and test.

    A hash of an image decides its split, so that copies are in one.

    Args:
      name: a key of SIDES.
      level: a key of LEVELS.

    Returns what statistics.json has: as there, and under `source` the level, the directory, a hash of its metadata,
    and which images were left out. That is the one that was published empty.

    Raises UserError, which names the file, for what is missing, a directory of images without metadata, another label
    than 0 and 1, or a damaged image.
    """
    source = released(files, name) / LEVELS[level]
    listed, fingerprint = _listed(source)
    splits: dict[str, list[_Listed]] = {split: [] for split in SPLITS}
    left_out = []
    for image in with_progress(listed, "image", progress_bar, "choosing splits"):
        if not image.path.is_file():
            raise UserError(f"{image.path} is missing, which {image.place} names")
        data = read_file(str(image.path))
        if data:
            tenth = int(10 * hash_fraction(hashlib.sha256(data).hexdigest(), "Pathfinder"))
            splits[_TENTHS[tenth] if tenth < len(_TENTHS) else "train"].append(image)
        elif image.path.as_posix().endswith(_EMPTY):
            left_out.append(_EMPTY)
        else:
            raise UserError(f"{image.path} is empty, which {image.place} names; only {_EMPTY} was published so")
    for split, images in splits.items():
        if not images:
            raise UserError(f"{source}: its {len(listed)} images are too few: none is in {split}")
    pieces = {split: _read_images(images, SIDES[name]) for split, images in splits.items()}
    facts = {"level": level, "directory": str(source), "metadata_sha256": fingerprint, "left_out": left_out}
    return write_splits(directory, pieces, len(listed) - len(left_out), progress_bar, facts)


def _listed(source: Path) -> tuple[list[_Listed], str]:
    """The images of a level in the order of its metadata, and the SHA-256 of these."""
    paths = sorted((source / "metadata").glob("*.npy"), key=lambda path: (len(path.stem), path.stem))
    if not paths:
        raise UserError(f"{source / 'metadata'} has no .npy file; a level has metadata/<n>.npy and imgs/<n>/*.png")
    _require_partners(source, {path.stem for path in paths})
    listed = []
    digest = hashlib.sha256()
    for path in paths:
        for number, line in read_lines(str(path)):
            digest.update(line.encode("utf-8") + b"\n")
            fields = line.split()
            if len(fields) <= _LABEL:
                raise UserError(f"{path}:{number}: {len(fields)} fields; the label is field {_LABEL + 1}")
            if (label := fields[_LABEL]) not in ("0", "1"):
                raise UserError(f"{path}:{number}: the label {printable(label)!r}; allowed: 0, 1")
            listed.append(_Listed(source / fields[0] / fields[1], int(label), f"{path}:{number}"))
    return listed, digest.hexdigest()


def _require_partners(source: Path, numbers: set[str]) -> None:
    """Raises UserError unless the directories in imgs/ have these numbers: a part of a level reads like a level."""
    directories = {path.name for path in (source / "imgs").glob("*") if path.is_dir() and path.name[0] != "."}
    for number in sorted(numbers ^ directories, key=lambda number: (len(number), number)):
        pair = source / "imgs" / number, source / "metadata" / f"{number}.npy"
        present, absent = pair if number in directories else pair[::-1]
        raise UserError(f"{present} is there without {absent}; allowed: a level in which each has the other")


def _read_images(listed: list[_Listed], side: int) -> Iterator[Images]:
    for image in listed:
        yield Images(_read_png(image, side)[None], np.array([image.label], np.uint8))


def _read_png(image: _Listed, side: int) -> np.ndarray:
    """[side, side] uint8."""
    try:
        with PIL.Image.open(image.path, formats=["PNG"]) as opened:
            opened.verify()  # the checksums, which reading the pixels does not ask; it leaves nothing to read
        with PIL.Image.open(image.path, formats=["PNG"]) as opened:
            if opened.size != (side, side) or opened.mode != "L":
                width, height = opened.size
                raise UserError(
                    f"{image.path} has {width} x {height} pixels of mode {opened.mode}; allowed: {side} x {side}, grey "
                    f"with 8 bits (mode L); {image.place} names it"
                )
            return np.asarray(opened)
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise UserError(f"{image.path} is no whole PNG image, which {image.place} names: {one_line(error)}") from error
