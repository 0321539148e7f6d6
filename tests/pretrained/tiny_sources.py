"""Tiny Hugging Face directories and GGUF files, written without transformers."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tokenizers as hf

from darkformer_jax.config import base
from darkformer_jax.pretrained.load import plan_import, run_import
from darkformer_jax.pretrained.safetensors_files import ArrayToWrite, shard, write_safetensors
from darkformer_jax.pretrained.source import open_source
from darkformer_jax.runs.load import WorkdirModel, load_model
from darkformer_jax.runs.workdir import Workdir

VOCAB, WIDTH, MLP, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 16, 24, 4, 2, 4, 2

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": LAYERS,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "bos_token_id": 0,
    "eos_token_id": [1, 2],
}


def llama_arrays(dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """The arrays of CONFIG's model."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (WIDTH,),
                "self_attn.q_proj": (HEADS * HEAD_DIM, WIDTH),
                "self_attn.k_proj": (KV_HEADS * HEAD_DIM, WIDTH),
                "self_attn.v_proj": (KV_HEADS * HEAD_DIM, WIDTH),
                "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
                "post_attention_layernorm": (WIDTH,),
                "mlp.gate_proj": (MLP, WIDTH),
                "mlp.up_proj": (MLP, WIDTH),
                "mlp.down_proj": (WIDTH, MLP),
            }.items()
        }
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.3, shape).astype(dtype) for name, shape in shapes.items()}


def write_arrays(directory: Path, arrays: dict[str, np.ndarray], shard_bytes: int = 10**9) -> None:
    """model.safetensors, or its shards and their index."""
    written = [ArrayToWrite(name, value.shape, value.dtype) for name, value in arrays.items()]
    write_safetensors(directory, "model", shard(written, shard_bytes), arrays.values())


def write_tokenizer(directory: Path, size: int = VOCAB) -> None:
    """A tokenizer.json with `size` ids."""
    vocabulary = {"<s>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, size)}
    tokenizer = hf.Tokenizer(hf.models.WordLevel(vocabulary, unk_token="w2"))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))


def write_llama(directory: Path, dtype: Any = np.float32, shard_bytes: int = 10**9, **config: Any) -> Path:
    """A whole directory; `config` changes config.json."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    write_arrays(directory, llama_arrays(dtype), shard_bytes)
    write_tokenizer(directory)
    return directory


def import_source(source: Path | str, workdir: Path, dtype: str | None = None) -> WorkdirModel:
    """Imports, and reads the workdir."""
    run_import(plan_import(open_source(str(source)), base.get_config(), dtype), str(workdir))
    return load_model(Workdir(workdir))


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
