"""The configs of the training that makes a calibrated model keep what its exact original can do.

Attention transfer (`calibrate`) fits each layer to the original's own inputs. Its errors add up from layer to layer.
Three stages follow, each a run of its own that starts from the one before, with the original as its teacher:

    hidden   each layer gives what the original's layer gives, on the inputs that it gets in this model
    logits   the model predicts what the original predicts
    long     the same, in longer contexts

The parts of two public recipes: RADLADS (arXiv 2505.03005) and LoLCATs (arXiv 2410.10254). Low-rank updates of q, k, v
and out are trained, and M; a stage goes on with those of the stage before.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from darkformer_jax.config.conversion import continuation_config
from darkformer_jax.errors import UserError

_OF_STAGES: Mapping[str, Mapping[str, Any]] = {
    "hidden": {"num_steps": 200, "distill.hidden_weight": 1.0},
    "logits": {"num_steps": 500, "distill.weight": 1.0},
    "long": {
        "num_steps": 100,
        "distill.weight": 1.0,
        "sequence_length": 4096,
        "batch_size": 2,
        "optimizer.learning_rate": 1e-4,
        "optimizer.geometry_learning_rate": 2e-4,
    },
}
TRAINED_STAGES = tuple(_OF_STAGES)


def stage_config(stage: str) -> ml_collections.ConfigDict:
    """The config of a stage. Still to be set: `init_from`, `distill.workdir` and the data.

    Raises UserError for an unknown stage.
    """
    if stage not in TRAINED_STAGES:
        raise UserError(f"stage {stage!r} is unknown; allowed: {', '.join(TRAINED_STAGES)}")
    c = continuation_config()
    c.model.remat = "full"  # pretrained models are deep
    c.model.lora_rank = 16
    c.batch_size = 8
    c.sequence_length = 1024
    o = c.optimizer
    o.train = "lora"
    o.learning_rate = 5e-4
    o.geometry_learning_rate = 1e-3
    o.warmup_steps = 20
    o.weight_decay = 0.0
    o.z_loss = 0.0  # pretrained without it
    c.eval.every = 0  # figures come from the text that no stage sees
    c.eval.batch_size = 8
    c.checkpoint.keep = 1
    c.sample.prompts = ()
    c.update_from_flattened_dict(dict(_OF_STAGES[stage]))
    return c
