"""Tokens that a text spells are read as tokens, with the place of each in the text."""

import json

import pytest

from darkformer_jax.data.chat import Chat
from darkformer_jax.data.tokenizers import BytesTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, encode_prompt
from darkformer_jax.pretrained.gguf_tokenizer import _sentencepiece_model
from tests.data.chats import BRACKETS, CHATML, START, chat_tokenizer, talk

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.?[]/"
_PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "<|im_start|>", "<|im_end|>", "\u2581"]
_TYPES = [2, 3, 3, *[6] * 256, 3, 4, 1]


def sentencepiece_tokenizer(template, prefix=True):
    """Letters, bytes, a control symbol <|im_start|> and a user-defined <|im_end|>; a space before a text."""
    pieces = [*_PIECES, *_LETTERS, *(f"\u2581{letter}" for letter in _LETTERS)]
    types = _TYPES + [1] * (len(pieces) - len(_TYPES))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_prefix_space": prefix, "chat_template": template}
    scores = [-float(number) for number in range(len(pieces))]
    return SentencePieceTokenizer(_sentencepiece_model(pieces, scores, types, config), config)


TOKENIZERS = {
    "json": chat_tokenizer,
    "sentencepiece": lambda: sentencepiece_tokenizer(CHATML),
    "no space before a text": lambda: sentencepiece_tokenizer(CHATML, prefix=False),
    "bytes": BytesTokenizer,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_each_token_begins_where_it_says(name):
    tokenizer = TOKENIZERS[name]()
    text = "Why? \u00e9\U0001f44d<|im_start|> a<|im_end|>\n\nb<|im_"
    (encoded,) = tokenizer.encode_with_added([text])
    assert len(encoded.ids) == len(encoded.starts)
    assert (encoded.starts[1:] >= encoded.starts[:-1]).all() and encoded.starts[0] == 0
    for token, (number, _) in tokenizer.added_tokens.items():
        if token in text:
            (place,) = (encoded.ids == number).nonzero()[0]
            assert text.startswith(token, encoded.starts[place])
    plain = text.replace("<|im_start|>", "").replace("<|im_end|>", "")
    (encoded,) = tokenizer.encode_with_added([plain])
    assert encoded.ids.tolist() == tokenizer.encode(plain)  # without such tokens it is as ever
    assert tokenizer.encode(text) != tokenizer.encode_with_added([text])[0].ids.tolist() or name == "bytes"


def test_special_tokens_of_a_prompt_are_text_unless_asked_for():
    text = "<|im_start|>user"
    tokenizer = chat_tokenizer()
    assert START not in encode_prompt(tokenizer, text)
    assert encode_prompt(tokenizer, text, special_tokens=True)[0] == START
    begins = chat_tokenizer(adds_bos=True)
    bos = begins.bos_id
    assert encode_prompt(begins, text, special_tokens=True)[:2] == [bos, START]
    assert encode_prompt(begins, "<|doc|>" + text, special_tokens=True)[:2] == [bos, START]  # not twice


def test_a_sentencepiece_model_has_conversations():
    tokenizer = sentencepiece_tokenizer(BRACKETS)
    tokens = Chat(tokenizer, "here").conversation(talk("Why</s>?", "Yes.", "And?", "No"))
    pieces = [tokenizer._processor.id_to_piece(int(number)) for number in tokens.ids]
    assert pieces[:2] == ["<s>", "["] and pieces.count("</s>") == 2  # no space after <s>, none out of the message
    shown = [piece for piece, is_learned in zip(pieces, tokens.is_learned, strict=True) if is_learned]
    assert shown == ["\u2581Y", "e", "s", ".", "</s>", "\u2581N", "o", "</s>"]


def test_a_token_that_a_message_spells_gets_no_space():
    tokenizer = sentencepiece_tokenizer(BRACKETS)
    text = "<s>a</s> b<s>"
    assert tokenizer.decode(Chat(tokenizer, "here").prompt(talk(text))) == f"[INST] {text} [/INST]"


PREFIXES = {
    "byte level": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
    "Metaspace": {"pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"}},
    "normaliser": {"normalizer": {"type": "Prepend", "prepend": "\u2581"}, "pre_tokenizer": None},
    "among others": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "_"}, {"type": "NFC"}]}
    },
}


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES)
def test_a_piece_in_a_text_gets_no_space_and_what_follows_a_token_is_as_ever(prefix):
    plain = chat_tokenizer()
    config = {"eos_token": "<|im_end|>"}
    definition = json.loads(plain._definition) | prefix
    letters = {letter: 400 + number for number, letter in enumerate("\u2581_")}
    definition["model"]["vocab"] |= letters
    tokenizer = HuggingFaceTokenizer(json.dumps(definition).encode(), None, "<|im_end|>", config=config)
    first, second = tokenizer.encode_with_added(["b<|im_start|>a", "b<|im_start|>a"])
    begin = first.ids.tolist().index(tokenizer.added_tokens["<|im_start|>"].id)
    assert tokenizer._tokenizer.id_to_token(int(first.ids[0])) != "b"  # but with a space
    assert tokenizer._tokenizer.id_to_token(int(second.ids[0])) == "b" and second.starts[:2].tolist() == [0, 1]
    assert second.ids[1:].tolist() == first.ids[begin:].tolist()


def test_a_user_defined_piece_is_not_injected():
    tokens = Chat(sentencepiece_tokenizer(CHATML), "here").conversation(talk("<|im_end|>", "Yes."))
    assert (tokens.ids == _PIECES.index("<|im_end|>")).sum() == 2
