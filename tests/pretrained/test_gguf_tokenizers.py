"""The vocabulary of a GGUF file gives the ids of the tokenizer that it was written from."""

import inspect
import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf

from darkformer_jax.errors import UserError
from darkformer_jax.pretrained.export import export_workdir
from darkformer_jax.pretrained.source import open_source
from darkformer_jax.runs.workdir import Workdir
from tests.pretrained.tiny_gguf import sentencepiece_vocabulary, write_llama_gguf
from tests.pretrained.tiny_sources import VOCAB, WIDTH, import_source, llama_arrays

transformers = pytest.importorskip("transformers")

# What splits treat differently: digits, runs of spaces, contractions, cases, marks, composed letters, slashes.
TEXTS = [
    "3 33 333 3333 3.14 in 2024,\u0663\u0664\u0665 x12y",
    "  two\n\n \n\tspaces    \r\n\n  end  ",
    "I've DON'T we'Ll it's 'told he'D",
    "camelCase HTTPServer McDonald \u01c5ep \u00c9COLE",
    "caf\u00e9 cafe\u0301 \u0939\u093f\u0928\u094d\u0926\u0940 \u0e01\u0e33\u0e25\u0e31\u0e07",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f \U0001f680\U0001f636\u200d\U0001f32b\ufe0f!!",
    "https://a.b/c//\n/x ../y\\z ***bold***",
    "",
]
ENDS = ["<|endoftext|>", "<|im_end|>"]


def bytes_as_letters(use_regex):
    return hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


@pytest.fixture(scope="module")
def merges_across_words():
    """A byte-level BPE whose merges know no words, so that splits alone decide; and words that no merge makes."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = bytes_as_letters(False)
    trainer = hf.trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=ENDS,
        initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        min_frequency=2,
    )
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [pair for number, pair in enumerate(model["merges"]) if number % 7]
    return model["vocab"], [tuple(pair) for pair in merges]


def published(vocabulary, merges, *splits, nfc=False, whole_words_first=False):
    """A tokenizer as its tokenizer.json defines it."""
    tokenizer = hf.Tokenizer(hf.models.BPE(vocabulary, merges, ignore_merges=whole_words_first))
    if nfc:
        tokenizer.normalizer = hf.normalizers.NFC()
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Sequence(list(splits))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def pattern(text):
    return hf.pre_tokenizers.Split(hf.Regex(text), "isolated"), bytes_as_letters(False)


def of_transformers(name):
    def ids(vocabulary, merges):
        tokenizer = getattr(transformers, name)(vocab=vocabulary, merges=merges)
        return lambda text: tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    return ids


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = hf.pre_tokenizers.Digits(individual_digits=True), bytes_as_letters(True)
TOKENIZERS = {
    "gpt-2": of_transformers("GPT2Tokenizer"),
    "smollm": lambda *bpe: published(*bpe, *DIGITS),
    "llama-bpe": lambda *bpe: published(*bpe, *pattern(LLAMA3), whole_words_first=True),
    "qwen2": of_transformers("Qwen2Tokenizer"),
    "qwen35": of_transformers("Qwen3_5Tokenizer"),
    "tekken": lambda *bpe: published(*bpe, *pattern(TEKKEN), whole_words_first=True),
}
SAME = {"starcoder": "smollm", "refact": "smollm", "llama3": "llama-bpe", "llama-v3": "llama-bpe"} | {
    "deepseek-r1-qwen": "qwen2"
}


@pytest.mark.parametrize("pre", [*TOKENIZERS, *SAME])
def test_the_ids_are_those_of_the_familys_own_tokenizer(tmp_path, pre, merges_across_words):
    vocabulary, merges = merges_across_words
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    fields = {
        "tokens": tokens,
        "token_types": [3 if token in ENDS else 1 for token in tokens],
        "scores": [0.0] * len(tokens),
        "merges": [" ".join(pair) for pair in merges],
    }
    tokenizer = open_source(str(write_llama_gguf(tmp_path / "m.gguf", pre=pre, **fields))).tokenizer()
    theirs = TOKENIZERS[SAME.get(pre, pre)](vocabulary, merges)
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs(text)
    others = {name: make(vocabulary, merges) for name, make in TOKENIZERS.items() if name != SAME.get(pre, pre)}
    for name, ids in others.items():
        assert any(ids(text) != tokenizer.encode(text) for text in TEXTS), f"{name} cannot be told from {pre}"


@pytest.mark.parametrize(
    ("pre", "stated", "adds"),
    [("llama-bpe", None, True), ("tekken", None, True), ("qwen2", None, False), ("qwen2", True, True)],
)
def test_the_bos_is_what_the_file_says_or_llama_cpps_default(tmp_path, pre, stated, adds):
    stated = {} if stated is None else {"tokenizer__ggml__add_bos_token": stated}
    tokenizer = open_source(str(write_llama_gguf(tmp_path / "m.gguf", pre=pre, **stated))).tokenizer()
    assert (tokenizer.adds_bos, tokenizer.bos_id) == (adds, 0 if adds else 1)
    assert tokenizer.vocab_size == VOCAB and tokenizer.decode(tokenizer.encode("1234")) == "1234"


def gemma_model():
    """A .model as Gemma's: no space before a text, runs of spaces and newlines as pieces, and its order of marks."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(inspect.getsource(inspect).splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        bos_piece="<bos>",
        eos_piece="<eos>",
        control_symbols=["<start_of_turn>"],
        user_defined_symbols=["\n", "\n\n", "\t\t", *("\u2581" * n for n in range(2, 6)), "<b>"],
        minloglevel=2,
    )
    return model.getvalue()


def test_gemmas_vocabulary(tmp_path):
    """Its user-defined pieces have plain spaces in the file, as llama.cpp's converter writes them."""
    model = gemma_model()
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = sentencepiece_vocabulary(model)
    assert "   " in vocabulary["tokens"] and (vocabulary["bos"], vocabulary["eos"]) == (2, 1)
    fields = {"tokenizer__ggml__add_space_prefix": False, "tokenizer__ggml__add_bos_token": True}
    tokenizer = open_source(str(write_llama_gguf(tmp_path / "m.gguf", **vocabulary, **fields))).tokenizer()
    assert (tokenizer.adds_bos, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (True, 2, 1, 600)
    assert len(tokenizer.encode("a" + 5 * " " + "\n\n")) == 3
    for text in (*TEXTS, "a" + 13 * " " + "b", "<start_of_turn>user\n<b> x</b>", inspect.getsource(io)):
        assert tokenizer.encode(text) == original.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pre": "default"}, 'tokenizer.ggml.pre = "default": the file does not say how its tokenizer splits text'),
        ({"pre": "jina-de"}, 'tokenizer.ggml.pre = "jina-de": allowed: gpt-2, smollm, starcoder, refact, llama-bpe'),
        ({"scores": [-1000.0] * 600}, "tokenizer.ggml.scores are all equal, so that the order of merges is lost"),
    ],
)
def test_a_vocabulary_that_lacks_what_ids_depend_on_is_refused(tmp_path, fields, message):
    vocabulary = sentencepiece_vocabulary(gemma_model()) if "scores" in fields else {}
    path = write_llama_gguf(tmp_path / "m.gguf", **vocabulary | fields)
    with pytest.raises(UserError) as error:
        open_source(str(path)).tokenizer()
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def sentencepiece_model():
    """A .model as Llama's: BPE, bytes for what has no piece, text left alone."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(inspect.getsource(inspect).splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<|tool|>"],
        minloglevel=2,
    )
    return model.getvalue()


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary(tmp_path, prefix):
    """Token for token as the .model it was written from, on real text and on what has no piece."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model())
    proto.normalizer_spec.add_dummy_prefix = prefix
    original = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    fields = sentencepiece_vocabulary(proto.SerializeToString())
    path = write_llama_gguf(
        tmp_path / "m.gguf", change=lambda writer: writer.add_bool("tokenizer.ggml.add_space_prefix", prefix), **fields
    )
    tokenizer = open_source(str(path)).tokenizer()
    assert (tokenizer.adds_bos, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (True, 1, 2, 600)
    for text in (
        inspect.getsource(io),
        "  two\n\n\tspaces ",
        "caf\u00e9 \u4f60\u597d \U0001f600",
        "<s> a <|tool|>b",
        "",
    ):
        assert tokenizer.encode(text) == original.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("form", ["byte-level", "sentencepiece"])
def test_the_chat_template_and_the_padding_token_go_into_the_export(tmp_path, form):
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    fields = sentencepiece_vocabulary(sentencepiece_model()) if form == "sentencepiece" else {}
    arrays = llama_arrays()
    if fields:
        arrays["model.embed_tokens.weight"] = np.ones((len(fields["tokens"]), WIDTH), np.float32)
    fields |= {"tokenizer__chat_template": template, "tokenizer__ggml__padding_token_id": 1}
    model = import_source(write_llama_gguf(tmp_path / "m.gguf", arrays=arrays, **fields), tmp_path / "workdir")
    assert model.tokenizer.chat_template == template
    export_workdir(Workdir(tmp_path / "workdir"), str(tmp_path / "exported"))
    config = json.loads((tmp_path / "exported/tokenizer_config.json").read_text())
    assert (config["chat_template"], config["pad_token"]) == (
        template,
        {"byte-level": "<|im_end|>", "sentencepiece": "<s>"}[form],
    )
    assert json.loads((tmp_path / "exported/config.json").read_text())["pad_token_id"] == 1


def test_named_chat_templates_are_kept(tmp_path):
    def templates(writer):
        writer.add_chat_template(
            [{"name": "default", "template": "{{ d }}"}, {"name": "tool_use", "template": "{{ t }}"}]
        )

    tokenizer = open_source(str(write_llama_gguf(tmp_path / "m.gguf", change=templates))).tokenizer()
    assert tokenizer.chat_template == "{{ d }}"
    tokenizer.save(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())["chat_template"]
    assert {entry["name"]: entry["template"] for entry in saved} == {"default": "{{ d }}", "tool_use": "{{ t }}"}


def test_the_name_of_a_template_inside_llama_cpp_is_no_template(tmp_path):
    path = write_llama_gguf(tmp_path / "m.gguf", tokenizer__chat_template="mistral-v7")
    assert open_source(str(path)).tokenizer().chat_template is None


def test_the_bos_of_a_tokenizer_json_is_in_its_post_processor(tmp_path):
    """So that transformers, which reads it there, places the same BOS from an export."""
    for pre, first in (("llama-bpe", [0]), ("smollm", [])):
        open_source(str(write_llama_gguf(tmp_path / "m.gguf", pre=pre))).tokenizer().save(str(tmp_path / pre))
        read = hf.Tokenizer.from_file(str(tmp_path / pre / "tokenizer.json"))
        assert read.encode("1").ids == first + read.encode("1", add_special_tokens=False).ids
