"""Rows of tokens that show what a language model still finds far back, made of a user's text.

Three kinds are here: a passage that comes again (`copy_rows`), all of a row again (`repeat_rows`), and plain
text by position (`position_rows`); `darkformer_jax.data.probe_words` has those with made-up words. Rows are a pure
function of the text, the seed, the probe, their number and the distance, those of `lookup` also of the other distances
that are asked, those of `positions` of the context. Rows of one probe and distance share no text.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from darkformer_jax.data.tokenizers import Tokenizer
from darkformer_jax.errors import UserError

PASSAGE = 128  # tokens that are copied
CUE = 32  # first tokens of a copy, which are not scored: they tell the model which passage comes again
FIRST_OCTAVE = 256


class ProbeRow(NamedTuple):
    """A text that a model reads from its beginning.

    Attributes:
      tokens: [n] ids.
      parts: what is scored: name -> (begin, end) of stretches of tokens, each predicted from all tokens before it.
      candidates: ids to compare as the token after the last; () = none.
      answer: the index of the right candidate.
    """

    tokens: Int[np.ndarray, "n"]
    parts: Mapping[str, Sequence[tuple[int, int]]]
    candidates: tuple[int, ...] = ()
    answer: int = 0


class RowsTooLong(UserError):
    """The rows of a probe do not fit the context; a smaller distance may."""


@dataclasses.dataclass(frozen=True)
class ProbeText:
    """The text that rows are made of.

    Attributes:
      documents: the ids of each document, without special ones.
      tokenizer: the model's.
      context: the most tokens that the model reads.
      seed: of what is drawn.
    """

    documents: Sequence[Int[np.ndarray, "n"]]
    tokenizer: Tokenizer
    context: int
    seed: int

    @classmethod
    def of(cls, texts: Iterable[str], tokenizer: Tokenizer, context: int, seed: int) -> "ProbeText":
        """Encodes the texts, each a document."""
        documents = [np.asarray(tokenizer.encode_batch([text])[0], np.int32) for text in texts]
        return cls(documents, tokenizer, context, seed)

    @property
    def begin(self) -> list[int]:
        """What every row begins with: the family's BOS, if it has one."""
        return [self.tokenizer.bos_id] if self.tokenizer.adds_bos else []

    def random(self, probe: str, distance: int) -> np.random.Generator:
        """The source of chance for the rows of a probe and a distance."""
        return np.random.default_rng([self.seed, distance, *probe.encode()])

    def require_room(self, probe: str, num_tokens: int) -> None:
        """Raises RowsTooLong if a row of so many tokens, the last of which is not read, is longer than the context."""
        if num_tokens - 1 > self.context:
            raise RowsTooLong(
                f"{probe} needs rows of {num_tokens - 1:,} tokens, and the context is {self.context:,}; "
                "allowed: smaller --distances, or a larger --context"
            )

    def stretches(self, length: int, count: int, random: np.random.Generator) -> list[Int[np.ndarray, "length"]]:
        """`count` stretches of `length` tokens, each within a document, in random order; no two overlap.

        Raises UserError if there are fewer.
        """
        if not length:
            return [np.zeros(0, np.int32)] * count
        places = [
            (document, begin)
            for document, ids in enumerate(self.documents)
            for begin in range(0, len(ids) - length + 1, length)
        ]
        if len(places) < count:
            raise UserError(
                f"the text is too short: {len(places)} stretches of {length:,} tokens lie within a document, and "
                f"{count} are needed (--rows, --distances, --context)"
            )
        chosen = [places[index] for index in random.choice(len(places), count, replace=False)]
        return [self.documents[document][begin : begin + length] for document, begin in chosen]


def copy_rows(text: ProbeText, distance: int, count: int) -> list[ProbeRow]:
    """A passage x, the text that follows it, x again: [x, text, x].

    Every token of the second x stands `distance` places behind its like in the first. x has 128 tokens, or `distance`
    if that is less.

    Returns:
      Rows with the parts "first" and "second": the two copies without their first 32 tokens.
    """
    return _copies(text, "copy", distance, min(PASSAGE, distance), count)


def repeat_rows(text: ProbeText, distance: int, count: int) -> list[ProbeRow]:
    """A passage x of `distance` tokens twice, [x, x]; parts as in `copy_rows`."""
    return _copies(text, "repeat", distance, distance, count)


def _copies(text: ProbeText, probe: str, distance: int, size: int, count: int) -> list[ProbeRow]:
    start = len(text.begin)
    text.require_room(probe, start + distance + size)
    first, second = (start + CUE, start + size), (start + distance + CUE, start + distance + size)
    return [
        ProbeRow(_ids(text.begin, stretch, stretch[:size]), {"first": [first], "second": [second]})
        for stretch in text.stretches(distance, count, text.random(probe, distance))
    ]


def position_rows(text: ProbeText, count: int) -> list[ProbeRow]:
    """Plain text that fills the context. Its parts are octaves of position: 0-255, 256-511, 512-1023, ....

    A token's position is that of the token which it is predicted from, as in `evaluate`.
    """
    size = text.context + 1 - len(text.begin)
    parts = {f"{first}-{last}": [(first + 1, last + 2)] for first, last in octaves(text.context)}
    stretches = text.stretches(size, count, text.random("positions", text.context))
    return [ProbeRow(_ids(text.begin, stretch), parts) for stretch in stretches]


def octaves(context: int) -> list[tuple[int, int]]:
    """(first, last) position of each octave of a context: 0-255, 256-511, 512-1023, ...; the last one may be cut."""
    edges = [0, FIRST_OCTAVE]
    while edges[-1] < context:
        edges.append(2 * edges[-1])
    return [(first, min(end, context) - 1) for first, end in itertools.pairwise(edges)]


def fingerprint(rows: Sequence[ProbeRow]) -> str:
    """A hash of the rows: figures of two models compare if their rows are the same."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.tokens.astype("<i4").tobytes())
        digest.update(repr((dict(row.parts), row.candidates, row.answer)).encode())
    return digest.hexdigest()[:16]


def _ids(*pieces: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([np.asarray(piece, np.int32) for piece in pieces])
