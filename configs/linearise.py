"""A stage of making a pretrained model linear, for those who run the stages one by one. The verb runs them all:

    python -m darkformer_jax.linearise --workdir=runs/smollm2 --text='books/*.txt' --out=runs/smollm2-dark
    python train.py --config=configs/linearise.py:hidden,data=text,files='books/*.txt' \\
        --config.init_from=runs/smollm2-dark --config.distill.workdir=runs/smollm2 --workdir=runs/smollm2-hidden

The first argument is the stage, which follows attention transfer (darkformer_jax.calibrate):

    hidden   each layer learns to give what the exact model's layer gives, from its own inputs (the default)
    logits   the model learns to predict what the exact model predicts
    long     the same, in contexts of 4,096 tokens

Others follow it: data (text, stdlib, ...) and files, context (tokens), batch (sequences per step), lr and geometry_lr
(peak learning rates), train (what is trained: lora, geometry, qkv_geometry, all; the last three need lora=0), lora
(rank), steps, seed. Any other field is overridden by its name.

The model is that of `init_from`, layer by layer: which layers are exact is not asked again. The teacher,
`distill.workdir`, is the exact model. This form trains on several machines, which the verb does not.
"""

import ml_collections

from darkformer_jax.config.arguments import set_arguments
from darkformer_jax.config.linearisation import stage_config

ARGUMENTS = ("data", "files", "context", "batch", "lr", "geometry_lr", "train", "lora", "steps", "seed")


def get_config(arguments: str = "hidden") -> ml_collections.ConfigDict:
    """The config. arguments: the stage, then comma-separated name=value."""
    stage, *others = arguments.split(",")
    c = stage_config(stage)
    set_arguments(c, others, ARGUMENTS, "configs/linearise.py")
    return c
