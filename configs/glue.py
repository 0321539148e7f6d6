"""A task of GLUE, learned from the weights of a language model.

    python -m darkformer_jax.prepare_data --source=glue --task=cola --files=glue_data --out=data/cola
    python train.py --config=configs/glue.py:task=cola,init_from=runs/smollm2 --workdir=runs/cola
    python -m darkformer_jax.predict --workdir=runs/cola --text=data/cola/test.jsonl --out=cola.jsonl

Arguments: task (cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli), init_from (the workdir of the language model),
files (what prepare_data wrote; data/<task>), attention (default: dark), m, window, chunk, sinks, init (as in
configs/finetune.py), length (tokens per text), batch, lr and geometry_lr (peak learning rates), steps, seed, train and
lora (as there).

The head reads the last token. By default three epochs (MRPC and RTE five) of batches of 32, lengths up to 128, a peak
learning rate of 3e-5 after a tenth of the steps: the recipe of BERT (Devlin et al., arXiv 1810.04805). The development
split is what is held out; MNLI's is the matched one, and `evaluate` scores the other. The test split has no labels.
"""

import ml_collections

from darkformer_jax.config.arguments import argument_names, set_arguments, take_choice
from darkformer_jax.config.conversion import conversion_config, without_window
from darkformer_jax.data.glue import GLUE_TASKS
from darkformer_jax.mixers import MIXERS

ARGUMENTS = (
    "files", "init_from", "m", "window", "chunk", "init", "sinks", "length", "batch", "lr", "geometry_lr", "train",
    "lora", "steps", "seed",
)  # fmt: skip
_SMALL_TASKS = ("mrpc", "rte")  # five epochs


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    """The config. arguments: comma-separated name=value."""
    given = list(filter(None, arguments.split(",")))
    name = take_choice(given, "task", tuple(GLUE_TASKS), "configs/glue.py")
    kinds = ("dark", *(kind for kind in MIXERS if kind != "dark"))
    c = conversion_config(take_choice(given, "attention", kinds, "configs/glue.py"))
    task = GLUE_TASKS[name]
    c.task.name = "classification" if task.classes else "regression"
    c.task.pooling = "last"
    c.data.source = "labelled"
    c.data.files = f"data/{name}"
    c.model.remat = "full"
    c.sequence_length, c.batch_size = 128, 32
    o = c.optimizer
    o.learning_rate, o.geometry_learning_rate, o.weight_decay, o.z_loss = 3e-5, 3e-4, 0.01, 0.0
    c.checkpoint.keep = 1
    set_arguments(c, given, ARGUMENTS, "configs/glue.py", taken=("task", "attention"))
    names = argument_names(given)
    if "sinks" not in names:
        without_window(c)
    if "steps" not in names:
        c.num_steps = (5 if name in _SMALL_TASKS else 3) * task.train_size // c.batch_size
    o.warmup_steps = c.num_steps // 10
    c.eval.every = c.checkpoint.every = max(c.num_steps // 5, 1)
    directory = c.data.files.rstrip("/")
    c.data.files, c.task.heldout_files = (f"{directory}/{split}.jsonl" for split in task.splits[:2])
    return c
