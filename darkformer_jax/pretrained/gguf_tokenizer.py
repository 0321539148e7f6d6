"""The vocabulary inside a GGUF file: SentencePiece (Llama 1 and 2, Mistral, TinyLlama, Gemma) or byte-level BPE.

For SentencePiece, the file has the pieces with their scores and types. It leaves out what llama.cpp and the published
models take for granted: BPE by score, bytes for text that has no piece, spaces written as U+2581, and text otherwise
unchanged. For byte-level BPE, the file names how text is split before merges apply: see `gguf_words`.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import tokenizers as hf

from darkformer_jax.data.tokenizer_config import new_hf_config
from darkformer_jax.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from darkformer_jax.errors import UserError
from darkformer_jax.pretrained.gguf_words import SPLITS, Split
from darkformer_jax.pretrained.hf_config import HFConfig

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # in SentencePiece
_SENTENCEPIECE, _BYTE_LEVEL = "llama", "gpt2"  # as llama.cpp calls them
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6  # token types, with the same numbers as in SentencePiece


class GGUFVocabulary(HFConfig):
    """The fields of a file below `tokenizer.ggml`.

    Raises:
      UserError: the vocabulary cannot be rebuilt: its kind or its way to split text is unknown, or no token ends a
        document.
    """

    def __init__(self, metadata: Mapping[str, Any], path: str) -> None:
        super().__init__(metadata, path)
        if metadata.get("tokenizer.ggml.model") not in (_SENTENCEPIECE, _BYTE_LEVEL):
            raise self.error(
                "tokenizer.ggml.model",
                f"cannot be rebuilt exactly; allowed: {_SENTENCEPIECE} (SentencePiece), {_BYTE_LEVEL} (byte-level BPE);"
                " convert the model's Hugging Face directory instead",
            )
        if metadata["tokenizer.ggml.model"] == _BYTE_LEVEL:
            self._split()
        if metadata.get("tokenizer.ggml.eos_token_id") is None:
            raise UserError(f"{path}: tokenizer.ggml.eos_token_id is missing: no token ends a document")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises UserError if it cannot be rebuilt exactly, or is damaged."""
        tokens = self._list("tokens", str)
        if self.values["tokenizer.ggml.model"] == _SENTENCEPIECE:
            return self._sentencepiece(tokens)
        return self._byte_level(tokens)

    def _sentencepiece(self, tokens: list[str]) -> Tokenizer:
        scores = self._list("scores", float, len(tokens))
        types = self._list("token_type", int, len(tokens))
        if types.count(_BYTE) not in (0, 256):
            raise UserError(f"{self.path}: tokenizer.ggml.token_type has {types.count(_BYTE)} bytes; allowed: 0, 256")
        if not all(math.isfinite(score) for score in scores):
            raise UserError(f"{self.path}: tokenizer.ggml.scores has a number that is not finite")
        if len({score for score, kind in zip(scores, types, strict=True) if kind == _NORMAL}) == 1:
            # Some converters write it so for vocabularies that they take from a tokenizer.json.
            raise UserError(
                f"{self.path}: tokenizer.ggml.scores are all equal, so that the order of merges is lost; convert the "
                "model's Hugging Face directory instead"
            )
        config: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
        if "tokenizer.ggml.bos_token_id" in self.values:
            config["bos_token"] = self._mark("bos", tokens)
        config["eos_token"] = self._mark("eos", tokens)
        config["add_bos_token"] = self.flag("tokenizer.ggml.add_bos_token", True) and "bos_token" in config
        config["add_prefix_space"] = self.flag("tokenizer.ggml.add_space_prefix", True)
        config |= self._extras(tokens)
        try:
            return SentencePieceTokenizer(_sentencepiece_model(tokens, scores, types, config), config)
        except (UserError, TypeError, ValueError) as error:
            raise UserError(f"{self.path}: tokenizer.ggml.tokens cannot be read: {error}") from error

    def _byte_level(self, tokens: list[str]) -> Tokenizer:
        split, merges = self._split(), self._list("merges", str)
        vocabulary = {token: number for number, token in enumerate(tokens)}
        if len(vocabulary) != len(tokens):
            raise UserError(f"{self.path}: tokenizer.ggml.tokens has a token twice")
        types = [1] * len(tokens)
        if self.values.get("tokenizer.ggml.token_type"):
            types = self._list("token_type", int, len(tokens))
        adds_bos = self.flag("tokenizer.ggml.add_bos_token", split.begins_with_bos)
        bos = self._mark("bos", tokens) if adds_bos else None
        eos = self._mark("eos", tokens)
        config = new_hf_config(bos, eos) | self._extras(tokens)
        try:
            definition = _byte_level_json(vocabulary, merges, types, split, bos)
            return HuggingFaceTokenizer(definition, bos, eos, config=config)
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{self.path}: tokenizer.ggml.merges do not fit the vocabulary: {error}") from error

    def _split(self) -> Split:
        name = self.values.get("tokenizer.ggml.pre")
        if name in (None, "default"):  # the converter did not know the tokenizer, and llama.cpp guesses
            why = "the file does not say how its tokenizer splits text; convert the Hugging Face directory instead, or"
            raise self.error("tokenizer.ggml.pre", f"{why} a file that says it: {', '.join(SPLITS)}")
        return SPLITS[self.choice("tokenizer.ggml.pre", tuple(SPLITS))]

    def _extras(self, tokens: list[str]) -> dict[str, Any]:
        """What a tokenizer_config.json has beside the ends of a document: the padding token and the chat template."""
        extras: dict[str, Any] = {}
        if "tokenizer.ggml.padding_token_id" in self.values:
            extras["pad_token"] = self._mark("padding", tokens)
        templates = {"default": self.values.get("tokenizer.chat_template")}
        for name in self.strings("tokenizer.chat_templates") or []:
            templates[name] = self.values.get(f"tokenizer.chat_template.{name}")
        for name, template in templates.items():
            if template is not None and not isinstance(template, str):
                raise self.error("tokenizer.chat_template" + f".{name}" * (name != "default"), "must be a string")
        # Files made from Mistral's own format may have the name of a template that is inside llama.cpp: "mistral-v7".
        found = {name: template for name, template in templates.items() if template and "{" in template}
        if list(found) == ["default"]:
            extras["chat_template"] = found["default"]
        elif found:
            extras["chat_template"] = [{"name": name, "template": found[name]} for name in found]
        return extras

    def _list(self, name: str, kind: type, length: int | None = None) -> list[Any]:
        """tokenizer.ggml.<name>, which must be a list of `kind`, with `length` entries if that is given."""
        values = self.values.get(f"tokenizer.ggml.{name}")
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise UserError(f"{self.path}: tokenizer.ggml.{name} must be a list of {kind.__name__}")
        if length is not None and len(values) != length:
            raise UserError(f"{self.path}: tokenizer.ggml.{name} has {len(values)} entries for {length} tokens")
        return values

    def _mark(self, name: str, tokens: list[str]) -> str:
        """The token whose id is tokenizer.ggml.<name>_token_id."""
        return tokens[self.integer(f"tokenizer.ggml.{name}_token_id", smallest=0, largest=len(tokens) - 1)]


def _sentencepiece_model(tokens: list[str], scores: list[float], types: list[int], config: Mapping[str, Any]) -> bytes:
    """The bytes of the .model from which these pieces come."""
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time
    for token, score, kind in zip(tokens, scores, types, strict=True):
        # llama.cpp's converter writes the spaces of user-defined pieces as they are in text.
        model.pieces.add(piece=token.replace(" ", _SPACE), score=score, type=kind)
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


def _byte_level_json(
    vocabulary: dict[str, int], merges: list[str], types: list[int], split: Split, bos: str | None
) -> bytes:
    """The bytes of a tokenizer.json."""
    tokenizer = hf.Tokenizer(hf.models.BPE(ignore_merges=split.whole_words_first))
    if split.nfc:
        tokenizer.normalizer = hf.normalizers.NFC()
    tokenizer.pre_tokenizer = split.pre_tokenizer()
    tokenizer.decoder = hf.decoders.ByteLevel()
    if bos is not None:  # so that programs that read only the tokenizer.json add it too
        tokenizer.post_processor = hf.processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, vocabulary[bos])]
        )
    # Vocabulary and merges go into the JSON, not into the tokenizer, which would hold them a second time.
    definition = json.loads(tokenizer.to_str())
    definition["model"] |= {"vocab": vocabulary, "merges": merges}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    definition["added_tokens"] = [
        {"id": number, "content": token, **plain, "special": kind == _CONTROL}
        for (token, number), kind in zip(vocabulary.items(), types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    return json.dumps(definition, ensure_ascii=False).encode("utf-8")
