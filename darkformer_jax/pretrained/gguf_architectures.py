"""The architectures of GGUF files: names of arrays, and what llama.cpp's converter does to them and to config.json.

llama.cpp's `conversion/` writes the files, its `src/models/` says what fields mean that a file leaves out.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from darkformer_jax.errors import UserError
from darkformer_jax.pretrained.families import REFUSED
from darkformer_jax.pretrained.families.family import SLIDING_WINDOW
from darkformer_jax.pretrained.hf_config import HFConfig

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_POST_NORM_NAMES = _BLOCK_NAMES | {
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}
_ROTATED = re.compile(r".*self_attn\.[qk]_proj\.weight")
_NORM = re.compile(r".*norm\.weight")
_WINDOW, _PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
_CAPS = _ATTENTION_CAP, _FINAL_CAP = "attn_logit_softcapping", "final_logit_softcapping"  # as in config.json
_LOCAL_THETA = "rope.freq_base_swa"
_GELU = {"hidden_activation": "gelu_pytorch_tanh"}

# Fields that change what a model computes, and of which only some architectures have any.
REFUSED_FIELDS = {
    "expert_count": "mixtures of experts are",
    _WINDOW: "sliding windows are",
    _PATTERN: "sliding windows are",
    "attention.scale": "another scale of q.k is",
    "attention.temperature_scale": "a scale of q.k that depends on the position is",
    _ATTENTION_CAP: "a soft-cap of attention is",
    _FINAL_CAP: "a soft-cap of the logits is",
    _LOCAL_THETA: "another RoPE in windowed layers is",
    "rope.scaling.attn_factor": "a factor of attention is",
    "rope.scaling.alpha": "NTK-aware scaling is",
}


class Architecture(NamedTuple):
    """A `general.architecture`.

    Attributes:
      hf_class: of a model without windows; the class in config.json's `architectures`.
      own_fields: (fields below the architecture's name, sizes under config.json's names) -> further fields of
        config.json. They win over those that all architectures have.
      reads: which of `REFUSED_FIELDS` it has.
      block_names: arrays of a block -> Hugging Face's names.
      interleaved: rows of q and k are stored as neighbours (x_0, x_1), which RoPE rotates together.
      norm_plus_one: norms are stored as 1 + w.
    """

    model_type: str
    hf_class: str
    own_fields: Callable[[HFConfig, Mapping[str, Any]], dict[str, Any]]
    reads: tuple[str, ...] = ()
    block_names: Mapping[str, str] = _BLOCK_NAMES
    interleaved: bool = False
    norm_plus_one: bool = False

    def hf_name(self, name: str, path: str) -> str:
        """Hugging Face's name of an array in the file `path`. Raises UserError for an array that is not known."""
        if name in _NAMES:
            return _NAMES[name]
        block = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        if block and block[2] in self.block_names:
            return f"model.layers.{int(block[1])}.{self.block_names[block[2]]}"
        raise UserError(f"{path}: array {name} is not part of a {self.hf_class} that is read from GGUF")

    def as_hf(self, name: str, rows: np.ndarray, head_dim: int) -> np.ndarray:
        """Rows of the array with Hugging Face's `name`, as its model has them. Of q and k, they are whole heads."""
        if self.interleaved and _ROTATED.fullmatch(name):
            shape = (-1, head_dim // 2, 2, *rows.shape[1:])
            return rows.reshape(shape).swapaxes(1, 2).reshape(rows.shape)
        return rows - 1 if self.norm_plus_one and _NORM.fullmatch(name) else rows


def architecture_of(metadata: Mapping[str, Any], path: str) -> Architecture:
    """The architecture that a file names. Raises UserError for one that is not read, and says why if that is known."""
    name = metadata.get("general.architecture")
    if isinstance(name, str) and name in ARCHITECTURES:
        return ARCHITECTURES[name]
    why = REFUSED.get(str(name))
    allowed = f"allowed: {', '.join(ARCHITECTURES)}"
    raise HFConfig(metadata, path).error("general.architecture", f"not read; {why or allowed}")


def decimal(value: float) -> float:
    """The shortest decimal number that is the same in float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _plain(get: HFConfig, sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {"hidden_act": "silu"}


def _llama(get: HFConfig, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Llama, and Mistral, whose window llama.cpp's converter leaves out: such a file is a model without windows."""
    window = get.integer(_WINDOW, 0, smallest=0)
    return _mistral(get, sizes) if window else _plain(get, sizes)


def _mistral(get: HFConfig, sizes: Mapping[str, Any]) -> dict[str, Any]:
    window = get.integer(_WINDOW, 0, smallest=0) or None
    named = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    return named | {"hidden_act": "silu", "sliding_window": window}


def _gemma(get: HFConfig, sizes: Mapping[str, Any]) -> dict[str, Any]:
    return dict(_GELU)


def _gemma2(get: HFConfig, sizes: Mapping[str, Any]) -> dict[str, Any]:
    window = get.integer(_WINDOW, SLIDING_WINDOW)
    types = _layer_types(get, sizes["num_hidden_layers"], period=2)
    scalar = _query_scalar(sizes, scaled_by_width=46)
    # Without the fields, the soft-caps are those of an absent field in config.json.
    return _GELU | _soft_caps(get) | {"query_pre_attn_scalar": scalar, "sliding_window": window, "layer_types": types}


def _gemma3(get: HFConfig, sizes: Mapping[str, Any]) -> dict[str, Any]:
    layers, window = sizes["num_hidden_layers"], get.integer(_WINDOW, 0, smallest=0)
    return (
        _GELU
        | _soft_caps(get)
        | {
            "query_pre_attn_scalar": _query_scalar(sizes, scaled_by_width=62),
            "sliding_window": window or None,
            "layer_types": _layer_types(get, layers, period=6) if window else ["full_attention"] * layers,
            "rope_theta": decimal(get.number("rope.freq_base")),  # required: defaults differ between programs
            "rope_local_base_freq": decimal(get.number(_LOCAL_THETA, 10000.0)),
        }
    )


def _soft_caps(get: HFConfig) -> dict[str, float]:
    return {name: decimal(get.number(name)) for name in _CAPS if get.values.get(name) is not None}


def _query_scalar(sizes: Mapping[str, Any], scaled_by_width: int) -> int:
    """q.k is divided by the square root of this. No file states it: the size of 27B, known by its depth, differs."""
    if sizes["num_hidden_layers"] == scaled_by_width:
        return sizes["hidden_size"] // sizes["num_attention_heads"]
    return sizes["head_dim"]


def _layer_types(get: HFConfig, layers: int, period: int) -> list[str]:
    """Which layers have windows: a list of flags, or all but every n-th. n = 0 is all."""
    stated = get.values.get(_PATTERN)
    if isinstance(stated, list):
        if len(stated) != layers or not all(isinstance(flag, bool) for flag in stated):
            raise get.error(_PATTERN, f"must be a whole number, or true or false for each of {layers} layers")
        windowed = stated
    else:
        period = get.integer(_PATTERN, period, smallest=0)
        windowed = [period == 0 or (layer + 1) % period != 0 for layer in range(layers)]
    return ["sliding_attention" if flag else "full_attention" for flag in windowed]


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", _llama, (_WINDOW,), interleaved=True),
    "mistral3": Architecture("mistral", "MistralForCausalLM", _mistral, (_WINDOW,), interleaved=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _plain),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _plain),
    "gemma": Architecture("gemma", "GemmaForCausalLM", _gemma, norm_plus_one=True),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", _gemma2, (_WINDOW, _PATTERN, *_CAPS), _POST_NORM_NAMES, norm_plus_one=True
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _gemma3,
        (_WINDOW, _PATTERN, _FINAL_CAP, _LOCAL_THETA),
        _POST_NORM_NAMES,
        norm_plus_one=True,
    ),
}
