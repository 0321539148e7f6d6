"""Token streams in ArrayRecord files.

A record holds RECORD_TOKENS consecutive tokens of its split, as little-endian uint16 or uint32; the split's last record
holds the rest. After the tokens come the places in the record where documents start, as uint16. Shards are consecutive
runs of records: a division finds any token, so the training sequence length stays free.

The manifest has each shard's SHA-256, because ArrayRecord finds damage only when it reads the damaged record.
"""

import dataclasses
import hashlib
import os
from concurrent import futures
from typing import Any

import grain
import numpy as np
from array_record.python import array_record_module

from darkformer_jax.data.stream import TokenStream, token_dtype
from darkformer_jax.errors import UserError

RECORD_TOKENS = 2048

_START_DTYPE = np.dtype("<u2")
_WRITER_OPTIONS = "group_size:1,zstd:1"  # groups of one record: random access decompresses nothing else
_HASH_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file of a prepared directory: its name, number of records and SHA-256 (hexadecimal)."""

    file: str
    num_records: int
    sha256: str


class RecordWriter:
    """Writes one split as shards `<split>-00000.array_record`, ... of a directory.

    Args:
      directory: where they go.
      split: "train" or "heldout".
      vocab_size: decides the width of a token.
      shard_tokens: tokens per shard, rounded up to whole records.

    Attributes:
      shards: the finished ones.
    """

    def __init__(self, directory: str, split: str, vocab_size: int, shard_tokens: int) -> None:
        self._path = os.path.join(directory, split)
        self._dtype = token_dtype(vocab_size)
        self._records_per_shard = -(-shard_tokens // RECORD_TOKENS)
        self._rest = np.empty(0, self._dtype), np.empty(0, np.bool_)  # not yet a full record
        self._writer: Any = None
        self._file = ""
        self._num_records = 0  # of the open shard
        self.shards: list[Shard] = []

    def append(self, tokens: np.ndarray, is_start: np.ndarray) -> None:
        """Adds tokens [n] and whether each begins a document [n]."""
        tokens, is_start = (np.concatenate(pair) for pair in zip(self._rest, (tokens, is_start), strict=True))
        whole = len(tokens) - len(tokens) % RECORD_TOKENS
        self._rest = tokens[whole:].copy(), is_start[whole:].copy()
        self._write(tokens[:whole], is_start[:whole])

    def close(self) -> None:
        """Writes what is left and finishes the last shard."""
        self._write(*self._rest)
        self._close_shard()

    def _write(self, tokens: np.ndarray, is_start: np.ndarray) -> None:
        for begin in range(0, len(tokens), RECORD_TOKENS):
            record = slice(begin, begin + RECORD_TOKENS)
            starts = np.flatnonzero(is_start[record]).astype(_START_DTYPE)
            data = tokens[record].astype(self._dtype).tobytes() + starts.tobytes()
            try:
                if self._writer is None:
                    self._file = f"{self._path}-{len(self.shards):05d}.array_record"
                    self._writer = array_record_module.ArrayRecordWriter(self._file, _WRITER_OPTIONS)
                self._writer.write(data)
            except RuntimeError as error:
                raise UserError(f"cannot write {self._file}: {error}") from error
            self._num_records += 1
            if self._num_records == self._records_per_shard:
                self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
            self.shards.append(Shard(os.path.basename(self._file), self._num_records, _file_sha256(self._file)))
        except (RuntimeError, OSError) as error:
            raise UserError(f"cannot write {self._file}: {error}") from error
        self._writer, self._num_records = None, 0


class RecordStream(TokenStream):
    """A token stream over the shards of one split. It can be pickled for worker processes.

    Args:
      directory: where the shards are.
      shards: in order.
      vocab_size: decides the width of a token.
      attributes: the TokenStream's, except `fingerprint`, which is computed from the shards' hashes.
    """

    def __init__(self, directory: str, shards: list[Shard], vocab_size: int, **attributes: Any) -> None:
        hashes = "".join(shard.sha256 for shard in shards)
        super().__init__(**attributes, fingerprint=hashlib.sha256(hashes.encode()).hexdigest())
        self._dtype = token_dtype(vocab_size)
        # A path that ends in its range of records is not opened before it is read.
        paths = [f"{os.path.join(directory, shard.file)}[0:{shard.num_records}]" for shard in shards]
        self._records = grain.sources.ArrayRecordDataSource(paths)

    def _at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        of_position = positions // RECORD_TOKENS
        # Neighbours are mostly in one record, so a record is noted only where it changes.
        changes = np.diff(of_position, axis=1, prepend=-1) != 0
        records = np.unique(of_position[changes])
        tokens, is_start = self._decode(records)
        slot = np.searchsorted(records, of_position)
        offset = positions - of_position * RECORD_TOKENS
        return tokens[slot, offset], is_start[slot, offset]

    def _decode(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and document starts of record numbers [R], each [R, RECORD_TOKENS]."""
        tokens = np.zeros((len(records), RECORD_TOKENS), self._dtype)
        is_start = np.zeros((len(records), RECORD_TOKENS), np.bool_)
        for row, (record, data) in enumerate(zip(records, self._records.__getitems__(records), strict=True)):
            count = min(RECORD_TOKENS, self.num_tokens - int(record) * RECORD_TOKENS)
            tokens[row, :count] = np.frombuffer(data, self._dtype, count)
            is_start[row, np.frombuffer(data, _START_DTYPE, offset=count * self._dtype.itemsize)] = True
        return tokens, is_start


def _file_sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_shards(directory: str, shards: list[Shard]) -> None:
    """Raises UserError, which names the first shard that is missing or whose bytes have changed."""

    def problem(shard: Shard) -> str:
        path = os.path.join(directory, shard.file)
        try:
            found = _file_sha256(path)
        except OSError as error:
            return f"cannot read shard {path}: {error.strerror}"
        if found != shard.sha256:
            return f"shard {path} is damaged: its SHA-256 is {found[:12]}..., the manifest says {shard.sha256[:12]}..."
        return ""

    with futures.ThreadPoolExecutor(_HASH_THREADS) as pool:
        for message in pool.map(problem, shards):
            if message:
                raise UserError(message)
