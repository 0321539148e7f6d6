"""Tiny GGUF files, written with the package gguf the way llama.cpp's converter writes them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as hf

from tests.pretrained.tiny_sources import HEADS, KV_HEADS, LAYERS, MLP, VOCAB, WIDTH, llama_arrays

gguf = pytest.importorskip("gguf")


def byte_level_vocabulary(size: int) -> dict[str, Any]:
    """The fields of a byte-level BPE of `size` tokens with two merges; two tokens are special."""
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())[: size - 4]
    tokens = ["<|endoftext|>", "<|im_end|>", *alphabet, "12", "34"]
    return {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_types": [3, 3] + [1] * (size - 2),
        "scores": [-float(number) for number in range(size)],
        "merges": ["1 2", "3 4"],
        "bos": 0,
        "eos": 1,
    }


def sentencepiece_vocabulary(model: bytes) -> dict[str, Any]:
    """The fields of a .model. User-defined pieces have plain spaces, as the converter writes them."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto.FromString(model)
    plain = {4: lambda piece: piece.replace("\u2581", " ")}
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [plain.get(p.type, str)(p.piece) for p in proto.pieces],
        "token_types": [p.type for p in proto.pieces],
        "scores": [p.score for p in proto.pieces],
        "bos": proto.trainer_spec.bos_id,
        "eos": proto.trainer_spec.eos_id,
    }


def write_gguf(
    path: Path,
    architecture: str,
    fields: Mapping[str, Any],
    vocabulary: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    kinds: Mapping[str, Any] | None = None,
    change: Callable[[Any], None] = lambda writer: None,
) -> Path:
    """A GGUF file.

    Args:
      fields: name -> value. An integer is written as uint32, "a.b" as it is; "{arch}" is the architecture.
      arrays: by llama.cpp's names.
      kinds: name of an array -> its quantisation; float32 without one.
      change: does further things to the writer.
    """
    writer = gguf.GGUFWriter(str(path), architecture)
    for name, value in fields.items():
        _add(writer, name.format(arch=architecture), value)
    writer.add_tokenizer_model(vocabulary["model"])
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["token_types"])
    writer.add_token_scores(vocabulary["scores"])
    if "merges" in vocabulary:
        writer.add_token_merges(vocabulary["merges"])
    for name in ("bos", "eos"):
        if vocabulary[name] is not None:
            _add(writer, f"tokenizer.ggml.{name}_token_id", vocabulary[name])
    for name, value in arrays.items():
        kind = (kinds or {}).get(name)
        raw = value if kind is None else gguf.quants.quantize(value, kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, name: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(name, value)


def interleaved(value: np.ndarray, heads: int) -> np.ndarray:
    """What the converter does to the rows of Llama's q and k."""
    return value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)


ROWS_INTERLEAVED = ("llama", "mistral3")


def converted_arrays(state: Mapping[str, np.ndarray], architecture: str, config: Any) -> dict[str, np.ndarray]:
    """The arrays of a Hugging Face model as the converter writes them. The package knows the names."""
    kind = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    written = {}
    for name, value in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture in ROWS_INTERLEAVED and name.endswith(("q_proj.weight", "k_proj.weight")):
            value = interleaved(value, value.shape[0] // config.head_dim)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        written[names.get_name(name, try_suffixes=(".weight", ".bias"))] = value
    return written


def common_fields(config: Any) -> dict[str, Any]:
    """The metadata that the converter writes for every architecture."""
    return {
        "{arch}.block_count": config.num_hidden_layers,
        "{arch}.context_length": config.max_position_embeddings,
        "{arch}.embedding_length": config.hidden_size,
        "{arch}.feed_forward_length": config.intermediate_size,
        "{arch}.attention.head_count": config.num_attention_heads,
        "{arch}.attention.head_count_kv": config.num_key_value_heads,
        "{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "{arch}.attention.key_length": config.head_dim,
        "{arch}.attention.value_length": config.head_dim,
    }


def flags(pattern: str) -> Sequence[bool]:
    """ "110" -> [True, True, False]"""
    return [flag == "1" for flag in pattern]


_LLAMA_FIELDS = {
    "{arch}.block_count": LAYERS,
    "{arch}.context_length": 64,
    "{arch}.embedding_length": WIDTH,
    "{arch}.feed_forward_length": MLP,
    "{arch}.attention.head_count": HEADS,
    "{arch}.attention.head_count_kv": KV_HEADS,
    "{arch}.attention.layer_norm_rms_epsilon": 1e-5,
    "{arch}.rope.freq_base": 10000.0,
}
_LLAMA_NAMES = {
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


def llama_gguf_name(name: str) -> str:
    """model.layers.0.self_attn.q_proj.weight -> blk.0.attn_q.weight"""
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, *middle, _ = name.split(".")
    return f"blk.{layer}.{_LLAMA_NAMES['.'.join(middle)]}.weight"


def write_llama_gguf(
    path: Path,
    *,
    arrays: Mapping[str, np.ndarray] | None = None,
    architecture: str = "llama",
    interleave: bool = True,
    quantise: Mapping[str, Any] | None = None,
    change: Callable[[Any], None] = lambda writer: None,
    **metadata: Any,
) -> Path:
    """A file of `tiny_sources.CONFIG`'s model.

    Args:
      arrays: by Hugging Face's names.
      quantise: Hugging Face's name -> kind.
      metadata: further fields, "__" for "."; or keys of the vocabulary.
    """
    arrays = llama_arrays() if arrays is None else arrays
    vocabulary = byte_level_vocabulary(VOCAB)
    vocabulary |= {key: metadata.pop(key) for key in list(metadata) if key in vocabulary}
    written = {
        llama_gguf_name(name): interleaved(value, HEADS if ".q_proj." in name else KV_HEADS)
        if interleave and (".q_proj." in name or ".k_proj." in name)
        else value
        for name, value in arrays.items()
    }
    kinds = {llama_gguf_name(name): kind for name, kind in (quantise or {}).items()}
    fields = _LLAMA_FIELDS | {name.replace("__", "."): value for name, value in metadata.items()}
    return write_gguf(path, architecture, fields, vocabulary, written, kinds, change)
