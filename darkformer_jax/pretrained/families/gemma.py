"""Gemma 1: Llama with (1 + w) norms, embeddings scaled by sqrt(width), tanh-GELU and tied embeddings."""

from typing import Any

from darkformer_jax.pretrained.families.family import (
    FULL,
    LLAMA_NAMES,
    Family,
    Fields,
    layer_fields,
    read_sizes,
    write_sizes,
)
from darkformer_jax.pretrained.families.rope import read_rope, write_rope
from darkformer_jax.pretrained.hf_config import HFConfig

GEMMA_FIELDS: Fields = {"norm_plus_one": True, "scale_embeddings": True}


def _read(config: HFConfig) -> Fields:
    config.refuse("attention_bias", "biases of q, k, v and o are not supported")
    # Early releases have hidden_act = "gelu" for its tanh approximation; hidden_activation corrects them.
    act = config.values.get("hidden_act")
    act = "gelu_pytorch_tanh" if act in (None, "gelu") else act
    if config.values.get("hidden_activation") not in (None, act):
        raise config.error("hidden_activation", f"contradicts hidden_act = {act}")
    config = HFConfig({**config.values, "hidden_act": act}, config.path)
    fields = read_sizes(config, tied=True, kv_heads=16, head_dim=256) | read_rope(config) | GEMMA_FIELDS
    return fields | layer_fields([FULL] * fields["num_layers"], 0)


def _write(fields: Fields) -> dict[str, Any]:
    activation = write_sizes(fields)["hidden_act"]
    return write_sizes(fields) | write_rope(fields) | {"hidden_activation": activation, "attention_bias": False}


GEMMA = Family("gemma", "GemmaForCausalLM", LLAMA_NAMES, _read, _write)
