"""Several sources with weights: shares of rows, epochs of each source, resuming, processes, and what is refused."""

import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
from absl import flags

from darkformer_jax.data import Mixture, load_data
from darkformer_jax.data.batches import heldout_batches, num_rows, train_batches
from darkformer_jax.data.mixture import Shares, whole_weights
from darkformer_jax.data.prepared import prepare
from darkformer_jax.data.stream import MemoryStream
from darkformer_jax.errors import UserError

LENGTH = 16
SOURCE = 1 << 20  # token t of source i is i * SOURCE + t


def counting_stream(source, num_tokens):
    tokens = source * SOURCE + np.arange(num_tokens)
    return MemoryStream(tokens, np.arange(num_tokens) % 10 == 0, num_bytes=num_tokens, starts_are_targets=True)


def mixture(*weights, sizes=(320, 1600, 95)):
    streams = tuple(counting_stream(i, size) for i, size in zip(range(len(weights)), sizes, strict=False))
    return Mixture(tuple("abc"[: len(weights)]), streams, whole_weights([Fraction(weight) for weight in weights]))


def take(iterator, count):
    batches = list(itertools.islice(iterator, count))
    if hasattr(iterator, "close"):
        iterator.close()
    return batches


def training(mixed, count, **options):
    return take(train_batches(mixed, **{"seed": 3, "batch_size": 4, "sequence_length": LENGTH} | options), count)


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def rows_of(batches):
    """(source, row in it) of all rows, in order."""
    first = np.concatenate([batch["inputs"][:, 0] for batch in batches])
    return list(zip((first // SOURCE).tolist(), (first % SOURCE // LENGTH).tolist(), strict=True))


@pytest.mark.parametrize(
    ("weights", "most"),
    [
        (("0.7", "0.3"), 0.5),
        (("1", "1"), 0.5),
        (("0.001", "12.5"), 0.5),
        (("1", "1", "1"), 1),
        (("0.5", "0.25", "0.25"), 1),
        (("3", "1e-2", "17"), 1),
        (("5", "4", "3", "2", "1", "0.1"), 2),
    ],
)
def test_after_any_number_of_rows_every_source_has_had_its_share(weights, most):
    exact = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    shares, counts = Shares(whole_weights([Fraction(weight) for weight in weights])), [0] * len(weights)
    for row in range(3000):
        source, before = shares[row]
        assert before == counts[source]  # its rows come in their order, each once
        counts[source] += 1
        assert all(abs(count - (row + 1) * share) <= most for count, share in zip(counts, exact, strict=True))
    assert shares[10**30][1] <= 10**30


def test_weights_are_proportions():
    tenths, ratio = (whole_weights([Fraction(weight) for weight in pair]) for pair in (("0.7", "0.3"), ("14", "6")))
    assert tenths == ratio == (7, 3)
    assert_same(training(mixture("0.7", "0.3"), 9), training(mixture("70", "30"), 9))


def test_rows_have_the_shares_of_the_weights():
    rows = rows_of(training(mixture("0.7", "0.3"), 50, batch_size=10))
    for batch in range(50):
        sources = [source for source, _ in rows[10 * batch : 10 * batch + 10]]
        assert sources.count(0) == 7


def test_each_source_has_epochs_of_its_own():
    mixed = mixture("0.5", "0.25", "0.25")
    rows, totals = rows_of(training(mixed, 150)), [num_rows(stream, LENGTH) for stream in mixed.streams]
    assert totals == [20, 100, 6]
    for source, total in enumerate(totals):
        own = [row for number, row in rows if number == source]
        epochs = [own[begin : begin + total] for begin in range(0, len(own) - total + 1, total)]
        assert len(epochs) == (15, 1, 25)[source]  # the smallest source does not end the others' first epoch
        assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
        assert len(epochs) == 1 or epochs[0] != epochs[1]


def test_sources_of_one_size_have_different_orders_and_a_seed_has_its_own():
    mixed = mixture("1", "1", sizes=(1600, 1600))
    rows = {seed: rows_of(training(mixed, 50, seed=seed)) for seed in (0, 1)}
    orders = {tuple(row for number, row in rows[seed] if number == source) for seed in rows for source in (0, 1)}
    assert len(orders) == 4
    assert len({tuple(number for number, _ in rows[seed]) for seed in rows}) == 1  # only the weights decide the source


def test_a_row_of_a_mixture_is_the_row_of_its_source():
    mixed = mixture("2", "1", "1")
    batches = training(mixed, 30)
    for batch in batches:
        for place, (source, row) in enumerate(rows_of([batch])):
            (own,) = heldout_rows(mixed.streams[source], row)
            for name in batch:
                np.testing.assert_array_equal(batch[name][place], own[name][0])
    assert any((batch["weights"] == 0).any() for batch in batches)  # the last row of a source is padded


def heldout_rows(stream, row):
    batches = heldout_batches(stream, batch_size=1, sequence_length=LENGTH)
    return [batch for number, batch in enumerate(batches) if number == row]


def test_batches_are_a_function_of_seed_and_step():
    mixed = mixture("0.7", "0.2", "0.1")
    unbroken, other = training(mixed, 60), training(mixed, 60, seed=4)
    for step in (1, 17, 42):
        assert_same(training(mixed, 60 - step, start_step=step), unbroken[step:])
    assert not any(np.array_equal(a["inputs"], b["inputs"]) for a, b in zip(unbroken, other, strict=True))


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_processes_gives_the_same_global_batch(count):
    mixed = mixture("0.7", "0.2", "0.1")
    one = training(mixed, 25, start_step=5)
    parts = [training(mixed, 25, start_step=5, process_index=p, process_count=count) for p in range(count)]
    steps = zip(*parts, strict=True)
    assert_same([{name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in steps], one)


def test_worker_processes_change_nothing():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    mixed = mixture("0.7", "0.2", "0.1")
    assert_same(training(mixed, 9, num_workers=2, start_step=3), training(mixed, 9, start_step=3))


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_held_out_data_is_read_once_whatever_the_weights(batch_size):
    batches = list(heldout_batches(mixture("9", "1", "1"), batch_size=batch_size, sequence_length=LENGTH))
    counted = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in batches])
    wanted = [source * SOURCE + np.arange(1, size) for source, size in enumerate((320, 1600, 95))]
    np.testing.assert_array_equal(counted, np.concatenate(wanted))
    for batch in batches:
        of_row = batch["source"][:, None]
        assert batch["source"].dtype == np.int32
        assert (batch["targets"] // SOURCE == of_row)[batch["weights"] > 0].all()


def test_a_mixture_is_read_as_its_sources_end_to_end():
    mixed = mixture("1", "1", "1", sizes=(7, 30, 12))
    whole = MemoryStream(
        np.concatenate([source * SOURCE + np.arange(size) for source, size in enumerate((7, 30, 12))]),
        np.concatenate([np.arange(size) % 10 == 0 for size in (7, 30, 12)]),
        num_bytes=49,
        starts_are_targets=True,
    )
    for length in (1, 5, 49, 60):
        starts = np.array([0, 3, 6, 7, 36, 37, 48, 49, 100])
        for found, wanted in zip(mixed.read(starts, length), whole.read(starts, length), strict=True):
            np.testing.assert_array_equal(found, wanted)
            assert found.dtype == wanted.dtype


def write(path, word, count=80):
    path.write_text("".join(json.dumps({"text": f"{word} {i} " * 5}) + "\n" for i in range(count)))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("books", "code"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.jsonl", name)
    return tmp_path


def load(files, source="text", tokenizer="bytes"):
    return load_data(source, files, tokenizer, 0.2 if source == "text" else 0)


def test_each_source_is_split_by_itself_as_it_is_alone(here):
    data, alone = load("books:0.7,code/*.jsonl:0.3"), [load("books"), load("code/*.jsonl")]
    assert data.train.names == data.heldout.names == ("books", "code/*.jsonl") and data.train.weights == (7, 3)
    for side in ("train", "heldout"):
        streams = getattr(data, side).streams
        assert [stream.fingerprint for stream in streams] == [getattr(one, side).fingerprint for one in alone]
        for count in ("num_tokens", "num_documents", "num_bytes", "num_targets"):
            assert getattr(getattr(data, side), count) == sum(getattr(getattr(one, side), count) for one in alone)
    assert data.heldout_text() == b"".join(one.heldout_text() for one in alone)


def test_the_fingerprint_changes_with_a_weight_and_a_token_but_not_with_their_spelling(here):
    prints = [load(files).fingerprint for files in ("books:1,code:1", "books:2,code:1", "books:.5,code:5e-1", "books")]
    assert prints[0] == prints[2] and len(set(prints)) == 3
    write(here / "code" / "a.jsonl", "other")
    assert load("books:1,code:1").fingerprint != prints[0]


def test_prepared_sources_give_the_batches_of_texts(here):
    for name in ("books", "code"):
        prepare(f"p/{name}", source="text", files=name, tokenizer_spec="bytes", heldout_fraction=0.2)
    texts, prepared = load("books:3,code:1"), load("p/books:3,p/code:1", "array_record", "")
    assert prepared.train.names == ("p/books", "p/code") and prepared.heldout_text() is None
    assert_same(training(prepared.train, 20), training(texts.train, 20))
    held = [list(heldout_batches(data.heldout, batch_size=4, sequence_length=LENGTH)) for data in (texts, prepared)]
    assert_same(*held)


def test_a_tokenizer_is_trained_on_all_sources_whatever_their_weights(here):
    one, other, alone = (load(files, tokenizer="bpe:300") for files in ("books:9,code:1", "books:1,code:9", "books"))
    assert one.tokenizer.fingerprint == other.tokenizer.fingerprint != alone.tokenizer.fingerprint


def test_a_path_that_exists_comes_before_a_weight(here):
    for name in ("books:2", "a,b:1"):
        (here / name).mkdir()
        write(here / name / "a.jsonl", name)
    assert load("books:2").fingerprint == load("./books:2/a.jsonl").fingerprint  # the directory, not a weight
    assert load("books:2:0.5,a,b:1:0.5").train.names == ("books:2", "a,b:1")
    (here / "books:2").rename(here / "moved")
    assert load("books:2,a,b:1:1").train.weights == (2, 1)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("books:0,code:1", "^'books:0' has the weight 0; allowed: a finite number above 0, or a path that exists$"),
        ("books:1,code:-0.5", "^'code:-0.5' has the weight -0.5; allowed: a finite number above 0"),
        ("books:nan,code:1", "^'books:nan' has the weight nan; allowed"),
        ("books:inf,code:1", "^'books:inf' has the weight inf; allowed"),
        ("books:1e-400,code:1", "^'books:1e-400' has the weight 1e-400; allowed"),
        ("books:1,code", "^books:1,code: 'code' has no weight; allowed: a weight for every source, or for none$"),
        ("books:1,code:much", "^books:1,code:much: 'code:much' has no weight; allowed"),
        ("books:1,none:1", r"^no file matches 'none' \(a source of weight 1\)$"),
        ("books:1,none/*.txt:1", r"^no file matches 'none/\*.txt' \(a source of weight 1\)$"),
        ("books:1,empty:1", "^directory 'empty' holds no .txt, .* file; it holds no file .a source of weight 1.$"),
        ("notes:2", r"^no file matches 'notes' \(a source of weight 2\)$"),
        ("books:1,blank.jsonl:1", "^blank.jsonl: the data holds too little text to train on one part and hold another"),
        (
            "books:1,books/*.jsonl:1",
            r"^books/a.jsonl belongs to 'books' and 'books/\*.jsonl'; allowed: each file in one",
        ),
        ("books:1,books:2", "^books/a.jsonl belongs to 'books' and 'books'; allowed: each file in one source$"),
    ],
)
def test_mistakes_are_one_line(files, message, here):
    (here / "empty").mkdir()
    (here / "blank.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match=message) as error:
        load(files)
    assert "\n" not in str(error.value)


def test_mistakes_with_prepared_sources_are_one_line(here):
    for name, tokenizer in (("books", "bytes"), ("code", "bpe:300")):
        prepare(f"p/{name}", source="text", files=name, tokenizer_spec=tokenizer, heldout_fraction=0.2)
    for files, message in (
        ("p/books,p/code", "reads one prepared directory, or several with weights: p/books:0.5,p/code:0.5$"),
        ("p/books:1,p/./books:1", "'p/books' and 'p/./books' are the same directory; allowed: each of them once$"),
        ("p/books:1,p/none:1", "data directory 'p/none' does not exist"),
        ("p/books:1,p/code:1", r"p/code was prepared with another tokenizer .* \(prepare_data --tokenizer=p/books\)$"),
        ("", "data directory '' does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            load(files, "array_record", "")


def test_only_training_has_weights(here):
    message = "^no file matches 'books:0.7'; weights are for the sources text and array_record of training$"
    with pytest.raises(UserError, match=message):
        prepare("out", source="text", files="books:0.7,code:0.3", tokenizer_spec="bytes", heldout_fraction=0.2)
    with pytest.raises(UserError, match="'books:0.7' is not a directory"):
        load("books:0.7", "news")
