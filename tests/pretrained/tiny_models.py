"""Tiny randomly initialised transformers models of every family, and their directories."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test asks the network

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.runs.load import WorkdirModel
from tests.pretrained.tiny_sources import write_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB = 128
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def _rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, "factor": 4.0, **options}}


LLAMA3 = _rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
YARN = _rope("yarn", original_max_position_embeddings=16)

# name -> model_type, and what differs from SIZES. Windows are shorter than the 24 tokens of `INPUT`.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-one-kv-head-tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-head-dim-llama3": ("llama", {"head_dim": 16, **LLAMA3}),
    "llama-linear": ("llama", _rope("linear")),
    "llama-yarn": ("llama", YARN),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "mistral-full": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-windows": (
        "qwen2",
        {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, **YARN},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma": ("gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": ("gemma2", {"head_dim": 16, "num_hidden_layers": 3, "sliding_window": 6, "query_pre_attn_scalar": 24}),
    "gemma2-no-caps": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 16, "num_hidden_layers": 7, "sliding_window": 5, "query_pre_attn_scalar": 24},
    ),
    "gemma3-linear": (
        "gemma3_text",
        {
            "head_dim": 8,
            "num_hidden_layers": 3,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
}

INPUT = np.random.default_rng(0).integers(0, VOCAB, (2, 24)).astype(np.int32)


def make_model(name: str, dtype: Any = None) -> Any:
    """The transformers model, every parameter drawn: a norm or a bias left at its start would hide mistakes."""
    return random_model(*MODELS[name]).to(dtype or torch.float32)


def random_model(model_type: str, changes: dict[str, Any]) -> Any:
    """A transformers model with `SIZES`, except for `changes`, in float32."""
    config = transformers.AutoConfig.for_model(model_type, **(SIZES | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.to(torch.float32)


def write_source(directory: Path, model: Any, **options: Any) -> str:
    """`model` as a Hugging Face directory, with a tokenizer."""
    model.save_pretrained(directory, **options)
    write_tokenizer(directory, VOCAB)
    return str(directory)


def our_logits(model: WorkdirModel, tokens: np.ndarray = INPUT) -> np.ndarray:
    """[b, n, vocab] of rows that are one document each."""
    positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (tokens.shape[0], 1))
    network = model.network.bind(model.params, model.projections)
    return np.asarray(network(jnp.asarray(tokens), jnp.ones_like(tokens), jnp.asarray(positions))[0])


def their_logits(model: Any, tokens: np.ndarray = INPUT) -> np.ndarray:
    """The same of a transformers model."""
    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.float().numpy()


def load_theirs(directory: Path) -> tuple[Any, dict[str, Any]]:
    """What AutoModelForCausalLM makes of a directory, and its report of keys."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(directory), output_loading_info=True, attn_implementation="eager"
    )
