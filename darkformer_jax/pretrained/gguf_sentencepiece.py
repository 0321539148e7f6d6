"""The SentencePiece vocabulary inside a GGUF file (Llama 1 and 2, Mistral, TinyLlama), as the .model it was made from.

The file has the pieces with their scores and types. What it leaves out is what llama.cpp takes for granted, as do the
published models: BPE by score, bytes for what has no piece, spaces written as U+2581, and text otherwise left alone.
"""

import math
from collections.abc import Mapping
from typing import Any

from darkformer_jax.data.tokenizers import SentencePieceTokenizer
from darkformer_jax.errors import UserError

_BYTE = 6  # piece types have the same numbers in both formats


def read_gguf_sentencepiece(path: str, metadata: Mapping[str, Any]) -> SentencePieceTokenizer:
    """The tokenizer of a file whose tokenizer.ggml.model is "llama". Raises UserError where its parts do not fit."""
    tokens = list_of(path, metadata, "tokens", str)
    scores = list_of(path, metadata, "scores", float, len(tokens))
    types = list_of(path, metadata, "token_type", int, len(tokens))
    if types.count(_BYTE) not in (0, 256):
        raise UserError(f"{path}: tokenizer.ggml.token_type has {types.count(_BYTE)} bytes; allowed: 0, 256")
    if not all(math.isfinite(score) for score in scores):
        raise UserError(f"{path}: tokenizer.ggml.scores has a number that is not finite")
    config: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    if "tokenizer.ggml.bos_token_id" in metadata:
        config["bos_token"] = marking_token(path, metadata, "bos", tokens)
    config["eos_token"] = marking_token(path, metadata, "eos", tokens)
    config["add_bos_token"] = flag_of(path, metadata, "add_bos_token", True) and "bos_token" in config
    config["add_prefix_space"] = flag_of(path, metadata, "add_space_prefix", True)
    try:
        return SentencePieceTokenizer(_model(tokens, scores, types, config), config)
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"{path}: tokenizer.ggml.tokens cannot be read: {error}") from error


def _model(tokens: list[str], scores: list[float], types: list[int], config: Mapping[str, Any]) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time
    for token, score, kind in zip(tokens, scores, types, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = _BYTE in types
    trainer.bos_piece = config.get("bos_token", trainer.bos_piece)
    trainer.eos_piece = config["eos_token"]
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = config["add_prefix_space"]
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString()


def list_of(path: str, metadata: Mapping[str, Any], name: str, kind: type, length: int | None = None) -> list[Any]:
    """tokenizer.ggml.<name>, a list. Raises UserError where it is none of `kind`, or not as long as the tokens are."""
    values = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise UserError(f"{path}: tokenizer.ggml.{name} must be a list of {kind.__name__}")
    if length is not None and len(values) != length:
        raise UserError(f"{path}: tokenizer.ggml.{name} has {len(values)} entries for {length} tokens")
    return values


def flag_of(path: str, metadata: Mapping[str, Any], name: str, absent: bool) -> bool:
    """tokenizer.ggml.<name>, true or false."""
    value = metadata.get(f"tokenizer.ggml.{name}", absent)
    if not isinstance(value, bool):
        raise UserError(f"{path}: tokenizer.ggml.{name} = {value!r}: must be true or false")
    return value


def marking_token(path: str, metadata: Mapping[str, Any], name: str, tokens: list[str]) -> str:
    """The token that tokenizer.ggml.<name>_token_id stands for."""
    number = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if not isinstance(number, int) or not 0 <= number < len(tokens):
        raise UserError(f"{path}: tokenizer.ggml.{name}_token_id = {number!r}: the vocabulary has {len(tokens)} ids")
    return tokens[number]
