"""Gemma 3, text: Gemma 2's blocks with QK-norm in place of soft-caps; windowed layers have their own RoPE theta."""

from typing import Any

from darkformer_jax.pretrained.families.family import (
    FULL,
    LLAMA_NAMES,
    LOCAL,
    POST_NORM_NAMES,
    QK_NORM_NAMES,
    Family,
    Fields,
    read_layer_types,
)
from darkformer_jax.pretrained.families.gemma2 import read_gemma2_sizes, write_gemma2_sizes
from darkformer_jax.pretrained.families.rope import canonical_rope, read_scaling, refuse_partial_rotation, write_scaling
from darkformer_jax.pretrained.hf_config import HFConfig

_FULL, _SLIDING = "full_attention", "sliding_attention"
_THETA, _LOCAL_THETA = 1_000_000.0, 10_000.0


def _read(config: HFConfig) -> Fields:
    config.refuse("attn_logit_softcapping", "transformers has the field, but no Gemma 3 model applies it")
    fields = read_gemma2_sizes(config, attention_cap=0.0, final_cap=0.0) | {"qk_norm": True}
    period = config.integer("sliding_window_pattern", config.integer("_sliding_window_pattern", 6))
    kinds = [LOCAL if (layer + 1) % period else FULL for layer in range(fields["num_layers"])]
    fields |= read_layer_types(config, kinds)
    return fields | _read_rope(config, fields)


def _read_rope(config: HFConfig, fields: Fields) -> Fields:
    """The two RoPEs, by transformers' rules for parameters per layer type: `rope_scaling` goes into full_attention's.

    An original_max_position_embeddings beside them does not count, as it does in the other families.
    """
    refuse_partial_rotation(config)
    parameters = config.section("rope_parameters") or HFConfig({}, config.path)
    for name in sorted(set(parameters.values) - {_FULL, _SLIDING}):
        raise parameters.error(name, f"allowed in Gemma 3: {_FULL}, {_SLIDING}")
    plain = HFConfig({"rope_type": "default"}, parameters.path)
    full, local = (parameters.section(name) or plain for name in (_FULL, _SLIDING))
    scaling = config.section("rope_scaling")
    if scaling:
        full = HFConfig({**full.values, **scaling.values}, scaling.path)
    positions = config.integer("max_position_embeddings", 0, smallest=0)
    rope = read_scaling(full, config.number("rope_theta", _THETA), positions)
    windows = read_scaling(local, config.number("rope_local_base_freq", _LOCAL_THETA), positions)
    if windows["rope_scaling"] != "none":
        raise parameters.error(_SLIDING, "scaled RoPE is not supported in windowed layers")
    return canonical_rope(fields | rope | {"rope_local_theta": windows["rope_theta"]})


def _write(fields: Fields) -> dict[str, Any]:
    scaling = write_scaling(fields)
    local_theta = fields["rope_local_theta"] or fields["rope_theta"]
    return write_gemma2_sizes(fields) | {
        "rope_theta": fields["rope_theta"],
        "rope_local_base_freq": local_theta,
        "rope_scaling": None if fields["rope_scaling"] == "none" else scaling,
        "rope_parameters": {
            _FULL: scaling | {"rope_theta": fields["rope_theta"]},
            _SLIDING: {"rope_type": "default", "rope_theta": local_theta},
        },
    }


GEMMA3 = Family("gemma3_text", "Gemma3ForCausalLM", {**LLAMA_NAMES, **POST_NORM_NAMES, **QK_NORM_NAMES}, _read, _write)
