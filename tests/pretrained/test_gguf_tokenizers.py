"""The vocabulary of a GGUF file gives the ids of the tokenizer that it was written from."""

import inspect
import io
import json

import numpy as np
import pytest
import tokenizers as hf

from darkformer_jax.pretrained.export import export_workdir
from darkformer_jax.pretrained.source import open_source
from darkformer_jax.runs.workdir import Workdir
from tests.pretrained.tiny_gguf import byte_level_vocabulary, sentencepiece_vocabulary, write_llama_gguf
from tests.pretrained.tiny_sources import VOCAB, WIDTH, import_source, llama_arrays


def test_smollm_splits_digits(tmp_path):
    tokens = byte_level_vocabulary(VOCAB)["tokens"]
    tokenizer = open_source(str(write_llama_gguf(tmp_path / "m.gguf"))).tokenizer()
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.adds_bos) == (len(tokens), 1, False)
    text = "12 34"
    assert tokenizer.decode(tokenizer.encode("1234")) == "1234"
    assert tokenizer.encode("1") == [tokens.index("1")]
    assert tokenizer.encode(text)[0] == tokens.index("1")  # smollm: every digit stands alone, so "12" is no word


def test_bos_of_llama_3(tmp_path):
    tokenizer = open_source(str(write_llama_gguf(tmp_path / "m.gguf", pre="llama-bpe"))).tokenizer()
    tokens = byte_level_vocabulary(VOCAB)["tokens"]
    assert tokenizer.adds_bos and tokenizer.bos_id == 0
    assert tokenizer.encode("12") == [tokens.index("12")]


def sentencepiece_model():
    """A .model as Llama's: BPE, bytes for what has no piece, text left alone."""
    sentencepiece = pytest.importorskip("sentencepiece")
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
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model())
    proto.normalizer_spec.add_dummy_prefix = prefix
    original = SentencePieceProcessor(model_proto=proto.SerializeToString())
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
        writer.add_chat_template([{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}])

    tokenizer = open_source(str(write_llama_gguf(tmp_path / "m.gguf", change=templates))).tokenizer()
    assert tokenizer.chat_template == "d"
    tokenizer.save(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())["chat_template"]
    assert {entry["name"]: entry["template"] for entry in saved} == {"default": "d", "tool_use": "t"}


def test_the_bos_of_a_tokenizer_json_is_in_its_post_processor(tmp_path):
    """So that transformers, which reads it there, places the same BOS from an export."""
    for pre, first in (("llama-bpe", [0]), ("smollm", [])):
        open_source(str(write_llama_gguf(tmp_path / "m.gguf", pre=pre))).tokenizer().save(str(tmp_path / pre))
        read = hf.Tokenizer.from_file(str(tmp_path / pre / "tokenizer.json"))
        assert read.encode("1").ids == first + read.encode("1", add_special_tokens=False).ids
