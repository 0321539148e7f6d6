"""Prompts from held-out text."""

import pytest

from darkformer_jax.data.stream import memory_stream
from darkformer_jax.data.tokenizers import BytesTokenizer
from darkformer_jax.tasks.prompts import Prompt, heldout_prompts

TALE = "Once upon a time there was a king who had twelve daughters, each more beautiful than the other. "


def prompts(texts, count):
    return heldout_prompts(memory_stream(texts, BytesTokenizer()), BytesTokenizer(), count)


def test_a_piece_begins_and_ends_with_a_word_and_comes_from_its_place():
    (first, second) = prompts([TALE * 20], 2)
    assert first == Prompt("Once upon a time there was a king who", 0.0)
    assert second.place == pytest.approx(0.5, abs=1e-3)
    assert f" {second.text} " in TALE * 2 and 20 < len(second.text) <= 40
    assert second.text != first.text


def test_where_a_document_begins_nearby_the_piece_does_too_and_does_not_reach_into_the_next():
    texts = [f"Tale {number}. The end." for number in range(90)]
    found = prompts(texts, 3)
    assert [piece.text for piece in found] == ["Tale 0. The end.", "Tale 31. The end.", "Tale 61. The end."]


@pytest.mark.parametrize("letter", ["g", "王"])
def test_text_without_spaces_is_cut_anywhere_and_holds_no_half_characters(letter):
    found = prompts([letter * 5000], 3)
    assert {piece.text.strip(letter) for piece in found} == {""}
    assert all(10 < len(piece.text) <= 40 for piece in found)


def test_little_text_gives_fewer_prompts_and_blank_text_none():
    assert [piece.text for piece in prompts(["a"], 3)] == ["a"]
    assert prompts(["   \n "], 3) == []
