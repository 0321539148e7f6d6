"""Fine-tuning from the weights of another run or an imported model, perhaps with another attention mechanism.

    python -m darkformer_jax.convert --source=SmolLM2-135M --workdir=runs/smollm2
    python train.py --config=configs/finetune.py:dark --config.init_from=runs/smollm2 --workdir=runs/smollm2-dark
    python train.py --config=configs/finetune.py:softmax --config.init_from=runs/smollm2 --workdir=runs/smollm2-exact

The first argument is the mechanism (default: dark). Others follow it: m (random features per head), window, chunk and
context (tokens), sinks, init (M starts as this times the identity), data (stdlib, text, chat, ...) and files, batch
(sequences per step), lr and geometry_lr (peak learning rates), steps, seed, train (what is trained: all, qkv_geometry,
geometry, lora) and lora (the rank that train=lora needs: `dark,train=lora,lora=16`). As in configs/ablation.py, any
other field is overridden by its name.

Sizes, positions, norms and the tokenizer are those of `init_from`: fields that are None here are filled from its
config.json, and this run's config.json has their values. The mechanism replaces every layer except the local ones
(`softmax_local`), so that models with alternating local and global layers keep the local ones. If all layers are local,
it replaces all. Fields that no layer uses any more, such as model.attention.local_window, are then off. Heads that
`calibrate --exact_heads` left exact stay exact; --config.model.attention.exact_kv_heads=0 replaces them, too.

`keep` in the mechanism's place replaces nothing: the layers, with m, window and the rest, are those of `init_from`. So
training goes on from a model in which `calibrate --exact_layers` or `--exact_heads` left something exact.

`dark,data=chat,files=conversations.jsonl` learns the answers of conversations (docs/chat.md).

With `--config.distill.workdir=runs/smollm2 --config.distill.weight=0.5` the run also learns from the exact model's
predictions.

Every query sees its own chunk of 64 tokens, the chunk before it and the first 4 tokens exactly, and the rest through
64 random features. Keys seen exactly keep the pretrained kernel, without M. M starts at half the identity and learns
faster than the weights, which need little change (darkformer_jax/config/conversion.py says why). Fit M first with
darkformer_jax.calibrate.

window=0 turns off window and sinks: features everywhere, the paper's form.
"""

import ml_collections

from darkformer_jax.config.arguments import argument_names, set_arguments
from darkformer_jax.config.conversion import continuation_config, conversion_config, without_window

ARGUMENTS = (
    "m", "window", "chunk", "init", "sinks", "data", "files", "context", "batch", "lr", "geometry_lr", "train", "lora",
    "steps", "seed",
)  # fmt: skip

KEEP = "keep"
OF_A_MECHANISM = ("m", "window", "chunk", "init", "sinks")  # which `keep` takes from init_from


def get_config(arguments: str = "dark") -> ml_collections.ConfigDict:
    """The config. arguments: the mechanism or `keep`, then comma-separated name=value."""
    kind, *others = arguments.split(",")
    c = continuation_config() if kind == KEEP else conversion_config(kind)
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
    c.checkpoint.keep = 1  # each has three times the model's float32 size
    allowed = [name for name in ARGUMENTS if kind != KEEP or name not in OF_A_MECHANISM]
    set_arguments(c, others, allowed, f"configs/finetune.py:{KEEP}" if kind == KEEP else "configs/finetune.py")
    if kind != KEEP and "sinks" not in argument_names(others):
        without_window(c)
    return c
