"""A small DARKFormer on the Python standard library's own text, in a few minutes on two CPU cores.

    python train.py

1.1 M parameters; a BPE of 2,048 tokens is trained first. Each query sees its own chunk of 32 tokens and the chunk
before it exactly, and the rest through 64 random features in a learned geometry. A gate per token and head decides how
much of the past it keeps, and a convolution of 4 tokens shows each token its neighbours. The report compares the
held-out bits per byte with those of `gzip -9` and `xz -9` on the same bytes. A run takes about 7 minutes on two idle
cores.
"""

import ml_collections

from darkformer_jax.config import base


def get_config() -> ml_collections.ConfigDict:
    """The config."""
    c = base.get_config()
    c.model.dtype = "float32"  # CPUs have no bfloat16 units
    c.num_steps = 750
    c.batch_size = 8
    c.sequence_length = 256
    c.data.tokenizer = "bpe:2048"
    c.model.attention.window = 32
    c.model.attention.chunk_size = 32
    c.model.attention.decay = "gate"
    c.model.attention.conv_width = 4
    c.eval.every = 150
    c.eval.batches = 8
    c.checkpoint.every = 150
    return c
