"""The config.json that the model of a GGUF file would have, from the file's metadata."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from darkformer_jax.errors import UserError
from darkformer_jax.pretrained.gguf_architectures import REFUSED_FIELDS, architecture_of, decimal
from darkformer_jax.pretrained.hf_config import HFConfig
from darkformer_jax.pretrained.safetensors_files import StoredArray

_THETA = 10000.0  # of RoPE, if a file does not name it


def hf_config(
    metadata: Mapping[str, Any], path: str, arrays: Mapping[str, StoredArray], rope_factors: np.ndarray | None
) -> HFConfig:
    """The fields of config.json.

    Args:
      metadata: of the file `path`, whose name is in every error.
      arrays: the file's arrays, by Hugging Face's names.
      rope_factors: what RoPE's frequencies are divided by; None = the file does not say.

    Raises:
      UserError: the architecture is not read, or a field is missing, has a wrong value or describes another model.
    """
    architecture, name = architecture_of(metadata, path), metadata["general.architecture"]
    below = {key.removeprefix(f"{name}."): value for key, value in metadata.items()}
    get = HFConfig(below, f"{path}: {name}")
    for field, why in REFUSED_FIELDS.items():
        if field not in architecture.reads:
            get.refuse(field, f"{why} not supported in GGUF files of this architecture", 0)
    if not get.flag("attention.causal", True):
        raise get.error("attention.causal", "only causal attention is supported")
    vocab = arrays.get("model.embed_tokens.weight")
    if vocab is None:
        raise UserError(f"{path}: array token_embd.weight is missing")
    sizes = _sizes(get)
    fields = sizes | {
        "model_type": architecture.model_type,
        "architectures": [architecture.hf_class],
        "vocab_size": vocab.shape[0],
        "rms_norm_eps": decimal(get.number("attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": get.integer("context_length"),
        "tie_word_embeddings": "lm_head.weight" not in arrays,
        "rope_theta": decimal(get.number("rope.freq_base", _THETA)),
        "rope_scaling": _rope_scaling(get, path, rope_factors, sizes["head_dim"]),
        **_token_ids(metadata),
    }
    return HFConfig(fields | architecture.own_fields(get, sizes), path)


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of config.json. A model that ends turns with another token than texts stops at both."""
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding", "eot")}
    found = {"bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": ids["padding"]}
    if ids["eos"] is not None and ids["eot"] not in (None, ids["eos"]):
        found["eos_token_id"] = [ids["eos"], ids["eot"]]
    return {name: value for name, value in found.items() if value is not None}


def _sizes(get: HFConfig) -> dict[str, Any]:
    heads, width = get.integer("attention.head_count"), get.integer("embedding_length")
    head_dim = get.integer("attention.key_length", width // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if get.integer(name, head_dim) != head_dim:
            raise get.error(name, f"must equal the head size, {head_dim}")
    return {
        "num_hidden_layers": get.integer("block_count"),
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": get.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": get.integer("feed_forward_length"),
    }


def _rope_scaling(get: HFConfig, path: str, factors: np.ndarray | None, head_dim: int) -> dict[str, Any] | None:
    kind = get.choice("rope.scaling.type", ("none", "linear"), "linear")  # llama.cpp's default
    factor = get.number("rope.scaling.factor", get.number("rope.scale_linear", 1.0))
    if factors is not None:
        return _llama3_scaling(path, factors, get.number("rope.freq_base", _THETA), head_dim)
    return None if kind == "none" or factor == 1 else {"rope_type": "linear", "factor": decimal(factor)}


def _llama3_scaling(path: str, factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """The llama3 scaling that slows frequencies by `factors`, with the one pair of bounds that Meta has published."""
    low, high, length = 1.0, 4.0, 8192
    factor = float(factors.max(initial=0.0))
    turns = length * theta ** (-np.arange(head_dim // 2) * 2 / head_dim) / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / max(factor, 1.0) + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise UserError(
            f"{path}: array rope_freqs.weight is not the RoPE scaling of Llama 3.1 to 3.3; no other is supported"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }
