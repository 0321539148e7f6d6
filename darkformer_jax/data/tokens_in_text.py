"""Tokens that a text spells out, such as <|im_start|>: which there are, and text to ids with each of them read as one.

A tokenizer's own `encode` reads none of them. Chat templates write them, and so may a user who asks for it.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import tokenizers as hf

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # in SentencePiece's pieces


class AddedToken(NamedTuple):
    """A token that stands for itself, whatever the text around it.

    Attributes:
      id: its number.
      is_special: whether the tokenizer calls it special: it marks something and is no part of a text.
    """

    id: int
    is_special: bool


class Encoded(NamedTuple):
    """A text as tokens: their ids [n] and the character of the text at which each of them begins [n]."""

    ids: np.ndarray
    starts: np.ndarray


def encoded_bytes(text: str) -> Encoded:
    """A text as the bytes of its UTF-8."""
    sizes = [len(character.encode("utf-8")) for character in text]
    return Encoded(np.frombuffer(text.encode("utf-8"), np.uint8), np.repeat(np.arange(len(text)), sizes))


class AddedTokens:
    """Those of a tokenizer of the `tokenizers` library."""

    def __init__(self, tokenizer: hf.Tokenizer) -> None:
        self._tokenizer = tokenizer

    @functools.cached_property
    def tokens(self) -> Mapping[str, AddedToken]:
        """By their text."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: AddedToken(number, token.special) for number, token in added.items()}

    def encode(self, pieces: Sequence[str]) -> list[Encoded]:
        """The tokens of each piece of a text, these among them; nothing is put before or after a piece.

        The space that a tokenizer may put before a text is not before the later pieces.
        """
        self._tokenizer.encode_special_tokens = False
        try:
            return [self._encode(piece, number == 0) for number, piece in enumerate(pieces)]
        finally:
            self._tokenizer.encode_special_tokens = True

    def _encode(self, piece: str, is_beginning: bool) -> Encoded:
        if is_beginning:
            return _encoded(self._tokenizer, piece)
        token = self._pattern.search(piece)  # after it, the tokenizer does as ever
        place = token.start() if token else len(piece)
        before, after = _encoded(self._inside, piece[:place]), _encoded(self._tokenizer, piece[place:])
        return Encoded(np.concatenate([before.ids, after.ids]), np.concatenate([before.starts, after.starts + place]))

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(any_of(self.tokens))

    @functools.cached_property
    def _inside(self) -> hf.Tokenizer:
        """The tokenizer without the space that it may put before a text."""
        definition = json.loads(self._tokenizer.to_str(), object_hook=_without_prefix)
        return hf.Tokenizer.from_str(json.dumps(definition))


def _encoded(tokenizer: hf.Tokenizer, text: str) -> Encoded:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    starts = [start for start, _ in encoding.offsets]
    return Encoded(np.array(encoding.ids, np.int64), np.array(starts, np.int64))


def _without_prefix(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a tokenizer.json that puts nothing before a text. The decoder, whose parts look alike, is not used."""
    match part.get("type"):
        case "Prepend":
            return {"type": "Sequence", "normalizers": []}
        case "Metaspace":
            return part | {"prepend_scheme": "never"}
        case "ByteLevel":
            return part | {"add_prefix_space": False}
    return part


class SentencePieceAddedTokens:
    """The control symbols and the user-defined symbols of a SentencePiece model.

    As in transformers (`legacy=False`), the space that a model may put before a text is only at its very beginning, and
    not after one of these tokens.

    Args:
      definition: the bytes of the .model file.
    """

    def __init__(self, definition: bytes) -> None:
        self._definition = definition

    @functools.cached_property
    def tokens(self) -> Mapping[str, AddedToken]:
        """By their text."""
        pieces = _model_proto(self._definition).pieces
        return {
            piece.piece.replace(_SPACE, " "): AddedToken(number, piece.type == piece.CONTROL)
            for number, piece in enumerate(pieces)
            if piece.type in (piece.CONTROL, piece.USER_DEFINED)
        }

    def encode(self, pieces: Sequence[str]) -> list[Encoded]:
        """As `AddedTokens.encode`; the first piece is the beginning of the text."""
        return [self._encode(piece, number == 0) for number, piece in enumerate(pieces)]

    def _encode(self, text: str, is_beginning: bool) -> Encoded:
        ids: list[int] = []
        starts: list[int] = []
        place = 0
        for part in self._pattern.split(text):
            if part in self._control:
                ids.append(self.tokens[part].id)
                starts.append(place)
            elif part:
                processor = self._beginning if is_beginning and place == 0 else self._inside
                for piece in processor.encode(part, return_type="proto").pieces:
                    ids.append(piece.id)
                    starts.append(place + piece.begin)
            place += len(part)
        return Encoded(np.array(ids, np.int64), np.array(starts, np.int64))

    @functools.cached_property
    def _control(self) -> set[str]:
        """The tokens that the model itself never reads out of a text."""
        return {token for token, (_, is_special) in self.tokens.items() if is_special}

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(f"({any_of(sorted(self._control))})")

    @functools.cached_property
    def _beginning(self) -> Any:
        return sentencepiece.SentencePieceProcessor(model_proto=self._definition)

    @functools.cached_property
    def _inside(self) -> Any:
        model = _model_proto(self._definition)
        model.normalizer_spec.add_dummy_prefix = False
        return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def any_of(tokens: Sequence[str] | Mapping[str, Any]) -> str:
    """A pattern of these texts, the longest that fits first; of none if there are none."""
    return f"(?:{'|'.join(map(re.escape, sorted(tokens, key=len, reverse=True))) or '(?!)'})"


def _model_proto(definition: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(definition)  # type: ignore[attr-defined]  # made at run time
