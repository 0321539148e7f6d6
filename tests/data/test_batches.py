import itertools

import numpy as np
import pytest
from absl import flags

from darkformer_jax.data.batches import heldout_batches, num_rows, train_batches
from darkformer_jax.data.stream import MemoryStream, memory_stream
from darkformer_jax.data.tokenizers import BytesTokenizer
from darkformer_jax.errors import UserError


def counting_stream(num_tokens):
    """Token i is i; a document starts at every multiple of 10."""
    tokens = np.arange(num_tokens)
    return MemoryStream(tokens, tokens % 10 == 0, num_bytes=num_tokens, starts_are_targets=True)


def take(iterator, count):
    batches = list(itertools.islice(iterator, count))
    if hasattr(iterator, "close"):
        iterator.close()
    return batches


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def concatenated(parts):
    return [{name: np.concatenate([b[name] for b in group]) for name in group[0]} for group in zip(*parts, strict=True)]


def test_a_batch_by_hand_with_one_separator():
    stream = memory_stream(["abcd", "e", "fg"], BytesTokenizer())  # S a b c d S e S f g S
    (batch,) = heldout_batches(stream, batch_size=4, sequence_length=3)
    s = 256
    a, b, c, d, e, f, g = b"abcdefg"
    assert batch["inputs"].tolist() == [[s, a, b], [c, d, s], [e, s, f], [g, 0, 0]]
    assert batch["targets"].tolist() == [[a, b, c], [d, s, e], [s, f, g], [s, 0, 0]]
    # Row 1 begins inside the first document, row 2 inside the second, row 3 inside the third.
    assert batch["segment_ids"].tolist() == [[1, 1, 1], [1, 1, 2], [1, 2, 2], [1, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2], [0, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert batch["weights"].tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 0, 0]]
    dtypes = {name: array.dtype for name, array in batch.items()}
    assert dtypes.pop("weights") == np.float32
    assert set(dtypes.values()) == {np.dtype(np.int32)}


def test_what_follows_an_end_of_document_does_not_count():
    tokens = np.array([1, 7, 8, 2, 1, 9, 2, 1, 5, 2])  # bos = 1, eos = 2
    stream = MemoryStream(tokens, tokens == 1, num_bytes=4, starts_are_targets=False)
    (batch,) = heldout_batches(stream, batch_size=2, sequence_length=5)
    assert batch["inputs"].tolist() == [[1, 7, 8, 2, 1], [9, 2, 1, 5, 0]]
    assert batch["weights"].tolist() == [[1, 1, 1, 0, 1], [1, 0, 1, 1, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 2], [1, 1, 2, 2, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 0], [0, 1, 0, 1, 0]]


@pytest.mark.parametrize("num_tokens", [2, 3, 64, 65, 66, 200, 257])
def test_heldout_covers_every_target_once(num_tokens):
    batches = list(heldout_batches(counting_stream(num_tokens), batch_size=4, sequence_length=16))
    counted = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in batches])
    assert counted.tolist() == list(range(1, num_tokens))
    assert {batch["targets"].shape for batch in batches} == {(4, 16)}
    for batch in batches:
        assert np.array_equal(batch["segment_ids"] > 0, batch["weights"] > 0)


@pytest.mark.parametrize("process_count", [1, 2])
def test_a_short_evaluation_sees_rows_from_all_over_the_split(process_count):
    stream, options = counting_stream(16 * 40 + 1), {"batch_size": 4, "sequence_length": 16, "max_batches": 2}
    parts = [
        list(heldout_batches(stream, process_index=index, process_count=process_count, **options))
        for index in range(process_count)
    ]
    rows = [batch["inputs"][:, 0] // 16 for step in zip(*parts, strict=True) for batch in step]
    assert np.concatenate(rows).tolist() == [0, 5, 10, 15, 20, 25, 30, 35]


def test_heldout_weights_are_the_targets_of_bits_per_byte():
    stream = memory_stream(["caf\u00e9", "x" * 100], BytesTokenizer())
    weight = sum(b["weights"].sum() for b in heldout_batches(stream, batch_size=2, sequence_length=8))
    assert weight == stream.num_bytes + stream.num_documents == stream.num_tokens - 1


def test_an_epoch_covers_every_target_once_and_the_next_has_another_order():
    stream = counting_stream(1001)
    steps = num_rows(stream, 25) // 4
    assert steps * 4 == num_rows(stream, 25)
    batches = take(train_batches(stream, seed=3, batch_size=4, sequence_length=25), 2 * steps)
    epochs = [np.concatenate([b["targets"] for b in half]) for half in (batches[:steps], batches[steps:])]
    for epoch in epochs:
        assert sorted(epoch.ravel().tolist()) == list(range(1, 1001))
    assert not np.array_equal(*epochs)


def test_batches_are_a_function_of_seed_and_step():
    stream = counting_stream(1000)
    arguments = {"batch_size": 4, "sequence_length": 16}
    unbroken = take(train_batches(stream, seed=7, **arguments), 40)
    assert_same(take(train_batches(stream, seed=7, **arguments), 40), unbroken)
    for step in (1, 15, 33):  # 63 rows an epoch: batches 15 and 31 span two epochs
        assert_same(take(train_batches(stream, seed=7, start_step=step, **arguments), 40 - step), unbroken[step:])
    other = take(train_batches(stream, seed=8, **arguments), 40)
    assert not any(np.array_equal(a["inputs"], b["inputs"]) for a, b in zip(unbroken, other, strict=True))


def test_neighbouring_seeds_share_no_epoch():
    stream = counting_stream(641)
    epochs = [take(train_batches(stream, seed=seed, batch_size=64, sequence_length=10), 3) for seed in (0, 1)]
    orders = {tuple(batch["inputs"][:, 0].tolist()) for batch in epochs[0] + epochs[1]}
    assert len(orders) == 6


@pytest.mark.parametrize("process_count", [2, 4])
def test_any_number_of_processes_gives_the_same_global_batch(process_count):
    stream = counting_stream(1000)
    arguments = {"batch_size": 8, "sequence_length": 16}
    for make, extra, count in (
        (train_batches, {"seed": 1, "start_step": 5}, 12),
        (heldout_batches, {}, 8),
    ):
        one = take(make(stream, **extra, **arguments), count)
        parts = [
            take(make(stream, process_index=p, process_count=process_count, **extra, **arguments), count)
            for p in range(process_count)
        ]
        assert_same(concatenated(parts), one)


def test_batches_of_one_row_are_the_rows_of_larger_ones():
    stream, arguments = counting_stream(1000), {"seed": 1, "sequence_length": 16}
    rows = take(train_batches(stream, batch_size=1, **arguments), 8)
    assert_same(
        [{name: np.concatenate([row[name] for row in rows]) for name in rows[0]}],
        take(train_batches(stream, batch_size=8, **arguments), 1),
    )


def test_worker_processes_change_nothing():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    arguments = {"seed": 2, "batch_size": 4, "sequence_length": 16, "start_step": 3}
    stream = counting_stream(1000)
    here = take(train_batches(stream, num_workers=0, **arguments), 7)
    assert_same(take(train_batches(stream, num_workers=2, **arguments), 7), here)


def test_less_data_than_a_batch_repeats():
    stream = memory_stream(["abc"], BytesTokenizer())
    (batch,) = take(train_batches(stream, seed=0, batch_size=2, sequence_length=8), 1)
    assert batch["inputs"].tolist() == [[256, 97, 98, 99, 0, 0, 0, 0]] * 2
    assert batch["weights"].sum() == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 6, "process_count": 4}, "batch_size=6 is not a positive multiple of the 4 processes"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2, "seed": -1}, "seed=-1 is out of range"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        train_batches(counting_stream(100), **{"seed": 0, "sequence_length": 8, **arguments})
