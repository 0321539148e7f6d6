"""GGUF files: dequantised, rows of q and k put back in order, the vocabulary rebuilt; and what is refused."""

import inspect
import io
import json
import os
import sys

import numpy as np
import pytest
import tokenizers as hf

from darkformer_jax.errors import UserError
from darkformer_jax.pretrained.export import export_workdir
from darkformer_jax.pretrained.source import open_source
from darkformer_jax.runs.workdir import Workdir
from tests.pretrained.tiny_sources import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    MLP,
    VOCAB,
    WIDTH,
    import_source,
    llama_arrays,
)

gguf = pytest.importorskip("gguf")

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    """model.layers.0.self_attn.q_proj.weight -> blk.0.attn_q.weight"""
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, *middle, _ = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(middle)]}.weight"


def interleaved(value, heads):
    """What llama.cpp's converter does to the rows of q and k."""
    return value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)


def bpe():
    """A byte-level BPE of VOCAB + 3 tokens with a few merges, two of its tokens special."""
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())[: VOCAB - 4]
    return ["<|endoftext|>", "<|im_end|>", *alphabet, "12", "34"], ["1 2", "3 4"]


def write(path, *, arrays=None, architecture="llama", interleave=True, quantise=(), change=None, **metadata):
    """A GGUF file of CONFIG's model. `quantise`: names -> kind; `change(writer)` adds to it."""
    arrays = llama_arrays() if arrays is None else arrays
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokens, merges = bpe()
    writer.add_tokenizer_model(metadata.pop("model", "gpt2"))
    writer.add_tokenizer_pre(metadata.pop("pre", "smollm"))
    writer.add_token_list(metadata.pop("tokens", tokens))
    writer.add_token_types(metadata.pop("token_types", [3, 3] + [1] * (len(tokens) - 2)))
    writer.add_token_scores(metadata.pop("scores", [0.0] * len(tokens)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(metadata.pop("bos", 0))
    writer.add_eos_token_id(metadata.pop("eos", 1))
    for name, value in metadata.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(name.replace("__", "."), value)
    for name, value in arrays.items():
        heads = HEADS if ".q_proj." in name else KV_HEADS
        if interleave and (".q_proj." in name or ".k_proj." in name):
            value = interleaved(value, heads)
        kind = dict(quantise).get(name)
        if kind is None:
            writer.add_tensor(gguf_name(name), value)
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(value, kind), raw_dtype=kind)
    if change:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def everything(source):
    """All arrays of a source, by Hugging Face's names."""
    return {name: source.read(name, tuple(slice(0, n) for n in a.shape)) for name, a in source.arrays.items()}


def test_the_llama_rows_are_put_back(tmp_path):
    source = open_source(str(write(tmp_path / "m.gguf")))
    found = everything(source)
    assert found.keys() == llama_arrays().keys()
    for name, value in llama_arrays().items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    q = "model.layers.0.self_attn.q_proj.weight"
    part = source.read(q, (slice(HEAD_DIM, 3 * HEAD_DIM), slice(2, 9)))
    np.testing.assert_array_equal(part, llama_arrays()[q][HEAD_DIM : 3 * HEAD_DIM, 2:9])


def test_qwens_rows_are_in_order(tmp_path):
    found = everything(open_source(str(write(tmp_path / "m.gguf", architecture="qwen2", interleave=False))))
    for name, value in llama_arrays().items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "F16", "BF16"])
def test_quantisations(tmp_path, kind):
    arrays = llama_arrays()
    name = "model.layers.0.mlp.down_proj.weight"
    arrays[name] = np.random.default_rng(0).normal(0, 0.3, (WIDTH, 64)).astype(np.float32)
    quantisation = gguf.GGMLQuantizationType[kind]
    path = write(tmp_path / "m.gguf", arrays=arrays, quantise={name: quantisation})
    found = open_source(str(path)).read(name, (slice(3, 9), slice(5, 60)))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, arrays[name][3:9, 5:60], atol=0.15)
    dequantised = gguf.quants.dequantize(gguf.quants.quantize(arrays[name], quantisation), quantisation)
    np.testing.assert_array_equal(found, dequantised[3:9, 5:60])


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_blocks_of_256(tmp_path, kind):
    """gguf dequantises these and does not quantise them: random bytes are blocks, too."""
    quantisation = gguf.GGMLQuantizationType[kind]
    row_bytes = gguf.quant_shape_to_byte_shape((WIDTH, 512), quantisation)[1]
    raw = np.random.default_rng(0).integers(0, 60, (WIDTH, row_bytes), np.uint8)
    arrays = llama_arrays()
    name = "model.layers.0.mlp.down_proj.weight"
    del arrays[name]
    path = write(
        tmp_path / "m.gguf",
        arrays=arrays,
        change=lambda writer: writer.add_tensor(gguf_name(name), raw, raw_dtype=quantisation),
    )
    source = open_source(str(path))
    assert source.arrays[name].shape == (WIDTH, 512)
    found = source.read(name, (slice(2, 7), slice(None)))
    np.testing.assert_array_equal(found, gguf.quants.dequantize(raw, quantisation)[2:7])


def test_config_and_tokenizer(tmp_path):
    model = import_source(write(tmp_path / "m.gguf"), tmp_path / "workdir")
    fields = model.config.model
    assert (fields.norm_eps, fields.num_kv_heads, fields.tie_embeddings) == (1e-5, KV_HEADS, True)
    assert model.config.sequence_length == 64 and fields.dtype == "float32"
    tokens, _ = bpe()
    tokenizer = model.tokenizer
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.adds_bos) == (len(tokens), 1, False)
    text = "12 34"
    assert tokenizer.decode(tokenizer.encode("1234")) == "1234"
    assert tokenizer.encode("1") == [tokens.index("1")]
    assert tokenizer.encode(text)[0] == tokens.index("1")  # smollm: every digit stands alone, so "12" is no word


def test_bos_of_llama_3(tmp_path):
    tokenizer = open_source(str(write(tmp_path / "m.gguf", pre="llama-bpe"))).tokenizer()
    tokens, _ = bpe()
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


def sentencepiece_fields(model):
    """What llama.cpp's converter writes of a .model."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    tokens, scores, types = map(list, zip(*pieces, strict=True))
    return {"model": "llama", "tokens": tokens, "scores": scores, "token_types": types, "bos": 1, "eos": 2}


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary(tmp_path, prefix):
    """Token for token as the .model it was written from, on real text and on what has no piece."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model())
    proto.normalizer_spec.add_dummy_prefix = prefix
    original = SentencePieceProcessor(model_proto=proto.SerializeToString())
    fields = sentencepiece_fields(proto.SerializeToString())
    path = write(
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
    fields = sentencepiece_fields(sentencepiece_model()) if form == "sentencepiece" else {}
    arrays = llama_arrays()
    if fields:
        arrays["model.embed_tokens.weight"] = np.ones((len(fields["tokens"]), WIDTH), np.float32)
    fields |= {"tokenizer__chat_template": template, "tokenizer__ggml__padding_token_id": 1}
    model = import_source(write(tmp_path / "m.gguf", arrays=arrays, **fields), tmp_path / "workdir")
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

    tokenizer = open_source(str(write(tmp_path / "m.gguf", change=templates))).tokenizer()
    assert tokenizer.chat_template == "d"
    tokenizer.save(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())["chat_template"]
    assert {entry["name"]: entry["template"] for entry in saved} == {"default": "d", "tool_use": "t"}


def test_the_bos_of_a_tokenizer_json_is_in_its_post_processor(tmp_path):
    """So that transformers, which reads it there, places the same BOS from an export."""
    for pre, first in (("llama-bpe", [0]), ("smollm", [])):
        open_source(str(write(tmp_path / "m.gguf", pre=pre))).tokenizer().save(str(tmp_path / pre))
        read = hf.Tokenizer.from_file(str(tmp_path / pre / "tokenizer.json"))
        assert read.encode("1").ids == first + read.encode("1", add_special_tokens=False).ids


def test_the_scaling_of_llama_31(tmp_path):
    def factors(values):
        return lambda writer: writer.add_tensor("rope_freqs.weight", np.array(values, np.float32))

    # Of theta = 10000 and a head of 4: one frequency turns often in 8,192 tokens, the other 13 times.
    path = write(tmp_path / "m.gguf", change=factors([1.0, 1.0]))
    assert open_source(str(path)).config.values["rope_scaling"]["rope_type"] == "llama3"
    path = write(tmp_path / "n.gguf", change=factors([1.0, 3.0]))
    with pytest.raises(UserError, match=r"n.gguf: array rope_freqs.weight is not the RoPE scaling of Llama 3.1"):
        open_source(str(path))
    path = write(tmp_path / "o.gguf", llama__rope__scaling__type="yarn")
    with pytest.raises(UserError, match='rope.scaling.type = "yarn": allowed: none, linear'):
        open_source(str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "mamba"}, 'general.architecture = "mamba": allowed: llama, qwen2, qwen3'),
        (
            {"model": "t5"},
            'tokenizer.ggml.model = "t5": cannot be rebuilt exactly; allowed: llama (SentencePiece), gpt2',
        ),
        ({"model": "llama", "token_types": [2, 6, 6]}, "tokenizer.ggml.token_type has 3 entries for"),
        ({"model": "llama", "token_types": [3, 6] + [1] * (VOCAB - 2)}, "tokenizer.ggml.token_type has 1 bytes"),
        ({"model": "llama"}, "tokenizer.ggml.tokens cannot be read: not a SentencePiece model"),
        ({"tokenizer__ggml__add_bos_token": "false"}, 'tokenizer.ggml.add_bos_token = "false": must be true or false'),
        (
            {"model": "llama", "tokenizer__ggml__add_space_prefix": "no"},
            'tokenizer.ggml.add_space_prefix = "no": must be true or false',
        ),
        ({"bos": 999}, "bos_token_id = 999: must be an id from 0 to 63"),
        ({"pre": "jina"}, 'tokenizer.ggml.pre = "jina": allowed: gpt-2, smollm'),
        ({"llama__expert_count": 8}, "mixtures of experts are not supported"),
        ({"llama__rope__dimension_count": 2}, "rope.dimension_count = 2: must equal the head size, 4"),
        (
            {"change": lambda writer: writer.add_tensor("blk.0.attn_sinks.weight", np.zeros(4, np.float32))},
            "array blk.0.attn_sinks.weight is not part of a model that is read from GGUF",
        ),
        (
            {"change": lambda writer: writer.add_tensor("output.weight", np.zeros((3, WIDTH), np.float32))},
            f"array lm_head.weight has shape [3, {WIDTH}]; m.gguf makes it [{VOCAB}, {WIDTH}]",
        ),
        (
            {
                "quantise": {"model.embed_tokens.weight": gguf.GGMLQuantizationType.Q5_1},
                "arrays": llama_arrays() | {"model.embed_tokens.weight": np.zeros((VOCAB, 32), np.float32)},
            },
            "array token_embd.weight is Q5_1; allowed: F32, F16, BF16, Q8_0",
        ),
        ({"arrays": {k: v for k, v in llama_arrays().items() if "0.mlp.up" not in k}}, "mlp.up_proj.weight is missing"),
        ({"tokens": [f"t{i}" for i in range(VOCAB)] + ["x"] * 9}, "tokenizer.ggml.tokens has a token twice"),
    ],
)
def test_what_is_refused(tmp_path, options, message):
    path = write(tmp_path / "m.gguf", **options)
    with pytest.raises(UserError) as error:
        import_source(path, tmp_path / "workdir")
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_truncated_and_damaged_files(tmp_path):
    path = write(tmp_path / "m.gguf")
    whole = path.read_bytes()
    for damaged, message in (
        (whole[:-2000], "truncated: array "),
        (whole[:700], "truncated, damaged or no GGUF file: it ends in the middle of its header"),
        (b"", "it does not begin with GGUF"),
        (b"GGML" + whole[4:], "it does not begin with GGUF"),
        (whole[:4] + b"\x09" + whole[5:], "version 9; allowed: 2, 3"),
        (whole[:24] + b"\xff" * 8 + whole[32:], "truncated, damaged or no GGUF file"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError) as error:
            open_source(str(path))
        assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_without_the_package_gguf(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "darkformer_jax.pretrained.gguf_file", raising=False)
    with pytest.raises(UserError, match=r"m.gguf: GGUF files need the package gguf: .* or pip install gguf"):
        open_source(str(path))
