"""Reads and writes safetensors, one file or several with an index, one slice or array at a time.

The package `safetensors` reads the arrays. Headers are read by hand because the package does not say which array of a
file is cut off or has a wrong size. Files are written by hand because it takes all arrays of a file at once.
"""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from darkformer_jax.data.files import read_json_object, write_json
from darkformer_jax.errors import UserError, one_line

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_READABLE = DTYPES | {"U32": np.dtype(np.uint32)}  # U32: the key data of a mechanism's noise
_MAX_HEADER = 100_000_000  # bytes; the format's own limit


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """What a header says about one array. `dtype` is the format's name: F32, BF16, ..."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class SafetensorsFiles:
    """The arrays of `<stem>.safetensors`, or of the files that `<stem>.safetensors.index.json` lists.

    At first, only headers are read and checked against the files' sizes.

    Raises:
      UserError: a file or shard is missing, is truncated or is no safetensors file, or an array is absent or present
        twice. The message names the file and the array.
    """

    def __init__(self, directory: str, stem: str = "model") -> None:
        self.directory = directory
        index = os.path.join(directory, f"{stem}.safetensors.index.json")
        single = os.path.join(directory, f"{stem}.safetensors")
        self.arrays: dict[str, StoredArray] = {}
        if os.path.isfile(single):
            self._add(single)
        elif os.path.isfile(index):
            self._add_shards(index)
        else:
            raise UserError(f"{directory} holds no {stem}.safetensors{_pickles(directory)}")

    def read(self, name: str, index: Sequence[slice]) -> np.ndarray:
        """A slice of an array, read from the disk and owned by the caller.

        Raises:
          UserError: the dtype cannot be read, or the file has changed meanwhile.
        """
        array = self.arrays[name]
        if array.dtype not in _READABLE:
            raise UserError(f"{array.file}: array {name} is {array.dtype}; allowed: {', '.join(DTYPES)}")
        try:
            # It is closed each time, because the pages of a mapped file count as this process's memory.
            with safetensors.safe_open(array.file, framework="numpy") as file:
                piece = file.get_slice(name)
                return piece[tuple(index)] if array.shape else file.get_tensor(name)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{array.file}: array {name} cannot be read: {one_line(error)}") from error

    def _add(self, file: str) -> dict[str, StoredArray]:
        found = dict(_read_header(file))
        for name in found.keys() & self.arrays.keys():
            raise UserError(f"{file}: array {name} is in {os.path.basename(self.arrays[name].file)}, too")
        self.arrays |= found
        return found

    def _add_shards(self, index: str) -> None:
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{index}: weight_map must be an object of array names and file names")
        for file in sorted(set(weight_map.values())):
            listed = sorted(name for name in weight_map if weight_map[name] == file)
            path = os.path.join(self.directory, file)
            if os.path.basename(file) != file:
                raise UserError(f"{index}: {file!r} is not the name of a file beside it")
            if not os.path.isfile(path):
                raise UserError(f"{path} is missing; it should hold {listed[0]} and {len(listed) - 1} more arrays")
            absent = sorted(set(listed) - self._add(path).keys())
            if absent:
                raise UserError(f"{path}: array {absent[0]} is missing, which {os.path.basename(index)} lists there")


def _read_header(path: str) -> Iterator[tuple[str, StoredArray]]:
    """Yields the name and the header entry of each array."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if length > min(size - 8, _MAX_HEADER):
                raise UserError(f"{path}: truncated, or no safetensors file: its header does not fit its {size} bytes")
            header = json.loads(file.read(length), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: damaged, or no safetensors file: its header is not JSON: {one_line(error)}"
        ) from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: damaged, or no safetensors file: its header is not an object")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        yield name, _checked_entry(path, name, entry, size - 8 - length)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _checked_entry(path: str, name: str, entry: Any, data_bytes: int) -> StoredArray:
    try:
        shape, dtype = tuple(map(int, entry["shape"])), str(entry["dtype"])
        begin, end = map(int, entry["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: array {name} has no shape, dtype and data_offsets in the header") from error
    if end > data_bytes:
        raise UserError(f"{path}: truncated: array {name} ends at byte {end:,} of the data, which has {data_bytes:,}")
    known = _READABLE.get(dtype)
    if begin < 0 or min(shape, default=0) < 0 or (known and end - begin != math.prod(shape) * known.itemsize):
        raise UserError(f"{path}: array {name} has {end - begin} bytes, which is not {dtype}{list(shape)}")
    return StoredArray(path, shape, dtype)


@dataclasses.dataclass(frozen=True)
class ArrayToWrite:
    """An array that `write_safetensors` asks for when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def shard(arrays: Iterable[ArrayToWrite], max_bytes: int) -> list[list[ArrayToWrite]]:
    """The arrays in their order, in groups of at most `max_bytes`. A larger array has a group of its own."""
    shards: list[list[ArrayToWrite]] = []
    size = 0
    for array in arrays:
        if not shards or size + array.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(array)
        size += array.nbytes
    return shards


def write_safetensors(
    directory: Path, stem: str, shards: Sequence[Sequence[ArrayToWrite]], values: Iterable[np.ndarray]
) -> None:
    """Writes `<stem>.safetensors`, or the files of several shards and their index.

    Args:
      values: the arrays in the order of the shards, each dropped once it is written.

    Raises:
      UserError: the disk is full, or the directory cannot be written.
    """
    count = len(shards)
    names = [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    if count == 1:
        names = [f"{stem}.safetensors"]
    stream = iter(values)
    try:
        for name, arrays in zip(names, shards, strict=True):
            _write_file(directory / name, arrays, stream)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or directory}: {error.strerror}") from error
    if count > 1:
        total = sum(array.nbytes for arrays in shards for array in arrays)
        weight_map = {array.name: name for name, arrays in zip(names, shards, strict=True) for array in arrays}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / f"{stem}.safetensors.index.json", index)


def _write_file(path: Path, arrays: Sequence[ArrayToWrite], values: Iterator[np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    end = 0
    for array in arrays:
        begin, end = end, end + array.nbytes
        header[array.name] = {
            "dtype": next(name for name, dtype in _READABLE.items() if dtype == array.dtype),
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays:
            value = np.ascontiguousarray(next(values))
            if value.shape != array.shape or value.dtype != array.dtype:
                raise ValueError(f"{array.name}: {value.dtype}{value.shape}, expected {array.dtype}{array.shape}")
            file.write(value.reshape(-1).view(np.uint8).data)


def _pickles(directory: str) -> str:
    pickled = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")
    found = [name for name in pickled if os.path.isfile(os.path.join(directory, name))]
    return f"; {found[0]} is pickled Python, which is never read" if found else ""
