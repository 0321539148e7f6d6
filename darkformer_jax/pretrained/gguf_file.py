"""GGUF files as a checkpoint with Hugging Face's names, layout and config.json: see `gguf_architectures`.

The package `gguf` dequantises arrays to float32 as they are read, some rows at a time.
"""

import functools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import gguf
import numpy as np

from darkformer_jax.data.tokenizers import Tokenizer
from darkformer_jax.errors import UserError, one_line
from darkformer_jax.pretrained.gguf_architectures import architecture_of
from darkformer_jax.pretrained.gguf_config import hf_config
from darkformer_jax.pretrained.gguf_header import TensorInfo, read_header
from darkformer_jax.pretrained.gguf_tokenizer import GGUFVocabulary
from darkformer_jax.pretrained.safetensors_files import StoredArray

_ROPE_FREQS = "rope_freqs.weight"  # states Llama 3.1's scaling
_READ_ERRORS = (EOFError, KeyError, OSError, OverflowError, RecursionError, ValueError)


class _Tensor(NamedTuple):
    """Where an array is in the file: shape[0] rows of `row_bytes` bytes each, from `offset` on."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    row_bytes: int


class GGUFFile:
    """One .gguf file. Only its header stays in memory, and nothing stays mapped.

    Raises:
      UserError: the file is truncated, damaged, split or of another architecture, or has a quantisation that the
        package cannot undo.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        metadata, tensors = _read_header(path)
        # The vocabulary is read again when it is needed; until then its strings would take memory that arrays need.
        self._metadata = {
            name: value
            for name, value in metadata.items()
            if not (name.startswith("tokenizer.") and isinstance(value, list))
        }
        self._architecture = architecture_of(self._metadata, path)
        rope_freqs = tensors.pop(_ROPE_FREQS, None)
        self._tensors = {self._architecture.hf_name(name, path): tensor for name, tensor in tensors.items()}
        self.arrays = {name: StoredArray(path, tensor.shape, "F32") for name, tensor in self._tensors.items()}
        factors = rope_freqs and self._rows(_ROPE_FREQS, rope_freqs, range(rope_freqs.shape[0]))
        self.config = hf_config(self._metadata, path, self.arrays, factors)

    def read(self, name: str, index: Sequence[slice]) -> np.ndarray:
        """A slice of an array, in float32. A slice of the rows of q or k must hold whole heads."""
        tensor = self._tensors[name]
        rows = range(*index[0].indices(tensor.shape[0]))
        values = self._architecture.as_hf(name, self._rows(name, tensor, rows), self.config.integer("head_dim"))
        return values[(slice(None), *index[1:])]

    def check_tokenizer(self) -> None:
        GGUFVocabulary(self._metadata, self.path)

    def tokenizer(self) -> Tokenizer:
        return GGUFVocabulary(_read_header(self.path)[0], self.path).tokenizer()

    def _rows(self, name: str, tensor: _Tensor, rows: range) -> np.ndarray:
        # One-dimensional arrays are never quantised: each element is a row.
        offset, count = tensor.offset + rows.start * tensor.row_bytes, len(rows) * tensor.row_bytes
        try:
            data = np.fromfile(self.path, np.uint8, count, offset=offset)
        except OSError as error:
            raise UserError(f"{self.path}: array {name} cannot be read: {error.strerror}") from error
        if data.size != count:
            raise UserError(f"{self.path}: truncated: array {name} ends past the end of the file")
        values = gguf.quants.dequantize(data.reshape(len(rows), tensor.row_bytes), tensor.kind)
        return values.reshape(len(rows), *tensor.shape[1:]).astype(np.float32, copy=False)


def _read_header(path: str) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """(metadata, array name -> its place). Raises UserError for a file that is not whole."""
    with open(path, "rb") as file:
        try:
            metadata, infos, start = read_header(file)
        except _READ_ERRORS as error:
            raise UserError(f"{path}: truncated, damaged or no GGUF file: {one_line(error)}") from error
    if metadata.get("split.count", 1) not in (0, 1):
        raise UserError(f"{path}: one of {metadata['split.count']} parts; merge them with llama.cpp's gguf-split first")
    size = os.path.getsize(path)
    return metadata, {info.name: _place(path, info, start, size) for info in infos}


@functools.cache
def _dequantises(kind: gguf.GGMLQuantizationType) -> bool:
    """Whether the package does: it has no list, so it is asked for one block of zeros."""
    block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    try:
        gguf.quants.dequantize(block, kind)
    except NotImplementedError:
        return False
    return True


def _place(path: str, info: TensorInfo, start: int, size: int) -> _Tensor:
    name, shape = info.name, info.shape
    try:
        quantisation = gguf.GGMLQuantizationType(info.kind)
    except ValueError as error:
        raise UserError(f"{path}: array {name} has the unknown quantisation {info.kind}") from error
    if not _dequantises(quantisation):
        allowed = ", ".join(kind.name for kind in gguf.GGMLQuantizationType if _dequantises(kind))
        raise UserError(f"{path}: array {name} is {quantisation.name}; allowed: {allowed}")
    block, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
    row = math.prod(shape[1:])
    if row % block or len(shape) not in (1, 2):
        raise UserError(f"{path}: array {name} has shape {list(shape)}, which {quantisation.name} cannot hold")
    row_bytes = row // block * block_bytes
    end = start + info.offset + shape[0] * row_bytes
    if end > size:
        raise UserError(f"{path}: truncated: array {name} ends at byte {end:,}, the file has {size:,}")
    return _Tensor(quantisation, shape, start + info.offset, row_bytes)
