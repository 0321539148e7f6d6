import numpy as np
import pytest

from darkformer_jax.data import stream as stream_module
from darkformer_jax.data.stream import memory_stream, token_dtype
from darkformer_jax.data.tokenizers import BytesTokenizer, train_bpe

TEXTS = ["def f():\n", "x", "caf\u00e9 \U0001f600", "<|doc|> is text here", "the end\n" * 50]


class TwoMarks(BytesTokenizer):
    """Bytes with a begin (256) and an end (257) of document."""

    vocab_size = 258
    eos_id = 257


def whole(stream):
    tokens, is_start = stream.read(np.array([0]), stream.num_tokens)
    return tokens[0], is_start[0]


def recovered(stream, tokenizer):
    tokens, is_start = whole(stream)
    return [tokenizer.decode(ids) for ids in np.split(tokens, np.flatnonzero(is_start))[1:]]


@pytest.mark.parametrize("at_once", [1, 30, 1 << 20])
@pytest.mark.parametrize("tokenizer", [BytesTokenizer(), TwoMarks(), train_bpe(280, TEXTS)], ids=["one", "two", "bpe"])
def test_every_document_comes_back_exactly(tokenizer, at_once, monkeypatch):
    monkeypatch.setattr(stream_module, "_ENCODED_AT_ONCE", at_once)
    stream = memory_stream(TEXTS, tokenizer)
    assert recovered(stream, tokenizer) == TEXTS
    assert stream.num_documents == len(TEXTS)
    assert stream.num_bytes == sum(len(text.encode()) for text in TEXTS)


def test_layout_with_one_separator():
    tokens, is_start = whole(memory_stream(["ab", "c"], BytesTokenizer()))
    assert tokens.tolist() == [256, 97, 98, 256, 99, 256]
    assert is_start.tolist() == [True, False, False, True, False, False]


def test_layout_with_begin_and_end():
    tokens, is_start = whole(memory_stream(["ab", "c"], TwoMarks()))
    assert tokens.tolist() == [256, 97, 98, 257, 256, 99, 257]
    assert is_start.tolist() == [True, False, False, False, True, False, False]


def test_counts_are_exact():
    stream = memory_stream(TEXTS, BytesTokenizer())
    assert stream.num_tokens == stream.num_bytes + stream.num_documents + 1
    assert stream.starts_are_targets
    stream = memory_stream(TEXTS, TwoMarks())
    assert stream.num_tokens == stream.num_bytes + 2 * stream.num_documents
    assert not stream.starts_are_targets


def test_reading_beyond_the_end_gives_nothing():
    stream = memory_stream(["ab"], BytesTokenizer())
    tokens, is_start = stream.read(np.array([2, 0, 100]), 4)
    assert tokens.tolist() == [[98, 256, 0, 0], [256, 97, 98, 256], [0, 0, 0, 0]]
    assert is_start.tolist() == [[False] * 4, [True, False, False, False], [False] * 4]
    assert tokens.dtype == np.int32


def test_token_dtype():
    assert token_dtype(65536) == np.uint16
    assert token_dtype(65537) == np.uint32
