"""GGUF files of the Llama and Qwen architectures as a checkpoint with Hugging Face's names, layout and config.json.

The package `gguf` dequantises arrays to float32 as they are read, some rows at a time.
"""

import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import gguf
import numpy as np

from darkformer_jax.data.tokenizers import Tokenizer
from darkformer_jax.errors import UserError, one_line
from darkformer_jax.pretrained.gguf_header import TensorInfo, read_header
from darkformer_jax.pretrained.gguf_tokenizer import GGUFVocabulary
from darkformer_jax.pretrained.hf_config import HFConfig
from darkformer_jax.pretrained.safetensors_files import StoredArray

QUANTISATIONS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q6_K")

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
_INTERLEAVED = re.compile(r".*self_attn\.[qk]_proj\.weight")  # in the llama architecture
_ROPE_FREQS = "rope_freqs.weight"  # states Llama 3.1's scaling
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_REFUSED = {
    "expert_count": "mixtures of experts are",
    "attention.sliding_window": "sliding windows are",
    "attention.scale": "another scale of q.k is",
    "rope.scaling.attn_factor": "a factor of attention is",
    "rope.scaling.alpha": "NTK-aware scaling is",
}
_READ_ERRORS = (EOFError, KeyError, OSError, OverflowError, RecursionError, ValueError)


class _Tensor(NamedTuple):
    """Where an array is in the file: shape[0] rows of `row_bytes` bytes each, from `offset` on."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    row_bytes: int


class GGUFFile:
    """One .gguf file. Only its header stays in memory, and nothing stays mapped.

    Raises:
      UserError: the file is truncated, damaged, split or of another architecture, or has a quantisation that is not in
        `QUANTISATIONS`.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        metadata, tensors = _read_header(path)
        # The vocabulary is read again when it is needed; until then its strings would take memory that arrays need.
        self._metadata = {name: value for name, value in metadata.items() if not isinstance(value, list)}
        self._rope_freqs = tensors.pop(_ROPE_FREQS, None)
        self._tensors = {_hf_name(path, name): tensor for name, tensor in tensors.items()}
        self.arrays = {name: StoredArray(path, tensor.shape, "F32") for name, tensor in self._tensors.items()}
        self._architecture = self._metadata.get("general.architecture")
        self.config = HFConfig(self._hf_config(), path)

    def read(self, name: str, index: Sequence[slice]) -> np.ndarray:
        """A slice of an array, in float32. A slice of the rows of q or k must hold whole heads."""
        tensor = self._tensors[name]
        rows = range(*index[0].indices(tensor.shape[0]))
        values = self._rows(name, tensor, rows)
        if self._architecture == "llama" and _INTERLEAVED.fullmatch(name):
            values = _undo_interleaving(values, self.config.integer("head_dim"))
        return values[(slice(None), *index[1:])]

    def check_tokenizer(self) -> None:
        GGUFVocabulary(self._metadata, self.path)

    def tokenizer(self) -> Tokenizer:
        return GGUFVocabulary(_read_header(self.path)[0], self.path).tokenizer()

    def _rows(self, name: str, tensor: _Tensor, rows: range) -> np.ndarray:
        # One-dimensional arrays are never quantised: each element is a row.
        offset, count = tensor.offset + rows.start * tensor.row_bytes, len(rows) * tensor.row_bytes
        try:
            data = np.fromfile(self.path, np.uint8, count, offset=offset)
        except OSError as error:
            raise UserError(f"{self.path}: array {name} cannot be read: {error.strerror}") from error
        if data.size != count:
            raise UserError(f"{self.path}: truncated: array {name} ends past the end of the file")
        values = gguf.quants.dequantize(data.reshape(len(rows), tensor.row_bytes), tensor.kind)
        return values.reshape(len(rows), *tensor.shape[1:]).astype(np.float32, copy=False)

    def _hf_config(self) -> dict[str, Any]:
        """The fields of the config.json that the model would have."""
        named = HFConfig(self._metadata, self.path)
        architecture = named.choice("general.architecture", tuple(_ARCHITECTURES))
        below = {name.removeprefix(f"{architecture}."): value for name, value in self._metadata.items()}
        get = HFConfig(below, f"{self.path}: {architecture}")
        heads, width = get.integer("attention.head_count"), get.integer("embedding_length")
        head_dim = get.integer("attention.key_length", width // heads)
        for name, why in _REFUSED.items():
            get.refuse(name, f"{why} not supported in GGUF files", 0)
        for name in ("attention.value_length", "rope.dimension_count"):
            if get.integer(name, head_dim) != head_dim:
                raise get.error(name, f"must equal the head size, {head_dim}")
        vocab = self.arrays.get("model.embed_tokens.weight")
        if vocab is None:
            raise UserError(f"{self.path}: array token_embd.weight is missing")
        return {
            "model_type": architecture,
            "architectures": [_ARCHITECTURES[architecture]],
            "vocab_size": vocab.shape[0],
            "num_hidden_layers": get.integer("block_count"),
            "hidden_size": width,
            "num_attention_heads": heads,
            "num_key_value_heads": get.integer("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": get.integer("feed_forward_length"),
            "hidden_act": "silu",
            "rms_norm_eps": _decimal(get.number("attention.layer_norm_rms_epsilon")),
            "max_position_embeddings": get.integer("context_length"),
            "tie_word_embeddings": "lm_head.weight" not in self.arrays,
            "rope_theta": _decimal(get.number("rope.freq_base", 10000.0)),
            "rope_scaling": self._rope_scaling(get, head_dim),
            **{
                f"{token}_token_id": self._metadata[f"tokenizer.ggml.{key}_token_id"]
                for token, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
                if f"tokenizer.ggml.{key}_token_id" in self._metadata
            },
        }

    def _rope_scaling(self, get: HFConfig, head_dim: int) -> dict[str, Any] | None:
        kind = get.choice("rope.scaling.type", ("none", "linear"), "linear")  # llama.cpp's default
        factor = get.number("rope.scaling.factor", get.number("rope.scale_linear", 1.0))
        if self._rope_freqs is not None:
            factors = self._rows(_ROPE_FREQS, self._rope_freqs, range(self._rope_freqs.shape[0]))
            theta = get.number("rope.freq_base", 10000.0)
            return _llama3_scaling(self.path, factors, theta, head_dim)
        return None if kind == "none" or factor == 1 else {"rope_type": "linear", "factor": _decimal(factor)}


def _read_header(path: str) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """(metadata, array name -> its place). Raises UserError for a file that is not whole."""
    with open(path, "rb") as file:
        try:
            metadata, infos, start = read_header(file)
        except _READ_ERRORS as error:
            raise UserError(f"{path}: truncated, damaged or no GGUF file: {one_line(error)}") from error
    if metadata.get("split.count", 1) not in (0, 1):
        raise UserError(f"{path}: one of {metadata['split.count']} parts; merge them with llama.cpp's gguf-split first")
    size = os.path.getsize(path)
    return metadata, {info.name: _place(path, info, start, size) for info in infos}


def _place(path: str, info: TensorInfo, start: int, size: int) -> _Tensor:
    name, shape = info.name, info.shape
    try:
        quantisation = gguf.GGMLQuantizationType(info.kind)
    except ValueError as error:
        raise UserError(f"{path}: array {name} has the unknown quantisation {info.kind}") from error
    if quantisation.name not in QUANTISATIONS:
        raise UserError(f"{path}: array {name} is {quantisation.name}; allowed: {', '.join(QUANTISATIONS)}")
    block, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
    row = math.prod(shape[1:])
    if row % block or len(shape) not in (1, 2):
        raise UserError(f"{path}: array {name} has shape {list(shape)}, which {quantisation.name} cannot hold")
    row_bytes = row // block * block_bytes
    end = start + info.offset + shape[0] * row_bytes
    if end > size:
        raise UserError(f"{path}: truncated: array {name} ends at byte {end:,}, the file has {size:,}")
    return _Tensor(quantisation, shape, start + info.offset, row_bytes)


def _hf_name(path: str, name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    block = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if block and block[2] in _BLOCK_NAMES:
        return f"model.layers.{int(block[1])}.{_BLOCK_NAMES[block[2]]}"
    raise UserError(f"{path}: array {name} is not part of a model that is read from GGUF: {', '.join(_ARCHITECTURES)}")


def _undo_interleaving(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Turns llama.cpp's pairs of neighbours (x_0, x_1), (x_2, x_3), ... into the halves that our RoPE rotates."""
    shape = (-1, head_dim // 2, 2, *rows.shape[1:])
    return rows.reshape(shape).swapaxes(1, 2).reshape(rows.shape)


def _llama3_scaling(path: str, factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """The llama3 scaling that slows frequencies by `factors`, with the one pair of bounds that Meta has published."""
    low, high, length = 1.0, 4.0, 8192
    factor = float(factors.max(initial=0.0))
    turns = length * theta ** (-np.arange(head_dim // 2) * 2 / head_dim) / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / max(factor, 1.0) + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise UserError(
            f"{path}: array {_ROPE_FREQS} is not the RoPE scaling of Llama 3.1 to 3.3; no other is supported"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }


def _decimal(value: float) -> float:
    """The shortest decimal number that is the same in float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
