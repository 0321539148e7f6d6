"""The paper's experiments at a size for two CPU cores: from scratch, and from a model pretrained with exact attention.

    python train.py --config=configs/paper.py:pretrain --workdir=runs/paper/pretrained
    python train.py --config=configs/paper.py:dark --config.init_from=runs/paper/pretrained --workdir=runs/paper/dark
    python train.py --config=configs/paper.py:dark,window=32 --config.init_from=runs/paper/pretrained --workdir=...

The model has 1.1 M parameters and reads rows of 256 tokens of the Python standard library (a BPE of 2,048). `pretrain`
is the exact model. Any other first argument is a mechanism that starts from `init_from`; the arguments of
configs/finetune.py follow it. window=0 (the default here) is the paper's form, features everywhere; window=32 is the
hybrid. See benchmarks/paper.py.
"""

import ml_collections

from configs import finetune, quickstart
from darkformer_jax.config.arguments import PAPER_FORM, argument_names, set_arguments
from darkformer_jax.mixers import MIXERS

PRETRAIN_ARGUMENTS = ("steps", "lr", "seed")
FINE_TUNING = ("context=256", "batch=8", "steps=150", "lr=1e-3")
OF_MECHANISMS = {"window=0": "window", "chunk=32": "chunk_size", "geometry_lr=3e-3": "geometry_learning_rate"}


def get_config(arguments: str = "pretrain") -> ml_collections.ConfigDict:
    """The config. arguments: pretrain or a mechanism, then comma-separated name=value."""
    kind, *others = arguments.split(",")
    if kind == "pretrain":
        c = quickstart.get_config()
        c.model.attention.update(PAPER_FORM, kind="softmax")
        set_arguments(c, others, PRETRAIN_ARGUMENTS, "configs/paper.py:pretrain")
        return c
    own = [argument for argument, field in OF_MECHANISMS.items() if kind in MIXERS and field in MIXERS[kind].uses]
    given = argument_names(others)
    ours = [argument for argument in (*FINE_TUNING, *own) if argument_names([argument])[0] not in given]
    c = finetune.get_config(",".join([kind, *ours, *others]))
    c.model.dtype = "float32"
    c.model.remat = "none"
    c.optimizer.warmup_steps = min(20, c.num_steps // 4)
    c.eval.every = 50
    c.checkpoint.every = 0
    return c
