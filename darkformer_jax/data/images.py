"""Grey images as sequences of pixels, for classification.

A pixel is an id: images are read row by row, as Long Range Arena (Tay et al., arXiv 2011.04006) does with CIFAR-10. In
a file, a pixel of brightness b is the Braille pattern U+2800 + b, of which there are 256, and none is a space. The
files train.tsv, val.tsv and test.tsv have the columns `pixels` and `label`; tokenizer.json beside them has an id per
brightness.

fashion_mnist  the files *-images-idx3-ubyte.gz and *-labels-idx1-ubyte.gz of Fashion-MNIST, or of MNIST (IDX format)
cifar10        data_batch_1.bin to data_batch_5.bin and test_batch.bin, the binary version of CIFAR-10; or the same
               names without .bin, its Python version
"""

import gzip
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers as hf

from darkformer_jax.data.cifar_pickles import read_cifar_pickle
from darkformer_jax.data.files import read_file, whole_directory, write_json
from darkformer_jax.data.progress import ProgressBar, no_progress
from darkformer_jax.data.tokenizers import DOCUMENT_SEPARATOR, HuggingFaceTokenizer
from darkformer_jax.errors import UserError

TEXT_COLUMN, LABEL_COLUMN = "pixels", "label"
SPLITS = ("train", "val", "test")
_FIRST_PIXEL = 0x2800
_VAL_SHARE = 10  # one in ten training images, the last ones, as Long Range Arena does
_IDX_TYPE = 8  # unsigned bytes
_CIFAR_SIDE = 32
_CLASSES = 10  # of CIFAR-10, Fashion-MNIST and MNIST
_GREY = np.array([0.299, 0.587, 0.114])  # luma of red, green and blue, ITU-R BT.601
_AT_ONCE = 1000  # images


class Images(NamedTuple):
    """Grey images [n, side, side] uint8 and their classes [n] uint8."""

    pixels: np.ndarray
    labels: np.ndarray


def read_fashion_mnist(directory: str) -> tuple[Images, Images]:
    """(training, test) images of 28 x 28. Raises UserError for a file that is missing or damaged."""
    training, test = _read_idx_pair(directory, "train"), _read_idx_pair(directory, "t10k")
    if training.pixels.shape[1:] != test.pixels.shape[1:]:
        sides = (" x ".join(map(str, images.pixels.shape[1:])) for images in (training, test))
        raise UserError("{}: train has images of {} pixels, t10k of {}; allowed: one size".format(directory, *sides))
    return training, test


def read_cifar10(directory: str) -> tuple[Images, Images]:
    """(training, test) images of 32 x 32 in grey, of the binary version if a file of it is there, else of the other.

    Raises UserError for a file that is missing or damaged.
    """
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    binary = [os.path.join(directory, f"{name}.bin") for name in names]
    pickled = [os.path.join(directory, name) for name in names]
    is_pickled = any(map(os.path.isfile, pickled)) and not any(map(os.path.isfile, binary))
    paths, read = (pickled, _read_pickled_batch) if is_pickled else (binary, _read_cifar_batch)
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(
                f"{path} is missing; --files is the directory of the binary version of CIFAR-10 "
                "(cifar-10-batches-bin), or of its Python version (cifar-10-batches-py)"
            )
    *batches, test = map(read, paths)
    return Images(*(np.concatenate(parts) for parts in zip(*batches, strict=True))), test


READERS: dict[str, Callable[[str], tuple[Images, Images]]] = {
    "fashion_mnist": read_fashion_mnist,
    "cifar10": read_cifar10,
}


def write_images(
    directory: str, read: tuple[Images, Images], side: int | None, progress_bar: ProgressBar = no_progress
) -> dict[str, Any]:
    """Writes the splits, tokenizer.json and statistics.json; the directory appears whole or not at all.

    Args:
      read: training and test images; the last tenth of the training images is the validation split.
      side: pixels per row of what is written; each is the mean of a square of pixels. None = all pixels.

    Returns:
      what statistics.json has: per split the number of images and the share of each class, and the pixels per image.

    Raises UserError if the directory exists and is not empty, `side` does not divide the images' side, or a tenth of
    the training images is less than one.
    """
    training, test = read
    if len(training.labels) < _VAL_SHARE:
        raise UserError(
            f"{len(training.labels)} training images: must be at least {_VAL_SHARE}, because one in {_VAL_SHARE} is "
            "for validation"
        )
    begin = len(training.labels) - len(training.labels) // _VAL_SHARE
    parts: tuple[Images, ...] = (Images(*(x[:begin] for x in training)), Images(*(x[begin:] for x in training)), test)
    if side is not None:
        parts = tuple(Images(smaller(images.pixels, side), images.labels) for images in parts)
    splits = {split: _some(images) for split, images in zip(SPLITS, parts, strict=True)}
    return write_splits(directory, splits, sum(len(x.labels) for x in parts), progress_bar)


def write_splits(
    directory: str,
    splits: Mapping[str, Iterable[Images]],
    num_images: int,
    progress_bar: ProgressBar,
    source: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`write_images` for splits that come in pieces.

    num_images: in all, for the progress bar. source: where they are from; statistics.json has it under this name.
    """
    result: dict[str, Any] = {}
    with whole_directory(directory) as path, progress_bar(num_images, "image") as bar:
        for split, pieces in splits.items():
            counts: Counter[int] = Counter()
            with open(path / f"{split}.tsv", "w", encoding="utf-8") as file:
                file.write(f"{TEXT_COLUMN}\t{LABEL_COLUMN}\n")
                for images in pieces:
                    file.writelines(_lines(images))
                    counts.update(images.labels.tolist())
                    num_pixels = images.pixels[0].size
                    bar.update(len(images.labels))
            shares = {str(label): counts[label] / counts.total() for label in sorted(counts)}
            result[split] = {"images": counts.total(), "pixels": num_pixels, "shares": shares}
        if source is not None:
            result["source"] = source
        pixel_tokenizer().save(str(path))
        write_json(path / "statistics.json", result)
    return result


def smaller(pixels: np.ndarray, side: int) -> np.ndarray:
    """Images [n, side, side] whose pixels are means of squares, rounded. Raises UserError if they do not fit."""
    old = pixels.shape[1]
    if not 0 < side <= old or old % side:
        raise UserError(f"--side={side}: must divide the images' {old} pixels per row")
    squares = pixels.reshape(len(pixels), side, old // side, side, old // side)
    return np.rint(squares.mean(axis=(2, 4))).astype(np.uint8)


def pixel_tokenizer() -> HuggingFaceTokenizer:
    """An id per brightness, after that of the separator."""
    names = (DOCUMENT_SEPARATOR, *map(_pixel, range(256)))
    tokenizer = hf.Tokenizer(hf.models.WordLevel({name: number for number, name in enumerate(names)}, unk_token=None))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Split(hf.Regex("."), "isolated")
    tokenizer.decoder = hf.decoders.Fuse()
    tokenizer.post_processor = hf.processors.TemplateProcessing(
        single=f"{DOCUMENT_SEPARATOR} $A", special_tokens=[(DOCUMENT_SEPARATOR, 0)]
    )
    return HuggingFaceTokenizer(tokenizer.to_str().encode("utf-8"), DOCUMENT_SEPARATOR, DOCUMENT_SEPARATOR)


def _pixel(brightness: int) -> str:
    return chr(_FIRST_PIXEL + brightness)


def _some(images: Images) -> Iterator[Images]:
    """The images, some at a time."""
    for begin in range(0, len(images.labels), _AT_ONCE):
        yield Images(*(array[begin : begin + _AT_ONCE] for array in images))


def _lines(images: Images) -> list[str]:
    """Lines of the table."""
    codes = images.pixels.reshape(len(images.labels), -1).astype("<u2") + np.array(_FIRST_PIXEL, "<u2")
    words = (row.tobytes().decode("utf-16-le") for row in codes)
    return [f"{word}\t{label}\n" for word, label in zip(words, images.labels, strict=True)]


def _read_idx_pair(directory: str, name: str) -> Images:
    pixels = _read_idx(Path(directory) / f"{name}-images-idx3-ubyte.gz", 3)
    labels = _read_idx(Path(directory) / f"{name}-labels-idx1-ubyte.gz", 1)
    if len(pixels) != len(labels) or pixels.shape[1] != pixels.shape[2]:
        raise UserError(
            f"{directory}: {name} has images {list(pixels.shape)} and {len(labels)} labels; allowed: square images, "
            "and as many labels"
        )
    if labels.max() >= _CLASSES:
        raise UserError(
            f"{directory}: {name} has the class {labels.max()} at image {int(labels.argmax())}; allowed: 0 to "
            f"{_CLASSES - 1}"
        )
    return Images(pixels, labels)


def _read_idx(path: Path, num_axes: int) -> np.ndarray:
    """The array of unsigned bytes in a compressed IDX file: two zeros, type, number of axes, sizes, values."""
    if not path.is_file():
        raise UserError(f"{path} is missing; --files is the directory that has it")
    try:
        data = gzip.decompress(read_file(str(path)))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    head = 4 + 4 * num_axes
    if len(data) < head or data[:4] != bytes((0, 0, _IDX_TYPE, num_axes)):
        raise UserError(f"{path} is no IDX file of bytes with {num_axes} axes")
    shape = np.frombuffer(data, ">u4", num_axes, 4).tolist()
    if not all(shape):
        raise UserError(f"{path}: its head says {shape}, which is empty; allowed: sizes of 1 or more")
    if len(data) - head != math.prod(shape):
        raise UserError(f"{path}: its head says {shape}, but {len(data) - head:,} bytes follow")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


def _read_cifar_batch(path: str) -> Images:
    """Records of a label and the values of an image."""
    record = 1 + 3 * _CIFAR_SIDE**2
    data = np.frombuffer(read_file(path), np.uint8)
    if not len(data) or len(data) % record:
        raise UserError(f"{path}: {len(data):,} bytes are no whole number of records of {record:,}")
    rows = data.reshape(-1, record)
    labels = rows[:, 0]
    if labels.max() >= _CLASSES:
        raise UserError(
            f"{path}: record {int(labels.argmax())} has the class {labels.max()}; allowed: 0 to {_CLASSES - 1}"
        )
    return Images(_grey(rows[:, 1:]), labels)


def _read_pickled_batch(path: str) -> Images:
    values, labels = read_cifar_pickle(path)
    return Images(_grey(values), np.array(labels, np.uint8))


def _grey(values: np.ndarray) -> np.ndarray:
    """[n, 32, 32] of the red, green and blue values of images, plane by plane: [n, 3072]."""
    planes = values.reshape(-1, 3, _CIFAR_SIDE, _CIFAR_SIDE)
    grey = np.empty((len(planes), _CIFAR_SIDE, _CIFAR_SIDE), np.uint8)
    for begin in range(0, len(planes), _AT_ONCE):  # floating-point copies of all images would take a gigabyte
        some = slice(begin, begin + _AT_ONCE)
        grey[some] = np.rint(np.tensordot(planes[some], _GREY, axes=(1, 0)))
    return grey
