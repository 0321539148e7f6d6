"""GGUF files: dequantised, rows of q and k put back in order; and what is refused."""

import os
import sys

import numpy as np
import pytest

from darkformer_jax.errors import UserError
from darkformer_jax.pretrained.source import open_source
from tests.pretrained.tiny_gguf import gguf, llama_gguf_name, write_llama_gguf
from tests.pretrained.tiny_sources import HEAD_DIM, KV_HEADS, VOCAB, WIDTH, import_source, llama_arrays


def everything(source):
    """All arrays of a source, by Hugging Face's names."""
    return {name: source.read(name, tuple(slice(0, n) for n in a.shape)) for name, a in source.arrays.items()}


def test_the_llama_rows_are_put_back(tmp_path):
    source = open_source(str(write_llama_gguf(tmp_path / "m.gguf")))
    found = everything(source)
    assert found.keys() == llama_arrays().keys()
    for name, value in llama_arrays().items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    q = "model.layers.0.self_attn.q_proj.weight"
    part = source.read(q, (slice(HEAD_DIM, 3 * HEAD_DIM), slice(2, 9)))
    np.testing.assert_array_equal(part, llama_arrays()[q][HEAD_DIM : 3 * HEAD_DIM, 2:9])


def test_qwens_rows_are_in_order(tmp_path):
    found = everything(open_source(str(write_llama_gguf(tmp_path / "m.gguf", architecture="qwen2", interleave=False))))
    for name, value in llama_arrays().items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def dequantised(kind):
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


KINDS = [kind.name for kind in gguf.GGMLQuantizationType if dequantised(kind)]


def test_the_package_undoes_the_common_quantisations():
    assert {"F16", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q5_1", "IQ4_XS", "TQ2_0", "MXFP4"} < set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_slices_of_a_quantised_array_are_the_packages(tmp_path, kind):
    """Not all kinds can be written from numbers by the package. Small random bytes are blocks, too."""
    quantisation = gguf.GGMLQuantizationType[kind]
    row_bytes = gguf.quant_shape_to_byte_shape((WIDTH, 512), quantisation)[1]
    raw = np.random.default_rng(0).integers(0, 60, (WIDTH, row_bytes), np.uint8)
    arrays = llama_arrays()
    name = "model.layers.0.mlp.down_proj.weight"
    del arrays[name]
    path = write_llama_gguf(
        tmp_path / "m.gguf",
        arrays=arrays,
        change=lambda writer: writer.add_tensor(llama_gguf_name(name), raw, raw_dtype=quantisation),
    )
    source = open_source(str(path))
    assert source.arrays[name].shape == (WIDTH, 512)
    found, whole = source.read(name, (slice(2, 7), slice(5, 300))), gguf.quants.dequantize(raw, quantisation)
    assert found.dtype == np.float32 and np.ptp(whole) > 0
    np.testing.assert_array_equal(found, whole[2:7, 5:300])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16"])
def test_quantised_arrays_are_close_to_what_they_were(tmp_path, kind):
    arrays = llama_arrays()
    name = "model.layers.0.mlp.down_proj.weight"
    arrays[name] = np.random.default_rng(0).normal(0, 0.3, (WIDTH, 64)).astype(np.float32)
    path = write_llama_gguf(tmp_path / "m.gguf", arrays=arrays, quantise={name: gguf.GGMLQuantizationType[kind]})
    found = open_source(str(path)).read(name, (slice(3, 9), slice(5, 60)))
    np.testing.assert_allclose(found, arrays[name][3:9, 5:60], atol=0.15)


def test_the_config(tmp_path):
    model = import_source(write_llama_gguf(tmp_path / "m.gguf"), tmp_path / "workdir")
    fields = model.config.model
    assert (fields.norm_eps, fields.num_kv_heads, fields.tie_embeddings) == (1e-5, KV_HEADS, True)
    assert model.config.sequence_length == 64 and fields.dtype == "float32"


def test_a_model_stops_where_a_text_and_where_a_turn_ends(tmp_path):
    path = write_llama_gguf(tmp_path / "m.gguf", eos=1, tokenizer__ggml__eot_token_id=5)
    assert import_source(path, tmp_path / "workdir").ends == {1, 5}
    path = write_llama_gguf(tmp_path / "n.gguf", eos=1, tokenizer__ggml__eot_token_id=1)
    assert open_source(str(path)).config.values["eos_token_id"] == 1


def test_the_scaling_of_llama_31(tmp_path):
    def factors(values):
        return lambda writer: writer.add_tensor("rope_freqs.weight", np.array(values, np.float32))

    # Of theta = 10000 and a head of 4: one frequency turns often in 8,192 tokens, the other 13 times.
    path = write_llama_gguf(tmp_path / "m.gguf", change=factors([1.0, 1.0]))
    assert open_source(str(path)).config.values["rope_scaling"]["rope_type"] == "llama3"
    path = write_llama_gguf(tmp_path / "n.gguf", change=factors([1.0, 3.0]))
    with pytest.raises(UserError, match=r"n.gguf: array rope_freqs.weight is not the RoPE scaling of Llama 3.1"):
        open_source(str(path))
    path = write_llama_gguf(tmp_path / "o.gguf", llama__rope__scaling__type="yarn")
    with pytest.raises(UserError, match='rope.scaling.type = "yarn": allowed: none, linear'):
        open_source(str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"architecture": "mamba"},
            'general.architecture = "mamba": not read; allowed: llama, mistral3, qwen2, qwen3, ',
        ),
        (
            {"architecture": "gpt2"},
            'general.architecture = "gpt2": not read; its learned positions, LayerNorm and ungated',
        ),
        (
            {"architecture": "bert"},
            'general.architecture = "bert": not read; an encoder with learned positions, LayerNo',
        ),
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
            "array blk.0.attn_sinks.weight is not part of a LlamaForCausalLM that is read from GGUF",
        ),
        (
            {"change": lambda writer: writer.add_tensor("output.weight", np.zeros((3, WIDTH), np.float32))},
            f"array lm_head.weight has shape [3, {WIDTH}]; m.gguf makes it [{VOCAB}, {WIDTH}]",
        ),
        (
            {
                "change": lambda writer: writer.add_tensor(
                    "output.weight", np.zeros((VOCAB, 292), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_K
                )
            },
            "array output.weight is Q8_K; allowed: F32, F16, Q4_0, Q4_1",
        ),
        ({"arrays": {k: v for k, v in llama_arrays().items() if "0.mlp.up" not in k}}, "mlp.up_proj.weight is missing"),
        ({"tokens": [f"t{i}" for i in range(VOCAB)] + ["x"] * 9}, "tokenizer.ggml.tokens has a token twice"),
    ],
)
def test_what_is_refused(tmp_path, options, message):
    path = write_llama_gguf(tmp_path / "m.gguf", **options)
    with pytest.raises(UserError) as error:
        import_source(path, tmp_path / "workdir")
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_truncated_and_damaged_files(tmp_path):
    path = write_llama_gguf(tmp_path / "m.gguf")
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
    path = write_llama_gguf(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "darkformer_jax.pretrained.gguf_file", raising=False)
    with pytest.raises(UserError, match=r"m.gguf: GGUF files need the package gguf: .* or pip install gguf"):
        open_source(str(path))
