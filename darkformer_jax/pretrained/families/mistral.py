"""Mistral: Llama with an optional sliding window in every layer."""

from typing import Any

from darkformer_jax.pretrained.families.family import (
    FULL,
    LLAMA_NAMES,
    LOCAL,
    SLIDING_WINDOW,
    Family,
    Fields,
    kinds_of,
    layer_fields,
    read_sizes,
    write_sizes,
)
from darkformer_jax.pretrained.families.rope import read_rope, write_rope
from darkformer_jax.pretrained.hf_config import HFConfig


def _read(config: HFConfig) -> Fields:
    config.refuse("layer_types", "a Mistral model has one kind of layer, as its sliding_window says")
    fields = read_sizes(config, tied=False, kv_heads=8) | read_rope(config)
    window = config.window(SLIDING_WINDOW)
    return fields | layer_fields([LOCAL if window else FULL] * fields["num_layers"], window)


def _write(fields: Fields) -> dict[str, Any]:
    local = LOCAL in kinds_of(fields)
    window = fields["attention.local_window"] if local else None
    return write_sizes(fields) | write_rope(fields) | {"sliding_window": window}


MISTRAL = Family("mistral", "MistralForCausalLM", LLAMA_NAMES, _read, _write)
