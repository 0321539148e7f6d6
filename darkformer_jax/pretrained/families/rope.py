"""Rotary positions: config.json's two forms (rope_parameters, before transformers 5 rope_scaling) <-> our fields."""

import math
from typing import Any

from darkformer_jax.config.base import fields as declared
from darkformer_jax.pretrained.families.family import LOCAL, Fields, kinds_of
from darkformer_jax.pretrained.hf_config import HFConfig

_TYPES = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}

_ORIGINAL = "original_max_position_embeddings"

_USED: dict[str, tuple[str, ...]] = {
    "none": (),
    "linear": ("rope_factor",),
    "llama3": ("rope_factor", "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_length"),
    "yarn": ("rope_factor", "rope_original_length", "rope_beta_fast", "rope_beta_slow", "rope_attention_factor"),
}
# The options of scalings have no effect here; they are at their defaults, so that equal models have equal fields.
NO_SCALING: Fields = {"rope_local_theta": 0.0, "rope_scaling": "none"} | {
    name: declared()[f"model.{name}"].default for used in _USED.values() for name in used
}

# Keys that a rope_parameters or rope_scaling object may have. Published ones have keys that their type does not use.
_KEYS_OF_ALL = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_KEYS: dict[str, set[str]] = {
    "none": {"factor", _ORIGINAL},
    "linear": {"factor", _ORIGINAL},
    "llama3": {"factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor",
        _ORIGINAL,
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "finetuned",
    },
}


def read_rope(config: HFConfig, default_theta: float = 10000.0) -> Fields:
    """rope_theta and the scaling of a model whose layers all have the same RoPE."""
    refuse_partial_rotation(config)
    section = config.section("rope_scaling") or config.section("rope_parameters")
    theta = config.number("rope_theta", default_theta)
    if section is None:
        return NO_SCALING | {"rope_theta": theta}
    if config.values.get(_ORIGINAL) is not None:  # transformers takes it even if the section states another length
        section = HFConfig({**section.values, _ORIGINAL: config.integer(_ORIGINAL)}, section.path)
    return read_scaling(section, theta, config.integer("max_position_embeddings", 0, smallest=0))


def read_scaling(section: HFConfig, theta: float, max_positions: int) -> Fields:
    """The fields of one rope_parameters or rope_scaling object.

    Args:
      theta: used if the object has none.
      max_positions: the original context if the object does not state it; 0 = unknown.
    """
    key = "rope_type" if section.values.get("rope_type") is not None else "type"
    kind = section.choice(key, tuple(_TYPES), "default")
    if section.values.get("type") not in (None, kind):  # versions of transformers differ in which of the two counts
        raise section.error("type", f"contradicts rope_type = {kind}; name the scaling in rope_type alone")
    scaling = _TYPES[kind]
    refuse_partial_rotation(section)
    unknown = sorted(set(section.values) - _KEYS_OF_ALL - _KEYS[scaling])
    if unknown:
        raise section.error(unknown[0], f"not supported with {key} = {kind}")
    fields = NO_SCALING | {"rope_theta": section.number("rope_theta", theta), "rope_scaling": scaling}
    if scaling == "none":
        return fields
    fields["rope_factor"] = section.number("factor")
    if scaling == "linear":
        return fields
    original = {} if not max_positions else {"default": max_positions}
    fields["rope_original_length"] = section.integer(_ORIGINAL, **original)
    if scaling == "llama3":
        return fields | {
            "rope_low_freq_factor": section.number("low_freq_factor"),
            "rope_high_freq_factor": section.number("high_freq_factor"),
        }
    if "truncate" in section.values and not section.flag("truncate", False):  # null means false in transformers
        raise section.error("truncate", "only yarn with rounded correction bounds is supported")
    return fields | {
        "rope_beta_fast": section.number("beta_fast", 32.0),
        "rope_beta_slow": section.number("beta_slow", 1.0),
        "rope_attention_factor": _yarn_attention_factor(section, fields["rope_factor"]),
    }


def refuse_partial_rotation(config: HFConfig) -> None:
    """Raises UserError if a part of each head is not rotated."""
    config.refuse("partial_rotary_factor", "only rotation of the whole head is supported", 1, 1.0)


def write_rope(fields: Fields) -> dict[str, Any]:
    """Both forms of the rotary fields; transformers 5 reads either."""
    scaling = write_scaling(fields)
    return {
        "rope_theta": fields["rope_theta"],
        "rope_scaling": None if fields["rope_scaling"] == "none" else scaling,
        "rope_parameters": scaling | {"rope_theta": fields["rope_theta"]},
    }


def write_scaling(fields: Fields) -> dict[str, Any]:
    """The scaling as one object, without theta."""
    scaling = fields["rope_scaling"]
    written: dict[str, Any] = {"rope_type": next(name for name, ours in _TYPES.items() if ours == scaling)}
    if scaling == "none":
        return written
    written["factor"] = fields["rope_factor"]
    if scaling == "linear":
        return written
    written[_ORIGINAL] = fields["rope_original_length"]
    if scaling == "llama3":
        return written | {
            "low_freq_factor": fields["rope_low_freq_factor"],
            "high_freq_factor": fields["rope_high_freq_factor"],
        }
    written |= {"beta_fast": fields["rope_beta_fast"], "beta_slow": fields["rope_beta_slow"]}
    if fields["rope_attention_factor"]:
        written["attention_factor"] = fields["rope_attention_factor"]
    return written


def canonical_rope(fields: Fields) -> Fields:
    """The rotary fields, with those without an effect at their defaults."""
    used = _USED[fields["rope_scaling"]]
    kept = NO_SCALING | {name: fields[name] for name in used}
    local, theta = fields["rope_local_theta"], fields["rope_theta"]
    same = fields["rope_scaling"] == "none" and local == theta
    if LOCAL in kinds_of(fields) and not same:
        kept["rope_local_theta"] = local
    return kept | {"rope_theta": theta, "rope_scaling": fields["rope_scaling"]}


def _yarn_attention_factor(section: HFConfig, factor: float) -> float:
    """The attention factor; 0 = yarn's own formula. DeepSeek states it as mscale and mscale_all_dim."""
    if section.values.get("attention_factor") is not None:
        return section.number("attention_factor")
    if section.values.get("mscale") and section.values.get("mscale_all_dim"):
        mscale, all_dim = section.number("mscale"), section.number("mscale_all_dim")
        log = math.log(factor) if factor > 1 else 0.0
        return (0.1 * mscale * log + 1.0) / (0.1 * all_dim * log + 1.0)
    return 0.0
