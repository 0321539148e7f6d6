"""Passages of text to fit a mechanism on, and others to measure its errors on."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from darkformer_jax.data.heldout import HeldoutSplit
from darkformer_jax.data.sources import Corpus, Document, open_corpus
from darkformer_jax.data.text_files import ignore_read
from darkformer_jax.data.tokenizers import Tokenizer, encode_prompt
from darkformer_jax.errors import UserError

_TEST_SHARE = 0.2
MEASURED = 8  # passages, at most, on which models are compared: all of them on the same tokens


def read_passages(
    text: str,
    test_text: str,
    text_field: str,
    tokenizer: Tokenizer,
    count: int,
    context: int,
    seed: int,
    heldout_fraction: float = 0.0,
) -> tuple[Int[np.ndarray, "passages context"], int]:
    """(passages, how many of them, in front, are only for measuring errors).

    `count` passages come from `text`. Without `test_text`, a fifth of them are for the errors; with it, passages of
    `test_text` are added for them. `text_field` is that of both. What a run with `heldout_fraction` holds out of `text`
    is not read; 0 = everything is.

    Raises UserError if a text has too few passages, or if both texts share some.
    """
    num_test = num_test_passages(count)
    passages = _draw(text, text_field, tokenizer, count, context, seed, heldout_fraction)
    if not test_text:
        return passages, num_test
    test = _draw(test_text, text_field, tokenizer, num_test, context, seed)
    if {row.tobytes() for row in test} & {row.tobytes() for row in passages}:
        raise UserError(f"--test_text={test_text}: has passages of --text={text}; allowed: other text")
    return np.concatenate([test, passages]), num_test


def num_test_passages(count: int) -> int:
    """How many of `count` passages are only for measuring errors, where there is no other text for that."""
    return max(1, round(_TEST_SHARE * count))


def _draw(
    text: str,
    text_field: str,
    tokenizer: Tokenizer,
    count: int,
    context: int,
    seed: int,
    heldout_fraction: float = 0.0,
) -> np.ndarray:
    """[count, context] ids of different stretches of the documents, each encoded as the beginning of a document."""
    begin = [tokenizer.bos_id] if tokenizer.adds_bos else []
    size = context - len(begin)
    passages: list[np.ndarray] = []
    for document in _documents(open_corpus("text", text, text_field), heldout_fraction):
        ids = np.asarray(encode_prompt(tokenizer, document.text)[len(begin) :], np.int32)  # a ninth of a list's bytes
        passages += [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
    if len(passages) < count:
        raise UserError(
            f"{text}: {len(passages)} passages of --context={context} tokens; {count} are needed (--passages)"
        )
    chosen = np.random.default_rng(seed).choice(len(passages), count, replace=False)
    return np.stack([np.concatenate([np.asarray(begin, np.int32), passages[i]]) for i in chosen])


def _documents(corpus: Corpus, heldout_fraction: float) -> Iterator[Document]:
    if not heldout_fraction:
        return corpus.documents(ignore_read)
    split = HeldoutSplit(corpus, heldout_fraction)
    return (document for is_heldout, document in split.documents() if not is_heldout)
