"""The text of a linearisation: what its stages learn from, and what none of them sees."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from darkformer_jax.calibration.passages import read_passages
from darkformer_jax.data import Tokenizer, load_data, load_tokenizer
from darkformer_jax.data.heldout import DEFAULT_HELDOUT_FRACTION
from darkformer_jax.data.sources import Corpus, Document, find_text_files, open_corpus
from darkformer_jax.data.text_files import ignore_read
from darkformer_jax.errors import UserError
from darkformer_jax.linearisation.settings import TRANSFER, Settings
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.amounts import too_little_text

HELDOUT_FRACTION = DEFAULT_HELDOUT_FRACTION  # of every stage
_COPIED, _COPIES = 512, 4  # tokens of a passage that is repeated, at most without a wider window, and passages


class Text(NamedTuple):
    """What there is to learn from and to measure on.

    Attributes:
      num_tokens: of the training side that are predicted.
      heldout: text that is no part of the training side.
      copied: passages of it, for the figure of copying; n is even.
      fingerprint: of all of it.
    """

    num_tokens: int
    heldout: Corpus
    copied: Int[np.ndarray, "passages n"]
    fingerprint: str


def read_text(settings: Settings) -> Text:
    """Reads and tokenises the text once, to know that it is enough.

    Raises:
      UserError: files that cannot be read, text that is too short for a stage or for the figures, or test text with
        documents of the training text.
    """
    for text in (settings.text, settings.test_text) if settings.test_text else (settings.text,):
        find_text_files(text)  # refuses sources with weights, which calibration does not read
    tokenizer, passages = str(Workdir(settings.workdir).local), (settings.passages, settings.context, settings.seed)
    read_passages(settings.text, "", settings.text_field, load_tokenizer(tokenizer), *passages, HELDOUT_FRACTION)
    data = load_data("text", settings.text, tokenizer, HELDOUT_FRACTION, text_field=settings.text_field)
    _require_enough(settings, data.train.num_targets)
    held_out = data.heldout_documents or ()
    where = f"the held-out {HELDOUT_FRACTION:.0%} of --text={settings.text}"
    if settings.test_text:
        held_out, where = _test_documents(settings), f"--test_text={settings.test_text}"
    for wanted in (max(_COPIED, 2 * settings.window), _COPIED):  # the window alone must not copy it, if that can be
        copied = _passages(held_out, data.tokenizer, min(wanted, settings.longest // 2) // 2 * 2)
        if len(copied):
            break
    else:
        raise UserError(f"{where}: no document has {copied.shape[1]} tokens to be repeated; give longer --test_text")
    digest = hashlib.sha256(data.fingerprint.encode())
    for text in held_out:
        digest.update(hashlib.sha256(text.encode("utf-8")).digest())
    return Text(data.train.num_targets, _corpus(held_out), copied, digest.hexdigest())


def _require_enough(settings: Settings, num_tokens: int) -> None:
    """Raises UserError if a trained stage would learn the text by heart, or has not one batch of it."""
    for stage in settings.stages:
        if stage == TRANSFER:  # which counts its own passages
            continue
        steps, rows = settings.steps[stage], settings.rows_of(stage)
        said = too_little_text("", num_tokens, settings.context_of(stage), steps * rows, rows, steps)
        if said:
            raise UserError(f"--text={settings.text}: too little for {stage}: {said}")


def _test_documents(settings: Settings) -> tuple[str, ...]:
    """The documents of --test_text. Raises UserError if --text has one of them."""
    test = tuple(
        doc.text for doc in open_corpus("text", settings.test_text, settings.text_field).documents(ignore_read)
    )
    for document in open_corpus("text", settings.text, settings.text_field).documents(ignore_read):
        if document.text in test:
            raise UserError(f"--test_text={settings.test_text}: has {document.name} of --text; allowed: other text")
    return test


def _corpus(texts: Sequence[str]) -> Corpus:
    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    return Corpus(num_bytes, lambda _: (Document(f"held out {i}", text) for i, text in enumerate(texts)))


def _passages(texts: Sequence[str], tokenizer: Tokenizer, size: int) -> np.ndarray:
    """[<= _COPIES, size] ids, the first stretches of the texts, none of which crosses a document's end."""
    found: list[list[int]] = []
    for text in texts:
        ids = tokenizer.encode(text)
        found += [list(ids[start : start + size]) for start in range(0, len(ids) - size + 1, size)]
        if len(found) >= _COPIES:
            break
    return np.array(found[:_COPIES], np.int32).reshape(-1, size)
