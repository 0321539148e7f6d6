"""A classifier of texts: labelled files, a small model, a head on the last token or on the mean.

    python train.py --config=configs/classify.py:files=spam.jsonl --workdir=runs/spam
    python train.py --config=configs/classify.py:files=train.tsv,heldout=dev.tsv,attention=softmax,pooling=mean

Files are .tsv, .csv, .jsonl or .parquet with a text and a label per line. If their columns are not `text` and `label`,
--config.task.text_column and label_column name them. Without `heldout`, 15% of the texts are held out, chosen by hash.

pretrain=next_token makes a language model of the training texts, without their labels; init_from=<its workdir> starts
the classifier from its weights.

Arguments: files, heldout (a file, or globs in quotes), pretrain (none, next_token), init_from, attention (as in
configs/ablation.py), m (random features per head), window and chunk (tokens), causal (False: tokens see their whole
text), pooling (last, mean), length (tokens read per text), batch, lr and geometry_lr (peak learning rates), steps,
seed.

0.13 M parameters on the first 256 bytes of a text; two minutes of CPU time. Of SpamAssassin's e-mails (python -m
benchmarks.spam_assassin) it then tells 94% of the held-out ones right; 70% are ham. See docs/classification.md.
"""

import ml_collections

from darkformer_jax.config import base
from darkformer_jax.config.arguments import set_arguments, take_pretraining

ARGUMENTS = (
    "files", "heldout", "init_from", "attention", "m", "window", "chunk", "causal", "pooling", "length", "batch", "lr",
    "geometry_lr", "steps", "seed",
)  # fmt: skip


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
    """The config. arguments: comma-separated name=value."""
    c = base.get_config()
    c.task.name = "classification"
    c.task.pooling = "mean"
    c.data.source = "labelled"
    c.model.dtype = "float32"  # CPUs have no bfloat16 units
    c.model.num_layers = 2
    c.model.embed_dim = 64
    c.model.num_heads = c.model.num_kv_heads = 2
    c.model.mlp_dim = 192
    c.model.attention.chunk_size = 64
    c.num_steps = 400
    c.batch_size = 16
    c.sequence_length = 256
    c.optimizer.z_loss = 0.0
    c.eval.every = 100
    c.checkpoint.every = 100
    given = list(filter(None, arguments.split(",")))
    take_pretraining(c, given, "configs/classify.py")
    set_arguments(c, given, ARGUMENTS, "configs/classify.py", taken=("pretrain",))
    return c
