"""Damaged and contradictory directories: one line that names the file and the array, and nothing left behind."""

import json
import os
import struct

import numpy as np
import pytest

from darkformer_jax.errors import UserError
from darkformer_jax.pretrained.export import export_workdir
from darkformer_jax.pretrained.families.family import LLAMA_NAMES
from darkformer_jax.runs.workdir import Workdir
from tests.pretrained.tiny_sources import (
    BFLOAT16,
    LAYERS,
    VOCAB,
    WIDTH,
    import_source,
    llama_arrays,
    write_arrays,
    write_llama,
    write_tokenizer,
)

Q = "model.layers.1.self_attn.q_proj.weight"


def refused(tmp_path, message):
    """Importing tmp_path/hf fails with `message` and leaves nothing."""
    with pytest.raises(UserError) as error:
        import_source(tmp_path / "hf", tmp_path / "workdir")
    assert message in str(error.value) and "\n" not in str(error.value), str(error.value)
    assert os.listdir(tmp_path) == ["hf"]


def test_arrays_arrive_transposed_and_stacked(tmp_path):
    arrays = llama_arrays()
    model = import_source(write_llama(tmp_path / "hf", shard_bytes=3000), tmp_path / "workdir")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    kernel = np.asarray(model.params["blocks_0"]["attention"]["q"]["kernel"])
    assert kernel.shape == (LAYERS, WIDTH, 4, 4) and kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel[1], arrays[Q].T.reshape(WIDTH, 4, 4))
    out = np.asarray(model.params["blocks_0"]["attention"]["out"]["kernel"])
    np.testing.assert_array_equal(out[0].reshape(-1, WIDTH), arrays["model.layers.0.self_attn.o_proj.weight"].T)
    assert model.config.model.dtype == "float32" and model.config.sequence_length == 64


@pytest.mark.parametrize(
    ("stored", "dtype", "wanted"),
    [
        (BFLOAT16, None, BFLOAT16),
        (np.float16, None, np.float32),
        (np.float32, "bfloat16", BFLOAT16),
        (BFLOAT16, "float32", np.float32),
    ],
)
def test_dtypes_to_store_in(tmp_path, stored, dtype, wanted):
    model = import_source(write_llama(tmp_path / "hf", stored), tmp_path / "workdir", dtype)
    embedding = np.asarray(model.params["embedding"])
    assert embedding.dtype == wanted
    np.testing.assert_array_equal(embedding, llama_arrays(stored)["model.embed_tokens.weight"].astype(wanted))
    assert model.config.model.dtype == np.dtype(wanted).name


def test_layers_of_two_dtypes_become_float32(tmp_path):
    arrays = llama_arrays()
    arrays[Q] = arrays[Q].astype(BFLOAT16)
    write_arrays(write_llama(tmp_path / "hf"), arrays)
    kernel = import_source(tmp_path / "hf", tmp_path / "workdir").params["blocks_0"]["attention"]["q"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(kernel)[1].reshape(WIDTH, -1), arrays[Q].T.astype(np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop(Q), f"array {Q} is missing"),
        (lambda a: a.update({"lm_head.bias": np.zeros(3, np.float32)}), "array lm_head.bias is not part of the model"),
        (lambda a: a.update({Q: a[Q].T[:8].copy()}), f"array {Q} has shape [8, 16]; config.json makes it [16, 16]"),
        (
            lambda a: a.update({Q: a[Q] * np.float32(np.nan)}),
            f"model.safetensors: array {Q} has a number that is not finite",
        ),
        (lambda a: a.pop("model.embed_tokens.weight"), "array model.embed_tokens.weight is missing"),
        (
            lambda a: a.update({"lm_head.weight": a.pop("model.embed_tokens.weight")[1:]}),
            f"array lm_head.weight has shape [{VOCAB - 1}, {WIDTH}]; config.json makes it [{VOCAB}, {WIDTH}]",
        ),
        (
            lambda a: a.update({"lm_head.weight": a["model.embed_tokens.weight"] + 1}),
            "lm_head.weight differs from model.embed_tokens.weight, but tie_word_embeddings says they are one",
        ),
    ],
)
def test_arrays_that_do_not_fit_config_json(tmp_path, change, message):
    arrays = llama_arrays()
    change(arrays)
    write_arrays(write_llama(tmp_path / "hf"), arrays)
    refused(tmp_path, message)


def test_old_buffers_do_no_harm(tmp_path):
    arrays = llama_arrays()
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    write_arrays(write_llama(tmp_path / "hf"), arrays)
    assert "head" not in import_source(tmp_path / "hf", tmp_path / "workdir").params


@pytest.mark.parametrize("saved", [("head",), ("embedding",), ("embedding", "head")])
def test_a_tied_matrix_may_be_saved_under_either_name_or_both(tmp_path, saved):
    arrays = llama_arrays()
    tied = arrays.pop("model.embed_tokens.weight")
    write_arrays(write_llama(tmp_path / "hf"), arrays | {LLAMA_NAMES[name]: tied for name in saved})
    model = import_source(tmp_path / "hf", tmp_path / "workdir")
    assert "head" not in model.params
    np.testing.assert_array_equal(np.asarray(model.params["embedding"]), tied)


def test_a_missing_shard_and_a_missing_array_of_one(tmp_path):
    source = write_llama(tmp_path / "hf", shard_bytes=3000)
    shards = sorted(source.glob("model-*.safetensors"))
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.other"] = shards[0].name
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, f"{shards[0]}: array model.other is missing, which model.safetensors.index.json lists there")
    shards[1].unlink()
    index["weight_map"].pop("model.other")
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, f"{shards[1]} is missing; it should hold")


def test_an_index_may_not_lead_out_of_its_directory(tmp_path):
    source = write_llama(tmp_path / "hf")
    (source / "model.safetensors").rename(source / "other.safetensors")
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    refused(tmp_path, "'../other.safetensors' is not the name of a file beside it")
    (source / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    refused(tmp_path, "weight_map must be an object")


def test_truncated_and_damaged_files(tmp_path):
    path = write_llama(tmp_path / "hf") / "model.safetensors"
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    endless = b'{"x":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}'
    for damaged, message in (
        (whole[:-1], "truncated: array model.layers.1.mlp.down_proj.weight ends at byte"),
        (whole[: 8 + length // 2], "truncated, or no safetensors file: its header does not fit its"),
        (b"", "truncated, or no safetensors file"),
        (whole[:8] + b"?" + whole[9:], "its header is not JSON"),
        (whole.replace(b"layers.1.mlp.up", b"layers.0.mlp.up"), "its header is not JSON: a name occurs twice"),
        (struct.pack("<Q", len(endless)) + endless, "array x has no shape, dtype and data_offsets in the header"),
        (whole.replace(b'"F32"', b'"I32"', 1), "array model.embed_tokens.weight is I32; allowed: F32, F16, BF16"),
        (
            whole.replace(b'"F32"', b'"F16"', 1),
            "array model.embed_tokens.weight has 4096 bytes, which is not F16[64, 16]",
        ),
    ):
        path.write_bytes(damaged)
        refused(tmp_path, message)
    path.unlink()
    (tmp_path / "hf" / "pytorch_model.bin").touch()
    refused(tmp_path, "holds no model.safetensors; pytorch_model.bin is pickled Python, which is never read")


def test_a_tokenizer_that_does_not_fit(tmp_path):
    source = write_llama(tmp_path / "hf")
    write_tokenizer(source, VOCAB + 1)
    refused(tmp_path, f"its tokenizer has {VOCAB + 1} ids, but the embedding {VOCAB} rows: ids from {VOCAB} on were")
    write_tokenizer(tmp_path / "hf", 2 * VOCAB)
    refused(tmp_path, f"its tokenizer has {2 * VOCAB} ids, which does not fit vocab_size = {VOCAB} in config.json")
    write_tokenizer(source, VOCAB // 2 - 1)
    refused(tmp_path, f"its tokenizer has {VOCAB // 2 - 1} ids, which does not fit")
    (source / "tokenizer.json").unlink()
    refused(tmp_path, "holds no tokenizer")


def test_config_json_itself(tmp_path):
    source = write_llama(tmp_path / "hf")
    (source / "config.json").write_text("{")
    refused(tmp_path, "config.json is not JSON")
    (source / "config.json").write_text("[]")
    refused(tmp_path, "config.json holds a JSON list, not an object")
    (source / "config.json").unlink()
    refused(tmp_path, "config.json: No such file")


def test_ids_and_lengths_beside_the_model(tmp_path):
    source = write_llama(tmp_path / "hf", eos_token_id=[1, VOCAB])
    refused(tmp_path, f"eos_token_id = [1, {VOCAB}]: must be an id from 0 to {VOCAB - 1}, or a list of such")
    write_llama(source, max_position_embeddings=None, pad_token_id=-1)
    (source / "generation_config.json").write_text('{"eos_token_id": {"a": 1}}')
    refused(tmp_path, 'generation_config.json: eos_token_id = {"a": 1}: must be an id')
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    assert import_source(source, tmp_path / "workdir").ends == {1, 2, 3}
    export_workdir(Workdir(tmp_path / "workdir"), str(tmp_path / "out"))
    assert json.loads((tmp_path / "out/config.json").read_text())["pad_token_id"] == -1


def test_an_export_in_a_dtype_that_cannot_hold_it(tmp_path):
    arrays = llama_arrays()
    arrays[Q] = arrays[Q] * np.float32(1e6)
    write_arrays(write_llama(tmp_path / "hf"), arrays)
    import_source(tmp_path / "hf", tmp_path / "workdir")
    with pytest.raises(UserError, match=f"array {Q} has a number that is not finite as float16"):
        export_workdir(Workdir(tmp_path / "workdir"), str(tmp_path / "out"), dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_workdir_that_is_there_is_not_touched(tmp_path):
    source = write_llama(tmp_path / "hf")
    (tmp_path / "workdir").mkdir()
    (tmp_path / "workdir" / "notes.txt").touch()
    with pytest.raises(UserError, match="is there already; give a new or an empty directory"):
        import_source(source, tmp_path / "workdir")
    assert os.listdir(tmp_path / "workdir") == ["notes.txt"]
    (tmp_path / "workdir" / "notes.txt").unlink()
    assert import_source(source, tmp_path / "workdir").step == 0
