"""One split as one flat sequence of tokens with marked document starts.

With one separator for both ends (bos == eos) the stream is  sep d1 sep d2 sep ... sep : the target of every token is
the token after it, and the separator that begins the next document is predicted as the end of this one. Otherwise it is
bos d1 eos bos d2 eos ..., and the bos after an eos is not predicted.
"""

import abc
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from darkformer_jax.data.tokenizers import Tokenizer

_ENCODED_AT_ONCE = 1 << 20  # characters: enough for the tokenizer's threads, little enough for its bookkeeping


@dataclasses.dataclass(eq=False)
class TokenStream(abc.ABC):
    """Random access to the N tokens of one split.

    Attributes:
      num_tokens: N, separators included.
      num_documents: documents in the split.
      num_bytes: UTF-8 bytes of the documents' text, the unit of "bits per byte".
      starts_are_targets: whether a document's first token is predicted from the token before it (bos == eos).
      fingerprint: SHA-256 (hexadecimal) that changes with any token.
    """

    num_tokens: int
    num_documents: int
    num_bytes: int
    starts_are_targets: bool
    fingerprint: str

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted: all but the last token, or the last one of each document."""
        return self.num_tokens - (1 if self.starts_are_targets else self.num_documents)

    def are_targets(self, starts: np.ndarray, is_start: np.ndarray) -> np.ndarray:
        """Whether tokens count in the loss [B, length]: those that `read` gave, with `is_start`, from `starts` on."""
        return np.ones_like(is_start) if self.starts_are_targets else ~is_start

    def read(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """`length` tokens from each position of `starts`.

        Args:
          starts: [B] int64, each >= 0; may be past the end.
          length: tokens per row.

        Returns:
          tokens [B, length] int32 and is_start [B, length] bool (the token begins a document); 0 and False past the
          stream's end.
        """
        positions = starts[:, None] + np.arange(length)
        inside = positions < self.num_tokens
        tokens, is_start = self._at(np.minimum(positions, self.num_tokens - 1))
        return np.where(inside, tokens, 0).astype(np.int32), is_start & inside

    @abc.abstractmethod
    def _at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and document starts at positions [B, length], each smaller than N."""


class MemoryStream(TokenStream):
    """A token stream held in memory: tokens [N], integers, and is_start [N], bool."""

    def __init__(self, tokens: np.ndarray, is_start: np.ndarray, num_bytes: int, starts_are_targets: bool) -> None:
        fingerprint = hashlib.sha256(tokens.tobytes() + np.packbits(is_start).tobytes()).hexdigest()
        super().__init__(len(tokens), int(is_start.sum()), num_bytes, starts_are_targets, fingerprint)
        self._tokens = tokens
        self._is_start = is_start

    def _at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._tokens[positions], self._is_start[positions]


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest type, in the byte order of files, that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class StreamBuilder:
    """Turns documents into the tokens of a stream, one batch of documents at a time.

    Args:
      tokenizer: of the stream.
      sink: called with consecutive pieces of the stream: tokens [n] and is_start [n].

    Attributes:
      counts: num_tokens, num_documents and num_bytes that the sink was given; final after `close`.
    """

    def __init__(self, tokenizer: Tokenizer, sink: Callable[[np.ndarray, np.ndarray], None]) -> None:
        self._tokenizer = tokenizer
        self._sink = sink
        self._batch: list[str] = []
        self._characters = 0
        self.counts = {"num_documents": 0, "num_tokens": 0, "num_bytes": 0}

    def add(self, text: str) -> None:
        """Adds a document."""
        self._batch.append(text)
        self._characters += len(text)
        self.counts["num_bytes"] += len(text.encode("utf-8"))
        if self._characters >= _ENCODED_AT_ONCE:
            self._flush()

    def close(self) -> None:
        """Ends the stream. If bos == eos, a last separator is added, which is only ever a target."""
        self._flush()
        if self._tokenizer.bos_id == self._tokenizer.eos_id:
            end = np.array([self._tokenizer.eos_id], token_dtype(self._tokenizer.vocab_size))
            self._emit(end, np.zeros(1, np.bool_))

    def _flush(self) -> None:
        if self._batch:
            self._emit(*_mark_documents(self._tokenizer.encode_batch(self._batch), self._tokenizer))
        self._batch, self._characters = [], 0

    def _emit(self, tokens: np.ndarray, is_start: np.ndarray) -> None:
        self.counts["num_tokens"] += len(tokens)
        self.counts["num_documents"] += int(is_start.sum())
        self._sink(tokens, is_start)


def memory_stream(texts: Iterable[str], tokenizer: Tokenizer) -> MemoryStream:
    """The stream of `texts`, one document each."""
    pieces: list[tuple[np.ndarray, np.ndarray]] = []
    builder = StreamBuilder(tokenizer, lambda *piece: pieces.append(piece))
    for text in texts:
        builder.add(text)
    builder.close()
    tokens, is_start = map(np.concatenate, zip(*pieces, strict=True))
    return MemoryStream(tokens, is_start, builder.counts["num_bytes"], tokenizer.bos_id == tokenizer.eos_id)


def _mark_documents(documents: Sequence[np.ndarray], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, is_start) of all documents. Each becomes [bos] + ids, plus [eos] if bos != eos."""
    has_end = int(tokenizer.bos_id != tokenizer.eos_id)
    sizes = np.array([len(ids) for ids in documents]) + 1 + has_end
    ends = np.cumsum(sizes)
    tokens = np.empty(ends[-1], token_dtype(tokenizer.vocab_size))
    is_start = np.zeros(ends[-1], np.bool_)
    is_start[ends - sizes] = True
    is_text = ~is_start
    if has_end:
        is_text[ends - 1] = False
        tokens[ends - 1] = tokenizer.eos_id
    tokens[is_start] = tokenizer.bos_id
    tokens[is_text] = np.concatenate(documents)
    return tokens, is_start
