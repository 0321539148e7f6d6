"""Gemma 2: Gemma with norms on both sides, soft-caps, its own query scale, and every other layer windowed."""

from typing import Any

from darkformer_jax.pretrained.families.family import (
    FULL,
    LLAMA_NAMES,
    LOCAL,
    POST_NORM_NAMES,
    SLIDING_WINDOW,
    Family,
    Fields,
    read_layer_types,
    read_sizes,
    require_whole_heads,
    write_layer_types,
    write_sizes,
)
from darkformer_jax.pretrained.families.gemma import GEMMA_FIELDS
from darkformer_jax.pretrained.families.rope import read_rope, write_rope
from darkformer_jax.pretrained.hf_config import HFConfig


def _read(config: HFConfig) -> Fields:
    fields = read_gemma2_sizes(config, attention_cap=50.0, final_cap=30.0) | read_rope(config)
    kinds = [FULL if layer % 2 else LOCAL for layer in range(fields["num_layers"])]
    return fields | read_layer_types(config, kinds)


def read_gemma2_sizes(config: HFConfig, *, attention_cap: float, final_cap: float) -> Fields:
    """The fields that Gemma 2 and 3 share. The given caps apply if config.json does not name them; null = no cap."""
    config.refuse("attention_bias", "biases of q, k, v and o are not supported")
    require_whole_heads(config)
    fields = read_sizes(config, tied=True, kv_heads=4, head_dim=256, act="hidden_activation") | GEMMA_FIELDS
    scalar = config.integer("query_pre_attn_scalar", 256)
    return fields | {
        "post_norms": True,
        "attention.query_scale": 0.0 if scalar == fields["head_dim"] else scalar**-0.5,
        "attention.softcap": _cap(config, "attn_logit_softcapping", attention_cap),
        "logit_softcap": _cap(config, "final_logit_softcapping", final_cap),
    }


def _cap(config: HFConfig, name: str, default: float) -> float:
    if name not in config.values:
        return default
    return 0.0 if config.values[name] is None else config.number(name)


def write_gemma2_sizes(fields: Fields) -> dict[str, Any]:
    """The inverse of `read_gemma2_sizes`, with layer_types."""
    scale = fields["attention.query_scale"]
    return write_sizes(fields, act="hidden_activation") | {
        "query_pre_attn_scalar": max(1, round(scale**-2)) if scale else fields["head_dim"],
        "attn_logit_softcapping": fields["attention.softcap"] or None,
        "final_logit_softcapping": fields["logit_softcap"] or None,
        # transformers builds the windows' mask even for models without windows
        "sliding_window": fields["attention.local_window"] or SLIDING_WINDOW,
        "layer_types": write_layer_types(fields),
        "attention_bias": False,
    }


def _write(fields: Fields) -> dict[str, Any]:
    return write_gemma2_sizes(fields) | write_rope(fields)


GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", {**LLAMA_NAMES, **POST_NORM_NAMES}, _read, _write)
