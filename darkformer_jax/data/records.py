"""Token streams in ArrayRecord files.

A record holds RECORD_TOKENS consecutive tokens of its split (the split's last record what is left), little-endian
uint16 or uint32, followed by the places in the record, uint16, at which documents start. Shards are consecutive runs of
records, so any range of tokens is found by division, and the training sequence length stays free.
"""

import dataclasses
import hashlib
import os
import threading
from concurrent import futures
from typing import Any

import numpy as np
from array_record.python import array_record_module

from darkformer_jax.data.stream import token_dtype
from darkformer_jax.errors import UserError

RECORD_TOKENS = 2048

_START_DTYPE = np.dtype("<u2")
_WRITER_OPTIONS = "group_size:1,zstd:1"  # groups of one record: random access decompresses nothing else
_READER_OPTIONS = "readahead_buffer_size:0"
_READER_BUFFER_BYTES = 1 << 15
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
      directory: where.
      split: "train" or "heldout".
      vocab_size: decides the width of a token.
      shard_tokens: tokens a shard, rounded up to whole records.
    """

    def __init__(self, directory: str, split: str, vocab_size: int, shard_tokens: int) -> None:
        self._directory = directory
        self._split = split
        self._dtype = token_dtype(vocab_size)
        self._records_per_shard = -(-shard_tokens // RECORD_TOKENS)
        self._tokens: list[np.ndarray] = []  # not yet a full record
        self._is_start: list[np.ndarray] = []
        self._buffered = 0
        self._writer: Any = None
        self._file = ""
        self._num_records = 0  # of the open shard
        self.files: list[str] = []  # of every shard begun
        self.shards: list[Shard] = []  # closed

    def append(self, tokens: np.ndarray, is_start: np.ndarray) -> None:
        """Adds tokens [n] and whether each begins a document [n]."""
        self._tokens.append(tokens)
        self._is_start.append(is_start)
        self._buffered += len(tokens)
        if self._buffered >= RECORD_TOKENS:
            self._flush(self._buffered - self._buffered % RECORD_TOKENS)

    def close(self) -> None:
        """Writes what is left and finishes the last shard."""
        self._flush(self._buffered)
        self._close_shard()

    def _flush(self, count: int) -> None:
        tokens, is_start = np.concatenate(self._tokens), np.concatenate(self._is_start)
        for begin in range(0, count, RECORD_TOKENS):
            record = slice(begin, min(begin + RECORD_TOKENS, count))
            starts = np.flatnonzero(is_start[record]).astype(_START_DTYPE)
            self._write(tokens[record].astype(self._dtype).tobytes() + starts.tobytes())
        self._tokens, self._is_start = [tokens[count:].copy()], [is_start[count:].copy()]
        self._buffered -= count

    def _write(self, record: bytes) -> None:
        try:
            if self._writer is None:
                self._file = f"{self._split}-{len(self.shards):05d}.array_record"
                self.files.append(self._file)
                self._writer = array_record_module.ArrayRecordWriter(self._path(), _WRITER_OPTIONS)
            self._writer.write(record)
        except RuntimeError as error:
            raise UserError(f"cannot write {self._path()}: {error}") from error
        self._num_records += 1
        if self._num_records == self._records_per_shard:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
            self._writer = None
            self.shards.append(Shard(self._file, self._num_records, file_sha256(self._path())))
        except (RuntimeError, OSError) as error:
            raise UserError(f"cannot write {self._path()}: {error}") from error
        self._num_records = 0

    def _path(self) -> str:
        return os.path.join(self._directory, self._file)


class RecordStream:
    """A token stream (see TokenStream) over the shards of one split; may be sent to worker processes.

    Args:
      directory: where the shards lie.
      shards: in order.
      vocab_size: decides the width of a token.
      num_tokens, num_documents, num_bytes, starts_are_targets: see TokenStream. `fingerprint` is the shards'.
    """

    def __init__(
        self,
        directory: str,
        shards: list[Shard],
        *,
        vocab_size: int,
        num_tokens: int,
        num_documents: int,
        num_bytes: int,
        starts_are_targets: bool,
    ) -> None:
        self._paths = [os.path.join(directory, shard.file) for shard in shards]
        self._first_records = np.cumsum([0] + [shard.num_records for shard in shards])
        self._dtype = token_dtype(vocab_size)
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()
        self.num_tokens = num_tokens
        self.num_documents = num_documents
        self.num_bytes = num_bytes
        self.starts_are_targets = starts_are_targets
        self.fingerprint = hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()

    def read(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        positions = starts[:, None] + np.arange(length)
        inside = positions < self.num_tokens
        positions = np.minimum(positions, self.num_tokens - 1)
        of_position = positions // RECORD_TOKENS
        # Neighbours are mostly in one record: only the first position in each names it.
        changes = np.diff(of_position, axis=1, prepend=-1) != 0
        records = np.unique(of_position[changes])
        tokens, is_start = self._decode(records)
        slot = np.searchsorted(records, of_position)
        offset = positions - of_position * RECORD_TOKENS
        return np.where(inside, tokens[slot, offset], 0).astype(np.int32), is_start[slot, offset] & inside

    def _decode(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and document starts of sorted record numbers [R], each [R, RECORD_TOKENS]."""
        tokens = np.zeros((len(records), RECORD_TOKENS), self._dtype)
        is_start = np.zeros((len(records), RECORD_TOKENS), np.bool_)
        for row, (record, data) in enumerate(zip(records, self._fetch(records), strict=True)):
            count = min(RECORD_TOKENS, self.num_tokens - int(record) * RECORD_TOKENS)
            tokens[row, :count] = np.frombuffer(data, self._dtype, count)
            is_start[row, np.frombuffer(data, _START_DTYPE, offset=count * self._dtype.itemsize)] = True
        return tokens, is_start

    def _fetch(self, records: np.ndarray) -> list[bytes]:
        shards = np.searchsorted(self._first_records, records, side="right") - 1
        data: list[bytes] = []
        for shard in np.unique(shards):
            data += self._reader(int(shard)).read((records[shards == shard] - self._first_records[shard]).tolist())
        return data

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if shard not in self._readers:
                self._readers[shard] = array_record_module.ArrayRecordReader(
                    self._paths[shard], options=_READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER_BYTES
                )
            return self._readers[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_readers", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _readers={}, _lock=threading.Lock())


def file_sha256(path: str) -> str:
    """SHA-256 (hexadecimal) of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_shards(directory: str, shards: list[Shard]) -> None:
    """Raises UserError naming the first shard that is missing or whose bytes are not those that were written."""

    def problem(shard: Shard) -> str:
        path = os.path.join(directory, shard.file)
        try:
            found = file_sha256(path)
        except OSError as error:
            return f"cannot read shard {path}: {error.strerror}"
        if found != shard.sha256:
            return f"shard {path} is damaged: its SHA-256 is {found[:12]}..., the manifest says {shard.sha256[:12]}..."
        return ""

    with futures.ThreadPoolExecutor(_HASH_THREADS) as pool:
        for message in pool.map(problem, shards):
            if message:
                raise UserError(message)
