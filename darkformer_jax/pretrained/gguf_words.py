"""How byte-level BPE splits text before merges apply, by llama.cpp's names (`tokenizer.ggml.pre`).

The splits are those of the families' own tokenizer.json. Where llama.cpp has an approximation, because its regular
expressions lack classes of characters, the family's counts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import tokenizers as hf

_WORDS_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS_QWEN2 = _WORDS_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_WORDS_QWEN35 = _WORDS_QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Split(NamedTuple):
    """A way to split text.

    Attributes:
      pre_tokenizer: makes the pre-tokenizer of the `tokenizers` library.
      nfc: text is normalised to Unicode's NFC first.
      whole_words_first: a word of the vocabulary stays whole, whatever the merges say.
      begins_with_bos: a BOS precedes a text if the file does not say whether one does.
    """

    pre_tokenizer: Callable[[], Any]
    nfc: bool = False
    whole_words_first: bool = False
    begins_with_bos: bool = False


def _bytes_as_letters(use_regex: bool) -> Any:
    return hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _words(pattern: str) -> Callable[[], Any]:
    def pre_tokenizer() -> Any:
        words = hf.pre_tokenizers.Split(hf.Regex(pattern), "isolated")
        return hf.pre_tokenizers.Sequence([words, _bytes_as_letters(False)])

    return pre_tokenizer


def _gpt2() -> Any:
    return _bytes_as_letters(True)


def _digits_apart() -> Any:
    return hf.pre_tokenizers.Sequence([hf.pre_tokenizers.Digits(individual_digits=True), _bytes_as_letters(True)])


_STARCODER = Split(_digits_apart)
_LLAMA3 = Split(_words(_WORDS_LLAMA3), whole_words_first=True, begins_with_bos=True)
_QWEN2 = Split(_words(_WORDS_QWEN2), nfc=True)
SPLITS = {
    "gpt-2": Split(_gpt2),
    "smollm": _STARCODER,
    "starcoder": _STARCODER,
    "refact": _STARCODER,  # Granite Code
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "qwen35": Split(_words(_WORDS_QWEN35), nfc=True),
    "tekken": Split(_words(_WORDS_TEKKEN), whole_words_first=True, begins_with_bos=True),  # Mistral Nemo and later
}
