"""A family: a map between its config.json and our model's fields, and the names of its arrays."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from darkformer_jax.config.pattern import pattern_kinds, shortest_pattern
from darkformer_jax.pretrained.hf_config import HFConfig

Fields = dict[str, Any]  # a model's fields by their names below `model.`: {"num_layers": 30, "attention.softcap": 50.0}

LOCAL, FULL = "softmax_local", "softmax"
MAX_LAYERS = 10_000
SLIDING_WINDOW = 4096  # of a family with windows, if config.json does not name one
_LAYER_TYPES = {"full_attention": FULL, "sliding_attention": LOCAL}

# What a Llama does not have, whatever the config's defaults are. A family that has more of it says so.
PLAIN: Fields = {
    "qk_norm": False,
    "scale_embeddings": False,
    "logit_softcap": 0.0,
    "qkv_bias": False,
    "norm_plus_one": False,
    "post_norms": False,
    "attention.query_scale": 0.0,
    "attention.softcap": 0.0,
}

# Factors of Llama's relatives, some of which share its model_type.
_MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling", "logit_scale")

# config.json's activation -> ours. Exact GELU is missing because it is not the tanh approximation.
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_HF_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}

# Our array -> its name in a checkpoint. In a block, "model.layers.<layer>." precedes the name.
LLAMA_NAMES: Mapping[str, str] = {
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "final_norm/scale": "model.norm.weight",
    "attention_norm/scale": "input_layernorm.weight",
    "attention/q/kernel": "self_attn.q_proj.weight",
    "attention/k/kernel": "self_attn.k_proj.weight",
    "attention/v/kernel": "self_attn.v_proj.weight",
    "attention/out/kernel": "self_attn.o_proj.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "mlp/gate/kernel": "mlp.gate_proj.weight",
    "mlp/up/kernel": "mlp.up_proj.weight",
    "mlp/down/kernel": "mlp.down_proj.weight",
}
QKV_BIAS_NAMES: Mapping[str, str] = {
    f"attention/{name}/bias": f"self_attn.{name}_proj.bias" for name in ("q", "k", "v")
}
QK_NORM_NAMES: Mapping[str, str] = {
    f"attention/{name}_norm/scale": f"self_attn.{name}_norm.weight" for name in ("q", "k")
}
# With norms on both sides of attention and MLP, Gemma has another name for the one before the MLP.
POST_NORM_NAMES: Mapping[str, str] = {
    "post_attention_norm/scale": "post_attention_layernorm.weight",
    "mlp_norm/scale": "pre_feedforward_layernorm.weight",
    "post_mlp_norm/scale": "post_feedforward_layernorm.weight",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
      model_type, architecture: what config.json calls it.
      names: our array -> its name in the checkpoint.
      read: config.json -> our fields; raises UserError for a model that they cannot express.
      write: our fields -> config.json. `read(write(fields)) == fields` decides whether the family can hold a model.
    """

    model_type: str
    architecture: str
    names: Mapping[str, str]
    read: Callable[[HFConfig], Fields]
    write: Callable[[Fields], dict[str, Any]]


def read_sizes(
    config: HFConfig,
    *,
    tied: bool,
    kv_heads: int | None,
    head_dim: int | None = None,
    act: str = "hidden_act",
) -> Fields:
    """The fields that every family has.

    Args:
      tied: the value that stands for an absent tie_word_embeddings in the family.
      kv_heads: the value for an absent num_key_value_heads; None = as many as heads, which null in the file also means.
      head_dim: the value for an absent head_dim; None = hidden_size / num_attention_heads.
      act: the field that holds the activation.
    """
    config.refuse("quantization_config", "quantised safetensors are not read; use the unquantised model or a GGUF file")
    config.refuse("use_bidirectional_attention", "only causal attention is supported")
    for name in _MULTIPLIERS:
        config.refuse(name, "no such multiplier is supported", 1)
    heads, embed_dim = config.integer("num_attention_heads"), config.integer("hidden_size")
    if head_dim is None and config.values.get("head_dim") is None and embed_dim % heads:
        raise config.error("hidden_size", f"not a multiple of num_attention_heads = {heads}, and there is no head_dim")
    stated = "num_key_value_heads" in config.values
    return PLAIN | {
        "vocab_size": config.integer("vocab_size"),
        "num_layers": config.integer("num_hidden_layers", largest=MAX_LAYERS),
        "embed_dim": embed_dim,
        "num_heads": heads,
        "num_kv_heads": config.integer("num_key_value_heads", heads if stated or kv_heads is None else kv_heads),
        "head_dim": config.integer("head_dim", head_dim or embed_dim // heads),
        "mlp_dim": config.integer("intermediate_size"),
        "activation": _ACTIVATIONS[config.choice(act, tuple(_ACTIVATIONS))],
        "norm_eps": config.number("rms_norm_eps", 1e-6),
        "tie_embeddings": config.flag("tie_word_embeddings", tied),
    }


def write_sizes(fields: Fields, act: str = "hidden_act") -> dict[str, Any]:
    """The inverse of `read_sizes`."""
    return {
        "vocab_size": fields["vocab_size"],
        "num_hidden_layers": fields["num_layers"],
        "hidden_size": fields["embed_dim"],
        "num_attention_heads": fields["num_heads"],
        "num_key_value_heads": fields["num_kv_heads"],
        "head_dim": fields["head_dim"],
        "intermediate_size": fields["mlp_dim"],
        act: _HF_ACTIVATIONS[fields["activation"]],
        "rms_norm_eps": fields["norm_eps"],
        "tie_word_embeddings": fields["tie_embeddings"],
    }


def require_whole_heads(config: HFConfig) -> None:
    """Raises unless the heads divide hidden_size, as transformers demands in some families even with a head_dim."""
    heads = config.integer("num_attention_heads")
    if config.integer("hidden_size") % heads:
        raise config.error("hidden_size", f"must be a multiple of num_attention_heads = {heads} in this family")


def layer_fields(kinds: Sequence[str], window: int) -> Fields:
    """`attention.kind`, `.pattern` (the shortest that repeats to `kinds`) and `.local_window`."""
    pattern = shortest_pattern(kinds)
    return {
        "attention.kind": kinds[0] if len(pattern) == 1 else FULL,
        "attention.pattern": "" if len(pattern) == 1 else ",".join(pattern),
        "attention.local_window": window if LOCAL in kinds else 0,
    }


def kinds_of(fields: Fields) -> list[str]:
    """The kind of every layer."""
    kinds = pattern_kinds(fields["attention.pattern"], fields["attention.kind"])
    return [kinds[layer % len(kinds)] for layer in range(fields["num_layers"])]


def read_layer_types(config: HFConfig, default: Sequence[str]) -> Fields:
    """The layers that config.json's layer_types lists, else `default` (our kinds)."""
    names = config.strings("layer_types")
    if names is None:
        kinds = list(default)
    else:
        unknown = sorted(set(names) - set(_LAYER_TYPES))
        if unknown:
            raise config.error("layer_types", f"{unknown[0]!r} is not supported; allowed: {', '.join(_LAYER_TYPES)}")
        if len(names) != config.integer("num_hidden_layers"):
            raise config.error("layer_types", f"{len(names)} entries for {config.integer('num_hidden_layers')} layers")
        kinds = [_LAYER_TYPES[name] for name in names]
    window = config.window(SLIDING_WINDOW)
    if LOCAL in kinds and not window:
        raise config.error("sliding_window", "layers of sliding_attention need a whole number of at least 1")
    return layer_fields(kinds, window)


def write_layer_types(fields: Fields) -> list[str]:
    """The inverse of `read_layer_types`. Kinds that are not exact attention keep our name."""
    names = {kind: name for name, kind in _LAYER_TYPES.items()}
    return [names.get(kind, kind) for kind in kinds_of(fields)]
