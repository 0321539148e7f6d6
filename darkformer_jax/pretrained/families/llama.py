"""Llama 1, 2, 3 and 3.x, and models of the same code: SmolLM2, TinyLlama."""

from typing import Any

from darkformer_jax.pretrained.families.family import (
    FULL,
    LLAMA_NAMES,
    Family,
    Fields,
    layer_fields,
    read_sizes,
    require_whole_heads,
    write_sizes,
)
from darkformer_jax.pretrained.families.rope import read_rope, write_rope
from darkformer_jax.pretrained.hf_config import HFConfig


def _read(config: HFConfig) -> Fields:
    config.refuse("attention_bias", "biases of q, k, v and o are not supported")
    config.refuse("mlp_bias", "biases of the MLP are not supported")
    require_whole_heads(config)
    fields = read_sizes(config, tied=False, kv_heads=None) | read_rope(config)
    return fields | layer_fields([FULL] * fields["num_layers"], 0)


def _write(fields: Fields) -> dict[str, Any]:
    return write_sizes(fields) | write_rope(fields) | {"attention_bias": False, "mlp_bias": False}


LLAMA = Family("llama", "LlamaForCausalLM", LLAMA_NAMES, _read, _write)
