"""Qwen 2 and 2.5 (biases of q, k and v) and Qwen 3 (RMSNorm of q and k): Llama otherwise, perhaps with windows."""

from typing import Any

from darkformer_jax.pretrained.families.family import (
    FULL,
    LLAMA_NAMES,
    LOCAL,
    MAX_LAYERS,
    QK_NORM_NAMES,
    QKV_BIAS_NAMES,
    SLIDING_WINDOW,
    Family,
    Fields,
    kinds_of,
    read_layer_types,
    read_sizes,
    write_layer_types,
    write_sizes,
)
from darkformer_jax.pretrained.families.rope import read_rope, write_rope
from darkformer_jax.pretrained.hf_config import HFConfig


def _read_qwen2(config: HFConfig) -> Fields:
    return read_sizes(config, tied=False, kv_heads=32) | read_rope(config) | _layers(config) | {"qkv_bias": True}


def _read_qwen3(config: HFConfig) -> Fields:
    config.refuse("attention_bias", "biases of q, k, v and o are not supported")
    fields = read_sizes(config, tied=False, kv_heads=32, head_dim=128) | read_rope(config)
    return fields | _layers(config) | {"qk_norm": True}


def _layers(config: HFConfig) -> Fields:
    """The kinds of the layers. Without layer_types, use_sliding_window puts windows from max_window_layers on."""
    layers = config.integer("num_hidden_layers", largest=MAX_LAYERS)
    windowed = config.flag("use_sliding_window", False) and config.window(SLIDING_WINDOW) > 0
    first = config.integer("max_window_layers", 28, smallest=0) if windowed else layers
    fields = read_layer_types(config, [LOCAL if layer >= first else FULL for layer in range(layers)])
    if LOCAL in kinds_of(fields | {"num_layers": layers}) and not windowed:
        raise config.error("use_sliding_window", "layer_types has sliding_attention, which needs it to be true")
    return fields


def _write(fields: Fields) -> dict[str, Any]:
    layer_types = write_layer_types(fields)
    windowed = LOCAL in kinds_of(fields)
    return (
        write_sizes(fields)
        | write_rope(fields)
        | {
            "layer_types": layer_types,
            "use_sliding_window": windowed,
            "sliding_window": fields["attention.local_window"] if windowed else None,
            "max_window_layers": layer_types.index("sliding_attention") if windowed else fields["num_layers"],
        }
    )


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", {**LLAMA_NAMES, **QKV_BIAS_NAMES}, _read_qwen2, _write)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", {**LLAMA_NAMES, **QK_NORM_NAMES}, _read_qwen3, _write)
