"""One model and one data set with any mechanism, for the paper's ablations and the controls.

    python train.py --config=configs/ablation.py:attention=performer --workdir=runs/performer
    python train.py --config=configs/ablation.py:attention=dark,m=128,window=64,seed=1 --workdir=runs/dark-hybrid

Arguments, all optional: attention (a name in the README's table), m (random features per head), window and chunk
(tokens), sinks, positions, decay, conv (tokens that a short convolution sees), lr (peak learning rate), geometry_lr,
steps, seed. Any other field is overridden as usual: --config.model.qk_norm=True. The data are bytes of the Python
standard library. With 0.9 M parameters, a run takes about 15 minutes on two CPU cores.
"""

import ml_collections

from darkformer_jax.config import base
from darkformer_jax.config.arguments import set_arguments

ARGUMENTS = (
    "attention", "m", "window", "chunk", "sinks", "positions", "decay", "conv", "lr", "geometry_lr", "steps", "seed",
)  # fmt: skip


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    """The config. arguments: comma-separated name=value."""
    c = base.get_config()
    c.model.dtype = "float32"
    c.model.attention.chunk_size = 64
    c.num_steps = 400
    c.batch_size = 8
    c.sequence_length = 512
    c.eval.every = 100
    c.eval.batches = 16
    c.checkpoint.every = 100
    c.checkpoint.keep = 1
    set_arguments(c, filter(None, arguments.split(",")), ARGUMENTS, "configs/ablation.py")
    return c
