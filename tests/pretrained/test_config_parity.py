"""What an absent or null field of config.json means is what transformers makes of it, or it is refused."""

import pytest

from darkformer_jax.errors import UserError
from darkformer_jax.pretrained.families import family_of
from darkformer_jax.pretrained.families.family import LOCAL, kinds_of
from darkformer_jax.pretrained.hf_config import HFConfig
from tests.pretrained.tiny_models import MODELS, SIZES, transformers

NEVER_ABSENT = {"model_type", *SIZES} - {"num_key_value_heads", "max_position_embeddings"}
ABSENT = object()


def theirs_of(model_type, values):
    """The fields that transformers resolves `values` to; None where it refuses them."""
    values = {name: value for name, value in values.items() if name != "model_type"}
    try:
        config = transformers.AutoConfig.for_model(model_type, **values)
    except Exception:  # of several kinds
        return None
    layers = getattr(config, "layer_types", None)
    window = config.sliding_window if model_type == "mistral" or layers else None
    if layers is None:
        layers = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    local = "sliding_attention" in layers
    gemma = model_type in ("gemma2", "gemma3_text")
    activation = config.hidden_activation if gemma else config.hidden_act
    return {
        "local": [kind == "sliding_attention" for kind in layers],
        "window": window if local else 0,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "eps": config.rms_norm_eps,
        "tied": config.tie_word_embeddings,
        "activation": {"gelu_pytorch_tanh": "gelu_tanh"}.get(activation, activation),
        "cap": (model_type == "gemma2" and config.attn_logit_softcapping) or 0.0,
        "logit_cap": (gemma and config.final_logit_softcapping) or 0.0,
        "scale": pytest.approx(config.query_pre_attn_scalar**-0.5) if gemma else 0.0,
        "rope": _their_rope(config.rope_parameters),
    }


def _their_rope(parameters):
    full = parameters.get("full_attention", parameters)
    local = parameters.get("sliding_attention", full)
    kind = {"default": "none"}.get(full["rope_type"], full["rope_type"])
    return full["rope_theta"], local["rope_theta"], kind, full.get("factor", 1.0) if kind != "none" else 1.0


def ours_of(values):
    """The same of our reading; None where we refuse."""
    config = HFConfig(values, "config.json")
    try:
        fields = family_of(config).read(config)
    except UserError:
        return None
    gemma = values["model_type"] in ("gemma2", "gemma3_text")
    scale = fields["attention.query_scale"] or fields["head_dim"] ** -0.5
    local_theta = fields["rope_local_theta"] or fields["rope_theta"]
    kinds = kinds_of(fields)
    return {
        "local": [kind == LOCAL for kind in kinds],
        "window": fields["attention.local_window"],
        "head_dim": fields["head_dim"],
        "kv_heads": fields["num_kv_heads"],
        "eps": fields["norm_eps"],
        "tied": fields["tie_embeddings"],
        "activation": fields["activation"],
        "cap": fields["attention.softcap"],
        "logit_cap": fields["logit_softcap"],
        "scale": scale if gemma else 0.0,
        "rope": (fields["rope_theta"], local_theta, fields["rope_scaling"], fields["rope_factor"]),
    }


def _same_rope(ours, theirs):
    """A local theta counts where there are local layers."""
    return ours["rope"] if any(ours["local"]) else (ours["rope"][0], theirs["rope"][1], *ours["rope"][2:])


OLD_SCALING = {"type": "linear", "factor": 8.0}
VARIATIONS = [
    {"sliding_window": 9},
    {"use_sliding_window": True, "layer_types": ABSENT, "sliding_window": ABSENT, "max_window_layers": 1},
    {"use_sliding_window": True, "layer_types": ABSENT, "sliding_window": None, "max_window_layers": 1},
    {"rope_scaling": OLD_SCALING},
    {"rope_parameters": ABSENT, "rope_scaling": OLD_SCALING, "rope_theta": 700.0},
    {"rope_parameters": ABSENT, "rope_scaling": {}, "rope_theta": 700.0},
    {"rope_scaling": {}},
    {"rope_parameters": ABSENT, "rope_local_base_freq": 70.0},
    {"hidden_act": "gelu"},
    {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"},
    {"hidden_activation": "gelu_pytorch_tanh"},
    {"attn_logit_softcapping": 20.0},
    {"layer_types": ABSENT, "sliding_window_pattern": 2},
]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_absent_and_null_fields(name):
    model_type, changes = MODELS[name]
    base = transformers.AutoConfig.for_model(model_type, **(SIZES | changes)).to_dict()
    base = {field: value for field, value in base.items() if field not in ("architectures", "transformers_version")}
    base["model_type"] = model_type
    optional = sorted(set(base) - NEVER_ABSENT)
    variations = [{field: new} for field in optional for new in (ABSENT, None)] + VARIATIONS
    compared = 0
    for variation in variations:
        values = {field: value for field, value in (base | variation).items() if value is not ABSENT}
        ours, theirs = ours_of(values), theirs_of(model_type, values)
        if ours is None or theirs is None:
            continue
        compared += 1
        assert ours | {"rope": _same_rope(ours, theirs)} == theirs, variation
    assert compared > 20
