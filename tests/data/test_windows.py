import numpy as np
import pytest

from darkformer_jax.data.tokenizers import BytesTokenizer
from darkformer_jax.data.windows import ScoredDocument, window_batch


class NoBos(BytesTokenizer):
    adds_bos = False


TEXT = "Ein Würfel, 骰子, zwei Würfel"


@pytest.mark.parametrize("tokenizer", [BytesTokenizer(), NoBos()], ids=["bos", "no bos"])
@pytest.mark.parametrize(("context", "stride"), [(4, 4), (5, 5), (8, 3), (8, 1), (100, 100), (100, 7), (42, 42)])
def test_every_token_is_scored_once_from_what_stands_before_it(tokenizer, context, stride):
    ids = tokenizer.encode(TEXT)
    document = ScoredDocument.of(TEXT, tokenizer)
    windows = list(document.windows(context, stride))
    scored = []
    for number, window in enumerate(windows):
        assert 1 <= len(window.targets) <= context and window.num_scored >= 1
        assert window.inputs[1:].tolist() == window.targets[:-1].tolist()
        start = number * stride + (not tokenizer.adds_bos)  # of the first target, in ids
        assert window.targets.tolist() == ids[start : start + context]
        assert window.inputs[0] == (256 if tokenizer.adds_bos else ids[start - 1])
        assert window.num_skipped == (context - stride if number else 0)
        scored += window.targets[window.num_skipped :].tolist()
    assert scored == (ids if tokenizer.adds_bos else ids[1:])
    assert all(len(window.targets) == context for window in windows[:-1])


@pytest.mark.parametrize("tokenizer", [BytesTokenizer(), NoBos()], ids=["bos", "no bos"])
def test_bytes_are_those_of_the_scored_text(tokenizer):
    total = len(TEXT.encode())
    first = 0 if tokenizer.adds_bos else 1
    assert ScoredDocument.of(TEXT, tokenizer).num_bytes == total - first
    assert ScoredDocument.of(TEXT, tokenizer, 1000).num_bytes == total - first
    for cut in range(1, total - first):
        document = ScoredDocument.of(TEXT, tokenizer, cut)
        assert len(document.targets) == cut
        whole = TEXT.encode()[: first + cut].decode(errors="ignore")
        assert document.num_bytes == len(whole.encode()) - first


def test_a_character_counts_with_the_token_that_completes_it():
    assert ScoredDocument.of("骰子", NoBos()).num_bytes == 6  # the first token is a third of a character
    assert ScoredDocument.of("骰子", NoBos(), 1).num_bytes == 0


def test_documents_of_nothing_or_of_one_token():
    assert list(ScoredDocument.of("a", NoBos()).windows(4, 4)) == []
    assert list(ScoredDocument.of("", NoBos()).windows(4, 4)) == []
    (window,) = ScoredDocument.of("a", BytesTokenizer()).windows(4, 4)
    assert (window.inputs.tolist(), window.targets.tolist()) == ([256], [97])


def test_a_batch_is_filled_up_with_padding():
    windows = list(ScoredDocument.of("abcdefg", BytesTokenizer()).windows(4, 2))
    batch = window_batch(windows, 4, 4)
    assert all(array.shape == (4, 4) for array in batch.values())
    assert batch["weights"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert batch["positions"][2].tolist() == [0, 1, 2, 0]
    assert batch["targets"][2].tolist() == [*b"efg", 0]
    assert batch["inputs"].dtype == np.int32 and batch["weights"].dtype == np.float32
