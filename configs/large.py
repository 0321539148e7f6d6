"""Shapes of public models with linear attention, for plans before there are machines: memory, collectives, time.

    python -m darkformer_jax.compile --config=configs/large.py:gemma_2b --topology=v5e:16x16 --config.mesh.fsdp=-1
    python -m darkformer_jax.compile --config=configs/large.py:llama_7b,batch=64,context=8192 --topology=v5p:4x4x4 ...

The first argument is the shape: gemma_2b (Gemma 1, arXiv 2403.08295: 18 layers, one kv head of 256) or llama_7b (Llama
2, arXiv 2307.09288: 32 layers, 32 heads of 128). Others follow: attention (default: dark), m (256), window, chunk (256)
and sinks, context (tokens per row) and batch (rows per step). Data and steps are lm_1b's. No such run has been made.
"""

import ml_collections

from configs import lm_1b
from darkformer_jax.config.arguments import set_arguments
from darkformer_jax.errors import UserError

SHAPES = {
    "gemma_2b": {
        "vocab_size": 256_128,
        "num_layers": 18,
        "embed_dim": 2048,
        "num_heads": 8,
        "num_kv_heads": 1,
        "head_dim": 256,
        "mlp_dim": 16_384,
        "activation": "gelu_tanh",
        "norm_plus_one": True,
        "scale_embeddings": True,
        "tie_embeddings": True,
    },
    "llama_7b": {
        "vocab_size": 32_000,
        "num_layers": 32,
        "embed_dim": 4096,
        "num_heads": 32,
        "num_kv_heads": 32,
        "head_dim": 128,
        "mlp_dim": 11_008,
        "activation": "silu",
        "tie_embeddings": False,
    },
}
ARGUMENTS = ("attention", "m", "window", "chunk", "sinks", "context", "batch")


def get_config(arguments: str = "gemma_2b") -> ml_collections.ConfigDict:
    """The config. arguments: the shape, then comma-separated name=value."""
    shape, *others = arguments.split(",")
    if shape not in SHAPES:
        raise UserError(f"configs/large.py has no shape {shape!r}; allowed: {', '.join(SHAPES)}")
    c = lm_1b.get_config("paper")
    c.model.update(SHAPES[shape])
    c.model.attention.kind = "dark"
    c.model.attention.chunk_size = 256
    c.sequence_length = 8192
    c.mesh.data, c.mesh.fsdp = 1, -1
    set_arguments(c, others, ARGUMENTS, "configs/large.py")
    c.eval.batch_size = c.batch_size
    return c
