"""Fine-tuning from another run's weights, or an imported model's, with another attention mechanism perhaps.

    python -m darkformer_jax.convert --source=SmolLM2-135M --workdir=runs/smollm2
    python train.py --config=configs/finetune.py:dark --config.init_from=runs/smollm2 --workdir=runs/smollm2-dark
    python train.py --config=configs/finetune.py:softmax --config.init_from=runs/smollm2 --workdir=runs/smollm2-exact

The first argument is the mechanism (default: dark); others follow it: m (random features a head), window, chunk and
context (tokens), sinks, init (M starts as this times the identity), batch (sequences a step), lr and geometry_lr (peak
learning rates), steps, seed, train (what is trained: all, qkv_geometry, geometry, lora) and lora (the rank that
train=lora needs: `dark,train=lora,lora=16`). As in configs/ablation.py any other field is overridden by its name.

Sizes, positions, norms and the tokenizer are those of `init_from`: fields that are None here are filled from its
config.json, and stand in this run's own. The mechanism takes the place of every layer but the local ones
(`softmax_local`), so that models which alternate local and global layers keep the local ones; where all layers are
local it takes the place of all. Fields that no layer uses any more (model.attention.local_window, say) are then off.

`--config.distill.workdir=runs/smollm2 --config.distill.weight=0.5` lets the run learn from the exact model's
predictions beside the text.

Every query sees its own chunk of 64 tokens, the chunk before it and the first 4 tokens exactly, and the rest through
64 random features; what is seen exactly keeps the pretrained kernel, without M. M starts at half the identity and
learns faster than the weights, which need little change (darkformer_jax/config/conversion.py says why). Fit it first
with darkformer_jax.calibrate.

window=0 leaves window and sinks out: features everywhere, the paper's form.
"""

import ml_collections

from darkformer_jax.config.arguments import set_arguments
from darkformer_jax.config.conversion import conversion_config, without_window

FIELDS = {
    "m": ("model.attention.num_features", int),
    "window": ("model.attention.window", int),
    "chunk": ("model.attention.chunk_size", int),
    "init": ("model.attention.geometry_init", float),
    "sinks": ("model.attention.num_sinks", int),
    "context": ("sequence_length", int),
    "batch": ("batch_size", int),
    "lr": ("optimizer.learning_rate", float),
    "geometry_lr": ("optimizer.geometry_learning_rate", float),
    "train": ("optimizer.train", str),
    "lora": ("model.lora_rank", int),
    "steps": ("num_steps", int),
    "seed": ("seed", int),
}


def get_config(arguments: str = "dark") -> ml_collections.ConfigDict:
    """`arguments`: the mechanism, then comma-separated name=value."""
    kind, *others = arguments.split(",")
    c = conversion_config(kind)
    c.model.remat = "full"  # pretrained models are deep

    c.num_steps = 500
    c.batch_size = 8
    c.sequence_length = 1024

    o = c.optimizer
    o.learning_rate = 1e-4
    o.geometry_learning_rate = 3e-4
    o.warmup_steps = 20
    o.weight_decay = 0.01
    o.z_loss = 0.0  # pretrained without it

    c.eval.every = 100
    c.eval.batches = 16
    c.eval.batch_size = 8
    c.checkpoint.every = 100
    c.checkpoint.keep = 1  # of three times the model's float32 size each
    set_arguments(c, others, FIELDS, "configs/finetune.py")
    if not any(argument.startswith("sinks=") for argument in others):
        without_window(c)
    return c
