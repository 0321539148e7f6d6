import dataclasses
import itertools

import numpy as np
import pytest

from darkformer_jax.data.probe_rows import (
    CUE,
    PASSAGE,
    ProbeText,
    RowsTooLong,
    copy_rows,
    fingerprint,
    octaves,
    position_rows,
    repeat_rows,
)
from darkformer_jax.data.tokenizers import BytesTokenizer
from darkformer_jax.errors import UserError


class WithoutBOS(BytesTokenizer):
    adds_bos = False


def numbered(context=4096, seed=0, tokenizer=None):
    """Two documents without a token that occurs twice, so that a token tells its place."""
    documents = [np.arange(1000, 4000, dtype=np.int32), np.arange(5000, 7500, dtype=np.int32)]
    return ProbeText(documents, tokenizer or BytesTokenizer(), context, seed)


def inside(row, name):
    return [row.tokens[begin:end] for begin, end in row.parts[name]]


@pytest.mark.parametrize("tokenizer", [BytesTokenizer(), WithoutBOS()])
def test_a_copy_stands_the_distance_behind_its_passage_and_the_texts_own_words_between(tokenizer):
    for row in copy_rows(numbered(tokenizer=tokenizer), 500, 4):
        own = row.tokens[int(tokenizer.adds_bos) :]
        assert (np.diff(own[:500]) == 1).all() and (own[500:] == own[:PASSAGE]).all()
        assert len(own) == 500 + PASSAGE and tokenizer.adds_bos == (row.tokens[0] == tokenizer.bos_id)
        (first,), (second,) = inside(row, "first"), inside(row, "second")
        assert (first == second).all() and len(first) == PASSAGE - CUE
        assert row.parts["second"][0][0] - row.parts["first"][0][0] == 500
        assert first[0] == own[CUE]


def test_the_rows_of_repeat_are_a_passage_twice():
    for row in repeat_rows(numbered(), 300, 3):
        assert (row.tokens[1:301] == row.tokens[301:]).all() and len(row.tokens) == 601
        assert row.parts == {"first": [(1 + CUE, 301)], "second": [(301 + CUE, 601)]}


def test_a_distance_below_the_passages_length_makes_a_shorter_passage():
    (row,) = copy_rows(numbered(), 70, 1)
    assert len(row.tokens) == 141 and (row.tokens[1:71] == row.tokens[71:]).all()


def test_no_two_rows_share_text_and_none_crosses_documents():
    rows = copy_rows(numbered(), 500, 11)
    assert all((np.diff(row.tokens[1:501]) == 1).all() for row in rows)
    for a, b in itertools.combinations(rows, 2):
        assert not set(a.tokens[1:].tolist()) & set(b.tokens[1:].tolist())


def test_the_seed_and_the_text_decide_the_rows():
    same = [fingerprint(copy_rows(numbered(), 500, 4)) for _ in range(2)]
    assert same[0] == same[1]
    assert fingerprint(copy_rows(numbered(seed=1), 500, 4)) != same[0]
    changed = numbered()
    changed.documents[1][:] += 1
    assert fingerprint(copy_rows(changed, 500, 4)) != same[0]


def test_positions_fill_the_context_and_every_predicted_token_is_in_one_octave():
    (row, _) = position_rows(numbered(context=1000), 2)
    assert len(row.tokens) == 1001
    assert list(row.parts) == ["0-255", "256-511", "512-999"]
    places = [place for spans in row.parts.values() for begin, end in spans for place in range(begin, end)]
    assert places == list(range(1, 1001))


def test_octaves_double_and_the_last_one_may_be_cut():
    assert octaves(1024) == [(0, 255), (256, 511), (512, 1023)]
    assert octaves(100) == [(0, 99)]
    assert octaves(300) == [(0, 255), (256, 299)]


def test_too_little_text_is_refused_with_what_there_is():
    with pytest.raises(UserError, match="the text is too short: 11 stretches of 500 tokens.* 12 are needed"):
        copy_rows(numbered(), 500, 12)


def test_a_row_may_be_as_long_as_the_context_and_no_longer():
    copy_rows(numbered(context=628), 500, 1)  # 1 + 500 + 128 tokens, of which the last is not read
    with pytest.raises(RowsTooLong, match="copy needs rows of 628 tokens, and the context is 627"):
        copy_rows(dataclasses.replace(numbered(), context=627), 500, 1)
