import random

import pytest

from darkformer_jax.data.heldout import HeldoutSplit, hash_fraction
from darkformer_jax.data.sources import Corpus, Document
from darkformer_jax.errors import UserError


def corpus_of(texts):
    found = [Document(f"{index}", text) for index, text in enumerate(texts)]
    return Corpus(sum(map(len, texts)), lambda on_read: iter(found))


def sides(split):
    parts = ([], [])
    for is_heldout, document in split.documents():
        parts[is_heldout].append(document.text)
    return parts


def test_the_hash_decides_whatever_the_order():
    texts = [f"document {i}" for i in range(2000)]
    train, heldout = sides(HeldoutSplit(corpus_of(texts), 0.05))
    assert sorted(train + heldout) == sorted(texts)
    assert not set(train) & set(heldout)
    assert 70 <= len(heldout) <= 130
    random.Random(0).shuffle(texts)
    assert set(sides(HeldoutSplit(corpus_of(texts), 0.05))[1]) == set(heldout)
    more = sides(HeldoutSplit(corpus_of(texts), 0.1))[1]
    assert set(heldout) < set(more)


def test_the_hash_is_what_it_was():
    assert hash_fraction("abc.py", "heldout") == 0xDB97745730521C5D / 2**64


def test_copies_of_a_document_stay_together():
    train, heldout = sides(HeldoutSplit(corpus_of([f"text {i % 50}" for i in range(1000)]), 0.2))
    assert heldout and not set(train) & set(heldout)


@pytest.mark.parametrize("text", ["".join(f"line {i}\n" for i in range(1000)), "x" * 1000, "ab"])
def test_one_document_is_split_inside(text):
    train, heldout = sides(HeldoutSplit(corpus_of([text]), 0.05))
    assert len(train) == len(heldout) == 1
    assert train[0] + heldout[0] == text
    if "\n" in text:
        assert train[0].endswith("\n")
        assert 0.04 < len(heldout[0]) / len(text) <= 0.05


@pytest.mark.parametrize("texts", [[], ["x"]])
def test_too_little_text(texts):
    with pytest.raises(UserError, match="too little text"):
        HeldoutSplit(corpus_of(texts), 0.05)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_fraction_out_of_range(fraction):
    with pytest.raises(UserError, match="heldout_fraction=.*out of range"):
        HeldoutSplit(corpus_of(["a", "b"]), fraction)


def test_training_sample_is_part_of_the_training_documents():
    texts = [f"document {i:05d}" for i in range(4000)]
    split = HeldoutSplit(corpus_of(texts), 0.05)
    train, _ = sides(split)
    assert list(split.training_sample(10**9)) == train
    sample = list(split.training_sample(14 * 1000))
    assert set(sample) < set(train)
    assert 850 < len(sample) < 1050
