"""A 150 M parameter DARKFormer on the One Billion Word benchmark: features everywhere, gates and a short convolution.

    python -m darkformer_jax.prepare_data --source=news --tokenizer=bpe:32000 --out=data/lm_1b \\
        --files=1-billion-word-language-modeling-benchmark-r13output
    python train.py --config=configs/lm_1b.py --workdir=runs/lm_1b

The preparation takes about half an hour on two cores. 262,144 tokens per step for 20,000 steps are 5.2 G tokens, some
six passes over the text; `--dry_run` prints parameters, state size and FLOPs. The config is for a TPU v5e-16 or one
node of GPUs, which split each batch (data parallelism). With less memory, raise accumulation_steps. Sentences are
packed into rows of 1,024 tokens and attend only to themselves. configs/lm_1b.py:paper is the paper's form: no gates, no
convolution, M starts at I.
"""

import ml_collections

from darkformer_jax.config import base
from darkformer_jax.config.arguments import PAPER_FORM
from darkformer_jax.errors import UserError


def get_config(form: str = "") -> ml_collections.ConfigDict:
    """The config. form: "", or "paper"."""
    if form not in ("", "paper"):
        raise UserError(f"configs/lm_1b.py has no form {form!r}; allowed: paper")
    c = base.get_config()
    c.num_steps = 20_000
    c.batch_size = 256
    c.sequence_length = 1024

    m = c.model
    m.vocab_size = 32_000
    m.num_layers = 12
    m.embed_dim = 768
    m.num_heads = 12
    m.num_kv_heads = 12
    m.head_dim = 64
    m.mlp_dim = 3072
    m.remat = "full"
    m.attention.num_features = 256
    m.attention.chunk_size = 128
    m.attention.decay = "gate"
    m.attention.conv_width = 4
    m.attention.geometry_init = 0.3  # a flat kernel, which few features estimate well (docs/learning.md)
    if form:
        m.attention.update(PAPER_FORM)

    c.data.source = "array_record"
    c.data.files = "data/lm_1b"
    c.data.tokenizer = ""  # the one that the data was prepared with

    o = c.optimizer
    o.learning_rate = 6e-4
    o.geometry_learning_rate = 6e-5
    o.warmup_steps = 1000

    c.eval.every = 1000
    c.eval.batches = 40
    c.eval.batch_size = 256
    c.checkpoint.every = 1000
    c.log.every = 50
    c.sample.prompts = ("The ", "In a statement , ", "It is ")
    return c
