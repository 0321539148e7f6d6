"""Tokens that fine-tuning has added beside a SentencePiece model, as pieces of the model.

Hugging Face directories list them in added_tokens.json, {token: id}, and in newer ones in the added_tokens_decoder of
tokenizer_config.json, {id: {"content": token, "special": ...}}.
"""

from collections.abc import Mapping
from typing import Any

from darkformer_jax.errors import UserError

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # types of pieces
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # in pieces
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


def with_added_tokens(model: bytes, listed: Mapping[str, Any], config: Mapping[str, Any]) -> bytes:
    """The model with a piece for each added token that it lacks.

    A special token becomes a control piece, which text never contains. Any other is read out of text as a whole. Ids
    without a token become unused pieces.

    Args:
      model: the bytes of a .model file.
      listed: added_tokens.json.
      config: tokenizer_config.json.

    Raises:
      UserError: an entry is no token and id, two tokens have one id, or the model has the token under another id.
    """
    added = _added(listed, config)
    if not added:
        return model
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2

    try:
        proto: Any = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]  # at run time
    except DecodeError:
        return model  # the reader of models says what is wrong
    known = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    size = len(known)
    beyond = {number: entry for number, entry in added.items() if number >= size}
    for number, (token, _) in beyond.items():
        if _as_piece(token) in known:
            raise UserError(f"the added token {token!r} has id {number}, but {known[_as_piece(token)]} in the model")
    if not beyond:
        return model
    for number in range(size, max(beyond) + 1):
        token, special = beyond.get(number, (f"[unused{number}]", None))
        kind = _UNUSED if special is None else _CONTROL if special else _USER_DEFINED
        proto.pieces.add(piece=_as_piece(token), score=-1000.0, type=kind)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString()


def _as_piece(token: str) -> str:
    return token.replace(" ", _SPACE)


def _added(listed: Mapping[str, Any], config: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """id -> (token, whether it is special)."""
    named = [config.get(name) for name in _NAMED]
    special = {_content(token) for token in (*named, *(config.get("additional_special_tokens") or ()))}
    found: dict[int, tuple[str, bool]] = {}
    entries = [(number, token, token in special) for token, number in listed.items()]
    for number, entry in (config.get("added_tokens_decoder") or {}).items():
        flag = isinstance(entry, Mapping) and bool(entry.get("special"))
        entries.append((int(number) if number.isdecimal() else number, _content(entry), flag))
    for number, token, flag in entries:
        if not isinstance(number, int) or not isinstance(token, str) or not 0 <= number < 2**31:
            raise UserError(f"the added token {token!r} has id {number!r}; allowed: a string with a whole number")
        if found.setdefault(number, (token, flag))[0] != token:
            raise UserError(f"the id {number} has two added tokens, {found[number][0]!r} and {token!r}")
        found[number] = (token, flag or found[number][1])
    return found


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, Mapping) else token
