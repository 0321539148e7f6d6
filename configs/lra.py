"""Long Range Arena and its like: one small model for all mechanisms, or the official sizes.

    python -m darkformer_jax.prepare_data --source=listops --scale=small --out=data/listops
    python train.py --config=configs/lra.py:task=listops,attention=dark --workdir=runs/listops-dark
    python -m darkformer_jax.evaluate --workdir=runs/listops-dark --text=data/listops/basic_test.tsv

Self-pretraining on the training texts without their labels, then the classifier from these weights:

    python train.py --config=configs/lra.py:task=listops,pretrain=next_token --workdir=runs/listops-pretrained
    python train.py --config=configs/lra.py:task=listops,init_from=runs/listops-pretrained --workdir=runs/listops-tuned

Arguments: task (listops, fashion_mnist, cifar10, pathfinder), files (what prepare_data wrote, or the published ListOps;
data/<task>), pretrain (none, next_token), init_from (a workdir), scale (small, paper), attention (as in
configs/ablation.py), m (random features per head), causal (True: a token does not see later ones; so it is with
pretrain and init_from), pooling (last, mean), length (tokens of the longest text, BOS included), batch, lr and
geometry_lr (peak learning rates), steps, seed.

scale=small is the model of the Nystromformer repository's comparison: 2 layers of width 64, 2 heads of 32. It is for
ListOps of the small scale, for images of 14 x 14 pixels and for Pathfinder of 32 x 32. scale=paper has the official
code's sizes: for ListOps 4 layers of width 512, 8 heads of 64, batches of 32, 5,000 steps; for images 1 layer of width
128, 8 heads of 8, batches of 256, 35,000 steps, 32 x 32 pixels; for Pathfinder the same layer (its authors' later
correction, issue 37 of their repository), batches of 512, 62,400 steps. No text is cut. Positions are rotary. The
validation split chooses the best checkpoint; the test split is for `evaluate`, once. docs/lra.md has results.
"""

from typing import NamedTuple

import ml_collections

from darkformer_jax.config import base
from darkformer_jax.config.arguments import set_arguments, take_choice, take_pretraining
from darkformer_jax.mixers import MIXERS

ARGUMENTS = (
    "files", "init_from", "attention", "m", "causal", "pooling", "length", "batch", "lr", "geometry_lr", "steps",
    "seed",
)  # fmt: skip


class _Layout(NamedTuple):
    """The files of a task and their columns, and the tokens of its longest text, BOS included, by scale."""

    split: str
    text: str
    label: str
    longest: dict[str, int]


_IMAGES = _Layout("{}.tsv", "pixels", "label", {"small": 14 * 14 + 1, "paper": 32 * 32 + 1})
TASKS = {
    "listops": _Layout("basic_{}.tsv", "Source", "Target", {"small": 128, "paper": 2000}),
    "fashion_mnist": _IMAGES,
    "cifar10": _IMAGES,
    "pathfinder": _IMAGES._replace(longest={"small": 32 * 32 + 1, "paper": 32 * 32 + 1}),
}
SCALES = ("small", "paper")


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    """The config. arguments: comma-separated name=value."""
    given = list(filter(None, arguments.split(",")))
    task = take_choice(given, "task", tuple(TASKS), "configs/lra.py")
    scale = take_choice(given, "scale", SCALES, "configs/lra.py")
    layout = TASKS[task]
    c = base.get_config()
    c.task.name = "classification"
    c.task.text_column, c.task.label_column = layout.text, layout.label
    c.task.pooling = "mean"
    c.data.source = "labelled"
    c.data.files = f"data/{task}"
    c.sequence_length = layout.longest[scale]
    c.model.causal = False
    c.model.dtype = "float32"
    c.optimizer.z_loss = 0.0
    c.eval.every = c.checkpoint.every = 500
    c.checkpoint.keep = 1
    c.log.every = 50
    {"small": _small, "paper": _paper}[scale](c, task)
    take_pretraining(c, given, "configs/lra.py")
    set_arguments(c, given, ARGUMENTS, "configs/lra.py", taken=("task", "scale", "pretrain"))
    if "horizon" in MIXERS[c.model.attention.kind].uses:
        c.model.attention.horizon = c.sequence_length
    directory = c.data.files.rstrip("/")
    c.data.files = f"{directory}/{layout.split.format('train')}"
    c.task.heldout_files = f"{directory}/{layout.split.format('val')}"
    c.data.tokenizer = f"{directory}/tokenizer.json"
    return c


def _small(c: ml_collections.ConfigDict, task: str) -> None:
    c.model.num_layers, c.model.embed_dim, c.model.mlp_dim = 2, 64, 128
    c.model.num_heads = c.model.num_kv_heads = 2
    c.model.attention.chunk_size = 64
    c.batch_size, c.num_steps = 32, 2000
    c.optimizer.learning_rate = 1e-3


def _paper(c: ml_collections.ConfigDict, task: str) -> None:
    if task == "listops":
        c.model.num_layers, c.model.embed_dim, c.model.mlp_dim = 4, 512, 1024
        c.model.num_heads = c.model.num_kv_heads = 8
        c.model.head_dim = 64
        c.batch_size, c.num_steps = 32, 5000
        c.optimizer.learning_rate = 1.6e-3  # the official schedule's largest
        c.optimizer.warmup_steps = 1000
    else:
        c.model.num_layers, c.model.embed_dim, c.model.mlp_dim = 1, 128, 128
        c.model.num_heads = c.model.num_kv_heads = 8
        c.model.head_dim = 8
        c.batch_size, c.num_steps = 256, 35_000
        c.optimizer.learning_rate = 5e-4
        c.optimizer.warmup_steps = 175
        c.optimizer.weight_decay = 0.0
    if task == "pathfinder":
        c.batch_size, c.num_steps = 512, 62_400
        c.optimizer.learning_rate = 1e-3
        c.optimizer.warmup_steps = 312
