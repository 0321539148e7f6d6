"""Text on disk to batches of tokens: sources, tokenizers, streams, batches. Knows nothing of models or configs."""

import dataclasses
import hashlib

from darkformer_jax.data.batches import Batch, heldout_batches, num_rows, train_batches
from darkformer_jax.data.heldout import DEFAULT_HELDOUT_FRACTION, HeldoutSplit
from darkformer_jax.data.prepared import load_prepared
from darkformer_jax.data.progress import ProgressBar, no_progress
from darkformer_jax.data.sources import CORPUS_SOURCES, open_corpus
from darkformer_jax.data.stream import TokenStream, memory_stream
from darkformer_jax.data.text_files import TEXT_FIELD
from darkformer_jax.data.tokenizers import (
    Tokenizer,
    check_tokenizer_is,
    has_tokenizer,
    load_tokenizer,
    saved_or_new_tokenizer,
)
from darkformer_jax.errors import UserError

__all__ = [
    "Batch",
    "Data",
    "TokenStream",
    "Tokenizer",
    "heldout_batches",
    "load_data",
    "load_tokenizer",
    "num_rows",
    "train_batches",
]

PREPARED_SOURCE = "array_record"


@dataclasses.dataclass(frozen=True)
class Data:
    """A corpus ready to train on: both splits as token streams, and their tokenizer.

    Attributes:
      train, heldout: the splits.
      tokenizer: of both splits.
      heldout_documents: the held-out texts if they are in memory, else None.
    """

    train: TokenStream
    heldout: TokenStream
    tokenizer: Tokenizer
    heldout_documents: tuple[str, ...] | None

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of both splits' tokens, which decide all batches and held-out figures."""
        return hashlib.sha256((self.train.fingerprint + self.heldout.fingerprint).encode()).hexdigest()

    def heldout_text(self) -> bytes | None:
        """The held-out documents as UTF-8, end to end: `heldout.num_bytes` bytes. None for prepared data."""
        return None if self.heldout_documents is None else "".join(self.heldout_documents).encode("utf-8")


def load_data(
    source: str,
    files: str,
    tokenizer: str,
    heldout_fraction: float,
    tokenizer_dir: str | None = None,
    *,
    text_field: str = TEXT_FIELD,
    verify: tuple[int, int] = (0, 1),
    progress_bar: ProgressBar = no_progress,
) -> Data:
    """The data that a config's `data` section names.

    Args:
      source: stdlib | text | news, read into memory; array_record, read from a prepared directory during training.
      files: globs or directories of the source; for array_record the prepared directory.
      tokenizer: bytes | bpe:<n> | a path. For array_record: the one the data was prepared with, or "".
      heldout_fraction: share of the documents; 0 = 0.05. For array_record: the one the data was prepared with, or 0.
      tokenizer_dir: a workdir; a tokenizer saved there is used and must match.
      text_field: for text, the field of a JSON object that holds the text.
      verify: for array_record, (i, n): read shards i, i + n, ... once and compare their hashes.
      progress_bar: shows a tokenizer's training.

    Raises:
      UserError: arguments or files that do not fit.
    """
    if source == PREPARED_SOURCE:
        return _load_prepared_data(files, tokenizer, heldout_fraction, tokenizer_dir, verify)
    if source not in CORPUS_SOURCES:
        allowed = ", ".join((*CORPUS_SOURCES, PREPARED_SOURCE))
        raise UserError(f"data source {source!r} is unknown; allowed: {allowed}")
    texts: tuple[list[str], list[str]] = ([], [])
    split = HeldoutSplit(open_corpus(source, files, text_field), heldout_fraction or DEFAULT_HELDOUT_FRACTION)
    for is_heldout, document in split.documents():
        texts[is_heldout].append(document.text)
    used = saved_or_new_tokenizer(tokenizer, tokenizer_dir, texts[False], progress_bar)
    return Data(memory_stream(texts[False], used), memory_stream(texts[True], used), used, tuple(texts[True]))


def _load_prepared_data(
    files: str, tokenizer: str, heldout_fraction: float, tokenizer_dir: str | None, verify: tuple[int, int]
) -> Data:
    train, heldout, prepared_with = load_prepared(files, heldout_fraction, verify=verify)
    if tokenizer:
        check_tokenizer_is(tokenizer, prepared_with, files)
    saved = load_tokenizer(tokenizer_dir) if tokenizer_dir and has_tokenizer(tokenizer_dir) else None
    if saved and saved.fingerprint != prepared_with.fingerprint:
        raise UserError(
            f"the tokenizer in {tokenizer_dir} (fingerprint {saved.fingerprint[:12]}) is not the one of the data in"
            f" {files} (fingerprint {prepared_with.fingerprint[:12]})"
        )
    return Data(train, heldout, prepared_with, None)
