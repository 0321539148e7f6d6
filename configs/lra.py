"""Long Range Arena: one small model for all mechanisms, or the sizes of the official code. So far, ListOps.

    python -m darkformer_jax.prepare_data --source=listops --scale=small --out=data/listops
    python train.py --config=configs/lra.py:files=data/listops,attention=dark --workdir=runs/listops-dark
    python -m darkformer_jax.evaluate --workdir=runs/listops-dark --text=data/listops/basic_test.tsv

Arguments: files (the directory with basic_train.tsv and so on, made or downloaded), scale (small, paper), attention (as
in configs/ablation.py), m (random features per head), causal (False: tokens see the whole expression), pooling (last,
mean), batch, lr and geometry_lr (peak learning rates), steps, seed.

scale=small is the model of the Nystromformer repository's comparison: 2 layers of width 64, 2 heads of 32, for
expressions of at most 127 symbols. scale=paper has the official code's sizes for ListOps: 4 layers of width 512, 8
heads, expressions of at most 1,999 symbols; batches of 32, 5,000 steps. Neither cuts an expression. Positions are
rotary. The validation split chooses the best checkpoint; the test split is for `evaluate`, once.
"""

import ml_collections

from darkformer_jax.config import base
from darkformer_jax.config.arguments import set_arguments
from darkformer_jax.errors import UserError

ARGUMENTS = ("files", "attention", "m", "causal", "pooling", "batch", "lr", "geometry_lr", "steps", "seed")
SCALES = ("small", "paper")


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    """The config. arguments: comma-separated name=value."""
    given = list(filter(None, arguments.split(",")))
    scales = [argument for argument in given if argument.startswith("scale=")]
    scale = scales[-1].removeprefix("scale=") if scales else "small"
    if scale not in SCALES or len(scales) > 1:
        raise UserError(f"configs/lra.py: {','.join(scales)!r}; allowed: scale={' or scale='.join(SCALES)}, once")
    c = base.get_config()
    c.task.name = "classification"
    c.task.text_column, c.task.label_column = "Source", "Target"
    c.task.pooling = "mean"
    c.data.source = "labelled"
    c.data.files = "data/listops"
    c.model.causal = False
    c.model.dtype = "float32"
    c.optimizer.z_loss = 0.0
    c.checkpoint.keep = 1
    (_small if scale == "small" else _paper)(c)
    set_arguments(c, [argument for argument in given if argument not in scales], ARGUMENTS, "configs/lra.py")
    directory = c.data.files.rstrip("/")
    c.data.files = f"{directory}/basic_train.tsv"
    c.task.heldout_files = f"{directory}/basic_val.tsv"
    c.data.tokenizer = f"{directory}/tokenizer.json"
    return c


def _small(c: ml_collections.ConfigDict) -> None:
    c.model.num_layers, c.model.embed_dim, c.model.mlp_dim = 2, 64, 128
    c.model.num_heads = c.model.num_kv_heads = 2
    c.model.attention.chunk_size = 64
    c.sequence_length, c.batch_size, c.num_steps = 128, 32, 2000
    c.optimizer.learning_rate = 1e-3
    c.eval.every = c.checkpoint.every = 500
    c.log.every = 50


def _paper(c: ml_collections.ConfigDict) -> None:
    c.model.num_layers, c.model.embed_dim, c.model.mlp_dim = 4, 512, 1024
    c.model.num_heads = c.model.num_kv_heads = 8
    c.sequence_length, c.batch_size, c.num_steps = 2000, 32, 5000
    c.optimizer.learning_rate = 1.6e-3  # the official schedule's largest
    c.optimizer.warmup_steps = 1000
    c.eval.every = c.checkpoint.every = 500
    c.log.every = 50
