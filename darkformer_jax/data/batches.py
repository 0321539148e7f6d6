"""From rows to batches, and from a token stream to rows of next-token prediction.

Row i of a stream predicts tokens i*L + 1 .. i*L + L from tokens i*L .. i*L + L - 1. Rows 0 .. num_rows - 1 together
predict every token but the stream's first exactly once. A batch is a pure function of (seed, step).
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from darkformer_jax.data.mixture import Mixture, Split, mixed_rows
from darkformer_jax.data.stream import TokenStream
from darkformer_jax.errors import UserError

Batch = dict[str, np.ndarray]
ReadRows = Callable[[np.ndarray], Batch]  # row numbers [n] -> their batch; rows past the last one are padding

_READ_THREADS = 4
_PREFETCHED_BATCHES = 16


def num_rows(stream: TokenStream, sequence_length: int) -> int:
    """Rows of `sequence_length` targets that cover the stream; the last one may be partly padding."""
    return max(1, -(-(stream.num_tokens - 1) // sequence_length))


def make_batch(stream: TokenStream, sequence_length: int, rows: np.ndarray) -> Batch:
    """The batch of the given rows; rows past the stream's end are padding.

    Args:
      stream: the split.
      sequence_length: L.
      rows: [B] row numbers.

    Returns:
      Arrays [B, L]: inputs and targets (int32 ids), segment_ids (int32; the row's documents counted from 1, 0 =
      padding), positions (int32; from 0 at the start of the row and of each document), weights (float32; 1 = the
      target counts in the loss).
    """
    starts = rows.astype(np.int64) * sequence_length
    tokens, is_start = stream.read(starts, sequence_length + 1)
    column = np.arange(sequence_length, dtype=np.int32)
    has_target = starts[:, None] + column + 1 < stream.num_tokens

    begins = is_start[:, :-1].copy()
    begins[:, 0] = True  # a document that the row's start cuts begins again
    segment_ids = np.cumsum(begins, axis=1, dtype=np.int32)
    positions = column - np.maximum.accumulate(np.where(begins, column, 0), axis=1)
    counts = has_target & stream.are_targets(starts + 1, is_start[:, 1:])
    return {
        "inputs": np.where(has_target, tokens[:, :-1], 0),
        "targets": np.where(has_target, tokens[:, 1:], 0),
        "segment_ids": np.where(has_target, segment_ids, 0),
        "positions": np.where(has_target, positions, 0),
        "weights": counts.astype(np.float32),
    }


class MixedRows:
    """The rows of several streams, numbered stream by stream; rows past the last one are padding.

    Args:
      streams: the sources' streams.
      sequence_length: L.

    Attributes:
      totals: rows of each stream.
    """

    def __init__(self, streams: Sequence[TokenStream], sequence_length: int) -> None:
        self._streams, self._sequence_length = streams, sequence_length
        self.totals = [num_rows(stream, sequence_length) for stream in streams]
        self._ends = np.cumsum(self.totals)

    def sources(self, rows: np.ndarray) -> np.ndarray:
        """The number of the source of each row [B]."""
        return np.minimum(np.searchsorted(self._ends, rows, side="right"), len(self._streams) - 1)

    def read(self, rows: np.ndarray) -> Batch:
        """`make_batch` of the rows [B], each from its own stream."""
        sources = self.sources(rows)
        batch: Batch = {}
        for source in np.unique(sources):
            places = np.flatnonzero(sources == source)
            own = rows[places] - (self._ends[source] - self.totals[source])
            for name, values in make_batch(self._streams[source], self._sequence_length, own).items():
                batch.setdefault(name, np.zeros((len(rows), *values.shape[1:]), values.dtype))[places] = values
        return batch

    def read_with_source(self, rows: np.ndarray) -> Batch:
        """`read`, and in `source` [B] (int32) the number of each row's source."""
        return self.read(rows) | {"source": self.sources(rows).astype(np.int32)}


def train_batches(
    split: Split,
    *,
    seed: int,
    batch_size: int,
    sequence_length: int,
    start_step: int = 0,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Endless training batches of rows of `sequence_length` tokens, as in `shuffled_batches`.

    Of a mixture, the rows are `mixed_rows`: every source has its own epochs.
    """
    _check_seed(seed)
    if isinstance(split, Mixture):
        mixed = MixedRows(split.streams, sequence_length)
        read, rows = mixed.read, mixed_rows(mixed.totals, split.weights, seed)
    else:
        read = functools.partial(make_batch, split, sequence_length)
        rows = _shuffled_rows(num_rows(split, sequence_length), seed)
    return _batches_of(
        rows,
        read,
        batch_size=batch_size,
        start_step=start_step,
        num_workers=num_workers,
        process_index=process_index,
        process_count=process_count,
    )


def heldout_batches(
    split: Split,
    *,
    batch_size: int,
    sequence_length: int,
    max_batches: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """`ordered_batches` of the split's rows, `sequence_length` tokens each: every target once.

    Batches of a mixture have `source` [B], the number of each row's source.
    """
    if isinstance(split, Mixture):
        mixed = MixedRows(split.streams, sequence_length)
        read, total = mixed.read_with_source, sum(mixed.totals)
    else:
        read, total = functools.partial(make_batch, split, sequence_length), num_rows(split, sequence_length)
    return ordered_batches(
        read,
        total,
        batch_size=batch_size,
        max_batches=max_batches,
        process_index=process_index,
        process_count=process_count,
    )


def shuffled_batches(
    read: ReadRows,
    total: int,
    *,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Endless training batches from `start_step` on, every epoch in another order.

    Step s reads the rows s*B .. (s+1)*B - 1 of the shuffled, repeated row numbers. Process p of P gets the p-th
    contiguous part of these rows, so all parts concatenated are the same for every P.

    Args:
      read: row numbers [n] -> their batch; must be picklable if there are workers.
      total: rows per epoch.
      seed: of the order, 0 .. 2**32 - 1.
      batch_size: B, over all processes.
      start_step: the step of the first batch; resuming needs nothing else.
      num_workers: worker processes; 0 = threads of this process. Absl flags must be parsed for workers to start.
      process_index, process_count: p and P of this host.

    Raises:
      UserError: a batch size that the processes do not divide, a seed out of range.
    """
    _check_seed(seed)
    return _batches_of(
        _shuffled_rows(total, seed),
        read,
        batch_size=batch_size,
        start_step=start_step,
        num_workers=num_workers,
        process_index=process_index,
        process_count=process_count,
    )


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} is out of range; allowed: 0 to {2**32 - 1}")


def _shuffled_rows(total: int, seed: int) -> grain.MapDataset:
    # `.seed` hashes the seed. `.shuffle(seed)` adds the epoch to the seed as it is: the second epoch of seed 0 would be
    # the first epoch of seed 1.
    return grain.MapDataset.range(total).seed(seed).shuffle().repeat()


def _batches_of(
    rows: grain.MapDataset,
    read: ReadRows,
    *,
    batch_size: int,
    start_step: int,
    num_workers: int,
    process_index: int,
    process_count: int,
) -> Iterator[Batch]:
    """Step s reads the row numbers s*B .. (s+1)*B - 1 of the endless `rows`; see `shuffled_batches`."""
    # Endless rows leave no remainder. But without drop_remainder grain rounds their length up, and for batches of one
    # row the result is more than sys.maxsize.
    batches = rows.batch(_local_size(batch_size, process_count), drop_remainder=True)
    batches = batches[process_index::process_count][start_step:]
    read_options = grain.ReadOptions(num_threads=_READ_THREADS, prefetch_buffer_size=_PREFETCHED_BATCHES)
    dataset = batches.map(read).to_iter_dataset(read_options)
    if num_workers:
        options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(options)
    return iter(dataset)


def ordered_batches(
    read: ReadRows,
    total: int,
    *,
    batch_size: int,
    max_batches: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """The rows in order, each once; the last batch is filled up with rows from `total` on, which `read` pads.

    With `max_batches`, the rows that are read are spread evenly, so a short evaluation sees every part of the split.

    Args:
      read, total, process_index, process_count: as in `shuffled_batches`.
      batch_size: B, over all processes.
      max_batches: most batches to read; 0 = all.
    """
    local_size = _local_size(batch_size, process_count)
    num_batches = -(-total // batch_size)
    if 0 < max_batches < num_batches:
        num_batches = max_batches
        rows = np.arange(num_batches * batch_size) * total // (num_batches * batch_size)
    else:
        rows = np.arange(num_batches * batch_size)
    for batch in rows.reshape(num_batches, process_count, local_size):
        yield read(batch[process_index])


def _local_size(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch_size={batch_size} is not a positive multiple of the {process_count} processes")
    return batch_size // process_count
