"""The vocabulary inside a GGUF file: SentencePiece, or byte-level BPE with a known splitting of text."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import tokenizers as hf

from darkformer_jax.data.tokenizers import HuggingFaceTokenizer, Tokenizer
from darkformer_jax.errors import UserError
from darkformer_jax.pretrained.gguf_sentencepiece import flag_of, list_of, marking_token, read_gguf_sentencepiece

_SENTENCEPIECE, _BYTE_LEVEL = "llama", "gpt2"  # as llama.cpp calls them
_CONTROL, _USER_DEFINED = 3, 4  # token types

_WORDS_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS_QWEN2 = _WORDS_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _byte_level(use_regex: bool) -> Any:
    return hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _split(pattern: str) -> Any:
    words = hf.pre_tokenizers.Split(hf.Regex(pattern), "isolated")
    return hf.pre_tokenizers.Sequence([words, _byte_level(False)])


def _digits_apart() -> Any:
    return hf.pre_tokenizers.Sequence([hf.pre_tokenizers.Digits(individual_digits=True), _byte_level(True)])


# How text is split before merges apply, by the name that llama.cpp gives it.
_PRE_TOKENIZERS: Mapping[str, Callable[[], Any]] = {
    "gpt-2": lambda: _byte_level(True),
    "smollm": _digits_apart,
    "llama-bpe": lambda: _split(_WORDS_LLAMA3),
    "qwen2": lambda: _split(_WORDS_QWEN2),
}
_WHOLE_WORDS_FIRST = ("llama-bpe",)  # a word of the vocabulary is taken as it is, whatever the merges say
_BEGINS_WITH_BOS = ("llama-bpe",)  # where the file does not say
_NFC = ("qwen2",)


def check_gguf_tokenizer(path: str, metadata: Mapping[str, Any]) -> None:
    """Raises UserError for a vocabulary that cannot be rebuilt: of another kind, or split in an unknown way."""
    kind, pre = (metadata.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind not in (_SENTENCEPIECE, _BYTE_LEVEL):
        raise UserError(
            f"{path}: tokenizer.ggml.model = {kind!r} cannot be rebuilt exactly; allowed: {_SENTENCEPIECE} "
            f"(SentencePiece), {_BYTE_LEVEL} (byte-level BPE); convert the model's Hugging Face directory instead"
        )
    if kind == _BYTE_LEVEL and pre not in _PRE_TOKENIZERS:
        raise UserError(f"{path}: tokenizer.ggml.pre = {pre!r}: allowed: {', '.join(_PRE_TOKENIZERS)}")
    if metadata.get("tokenizer.ggml.eos_token_id") is None:
        raise UserError(f"{path}: tokenizer.ggml.eos_token_id is missing: no token ends a document")


def read_gguf_tokenizer(path: str, metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file. Raises UserError where it cannot be rebuilt exactly, or is damaged."""
    check_gguf_tokenizer(path, metadata)
    if metadata["tokenizer.ggml.model"] == _SENTENCEPIECE:
        return read_gguf_sentencepiece(path, metadata)
    pre = metadata["tokenizer.ggml.pre"]
    tokens, merges = list_of(path, metadata, "tokens", str), list_of(path, metadata, "merges", str)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise UserError(f"{path}: tokenizer.ggml.tokens has a token twice")
    types = [1] * len(tokens)
    if metadata.get("tokenizer.ggml.token_type"):
        types = list_of(path, metadata, "token_type", int, len(tokens))
    adds_bos = flag_of(path, metadata, "add_bos_token", pre in _BEGINS_WITH_BOS)
    bos = marking_token(path, metadata, "bos", tokens) if adds_bos else None
    eos = marking_token(path, metadata, "eos", tokens)
    try:
        return HuggingFaceTokenizer(_definition(vocabulary, merges, types, pre, bos), bos, eos)
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: tokenizer.ggml.merges do not fit the vocabulary: {error}") from error


def _definition(vocabulary: dict[str, int], merges: list[str], types: list[int], pre: str, bos: str | None) -> bytes:
    """The bytes of a tokenizer.json."""
    tokenizer = hf.Tokenizer(hf.models.BPE(ignore_merges=pre in _WHOLE_WORDS_FIRST))
    if pre in _NFC:
        tokenizer.normalizer = hf.normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = hf.decoders.ByteLevel()
    if bos is not None:  # so that programs that read the tokenizer.json alone place it, too
        tokenizer.post_processor = hf.processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, vocabulary[bos])]
        )
    # Vocabulary and merges join the text rather than the tokenizer, which would hold them a second time.
    definition = json.loads(tokenizer.to_str())
    definition["model"] |= {"vocab": vocabulary, "merges": merges}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    definition["added_tokens"] = [
        {"id": number, "content": token, **plain, "special": kind == _CONTROL}
        for (token, number), kind in zip(vocabulary.items(), types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    return json.dumps(definition, ensure_ascii=False).encode("utf-8")
