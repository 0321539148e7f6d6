"""Every field of an experiment, with its default, its range and its unit. The only place with defaults.

Experiments call `get_config()` from here and change what they need. ml_collections refuses a field that is not here.
`config.validation.validate` refuses a value that is out of range or contradicts another. Both come before any compile.
`config.fields` explains `off`, `needs` and `since`.
"""

import functools
from collections.abc import Mapping
from typing import get_args

import ml_collections

from darkformer_jax.config.fields import (
    Field,
    Section,
    anything,
    at_least,
    choice,
    default_config,
    flat_section,
    fraction,
    positive,
    some_of,
    strings,
)
from darkformer_jax.mixers import MIXERS
from darkformer_jax.mixers.backend import Backend
from darkformer_jax.mixers.layers import ACTIVATIONS
from darkformer_jax.mixers.positions import RopeScaling
from darkformer_jax.mixers.spec import Decay, Positions
from darkformer_jax.model.heads import Pooling
from darkformer_jax.model.trainable import REGIMES
from darkformer_jax.model.transformer import REMAT_POLICIES
from darkformer_jax.ops.linear import WindowKernel
from darkformer_jax.ops.projections import ProjectionKind

DTYPES = ("bfloat16", "float32")
LANGUAGE_MODEL = "language_model"
LABELLED_TASKS = ("classification", "regression")
TASKS = (LANGUAGE_MODEL, *LABELLED_TASKS)  # the keys of tasks.TASKS, which this module may not import
LABELLED_SOURCE = "labelled"  # the only one that the tasks on labelled texts read
TRACKERS = ("wandb", "mlflow")  # the keys of training.trackers.TRACKERS; not imported either
SOURCES = ("stdlib", "text", "news", "chat", "array_record", LABELLED_SOURCE)  # what data/ reads; not imported either


def get_config() -> ml_collections.ConfigDict:
    """A small byte-level DARKFormer on the Python standard library's own text."""
    return default_config(declare()).lock()


@functools.cache
def fields() -> Mapping[str, Field]:
    """Every field by its dotted name."""
    return dict(flat_section(declare()))


def declare() -> Section:
    """The fields, section by section."""
    c = Section()
    c.seed = at_least(0, 0, below=2**32)  # weights, projections and data order are functions of this and the step
    # Optimizer steps. A resumed run may have more; the cosine then falls to the new last step.
    c.num_steps = at_least(1, 1000)
    c.batch_size = at_least(1, 16)  # sequences per optimizer step, over all devices
    c.sequence_length = at_least(1, 512)  # tokens per sequence
    c.accumulation_steps = at_least(1, 1)  # micro-batches per optimizer step; divides batch_size
    c.init_from = anything("")  # a workdir whose newest weights start this run ("" = none); may change the mechanism
    c.task = _task()
    c.model = _model()
    c.data = _data()
    c.optimizer = _optimizer()

    t = c.distill = Section()  # learning from a teacher, whose arrays take memory and are not saved
    t.workdir = anything("", since=1)  # the teacher, by its newest weights; same tokenizer and number of ids
    # w and v in (1 - w - v) `loss` + w KL(teacher || student) + v `hidden`; `loss` is the cross-entropy, and `hidden`
    # the mean over layers of |h - teacher's h|^2 / |teacher's h|^2, where h is what a block gives (docs/finetuning.md).
    t.weight = fraction(0.0, off=0.0, since=1)
    t.hidden_weight = fraction(0.0, off=0.0, since=7)  # v; the teacher has as many layers, of the same width

    e = c.eval = Section()
    e.every = at_least(0, 100)  # steps; 0 = only at the end
    e.batches = at_least(0, 0)  # held-out batches per evaluation; 0 = the whole split; after the last step always 0
    e.batch_size = at_least(1, 16)
    # Early stopping: a run ends after so many evaluations in a row that are no better than the best one; 0 = never.
    e.patience = at_least(0, 0, since=4)

    k = c.checkpoint = Section()
    k.every = at_least(0, 100)  # steps; 0 = only at the end
    k.keep = at_least(1, 3)  # newest checkpoints to keep; the best evaluated one is kept as well

    g = c.log = Section()
    g.every = at_least(1, 10)  # steps between lines of metrics.jsonl, which have their means
    g.trackers = some_of("", TRACKERS, since=4)  # which get the same, beside TensorBoard: wandb, mlflow or both

    s = c.sample = Section()  # printed at the end and written to samples.txt
    s.prompts = strings("", "", "", off=())  # "" = a piece of the run's own held-out text
    s.max_new_tokens = at_least(1, 120)
    s.temperature = at_least(0, 0.8)
    s.top_k = at_least(0, 0)  # 0 = all
    s.top_p = fraction(1.0, low="(")

    p = c.profile = Section()  # a profiler's recording in <workdir>/profile, for TensorBoard or xprof
    p.first_step = at_least(0, 0, since=1)  # 0 = none; step 1 includes the compilation
    p.steps = at_least(1, 3, since=1)

    h = c.mesh = Section()  # devices per axis; at most one may be -1 = all that are left
    h.data = anything(-1)
    h.fsdp = anything(1)  # splits the batch, like data, and also the width of parameters and optimizer state
    h.tensor = anything(1)  # splits heads, MLP and vocabulary; random features if it does not divide num_kv_heads
    h.context = anything(1, since=1)  # splits sequence_length, and, as fsdp does, parameters (docs/attention.md)
    return c


def _task() -> Section:
    w = Section()
    # What is learned. classification, regression: labels of whole texts, by a head on the last layer's outputs.
    w.name = choice(LANGUAGE_MODEL, TASKS, since=2)
    # These two alone have a head. It sees the output of the last real token, or the mean output.
    w.pooling = choice("last", get_args(Pooling), since=2)
    # Of labelled files, which a language model may read as well: without the labels (docs/lra.md, self-pretraining).
    w.text_column = anything("text", since=2)  # column of a table, or field of a JSON object; of a pair "a,b"
    w.label_column = anything("label", since=2)  # holds class names, or the numbers of a regression
    w.heldout_files = anything("", since=2)  # like data.files; "" = data.heldout_fraction of the texts in data.files
    return w


def _model() -> Section:
    m = Section()
    m.vocab_size = at_least(0, 0)  # 0 = the tokenizer's; larger pads the table, smaller is refused
    m.num_layers = at_least(1, 4)
    m.embed_dim = at_least(1, 128)
    m.num_heads = at_least(1, 4)  # query heads
    m.num_kv_heads = at_least(1, 4)  # key/value heads; divides num_heads
    m.head_dim = at_least(1, 32)
    m.mlp_dim = at_least(1, 384)  # hidden width of the gated MLP
    m.activation = choice("silu", ACTIVATIONS)  # in the MLP's gate: silu (Llama) | gelu_tanh (Gemma)
    m.norm_eps = positive(1e-6)
    m.rope_theta = positive(10000.0)  # for all layers, except `softmax_local` ones if rope_local_theta is set
    # Theta of `softmax_local` layers, without scaling (Gemma 3: 10_000); 0 = rope_theta with its scaling.
    m.rope_local_theta = at_least(0, 0.0, off=0.0, since=1)
    m.rope_scaling = choice("none", get_args(RopeScaling), since=1)  # linear | llama3 (Llama 3.1) | yarn (2309.00071)
    m.rope_factor = at_least(1, 1.0, since=1)  # linear, llama3, yarn: new context length over that of pretraining
    m.rope_low_freq_factor = positive(1.0, since=1)  # llama3: pairs with fewer turns are slowed by rope_factor
    m.rope_high_freq_factor = positive(4.0, since=1)  # llama3: pairs with more turns are kept; in between, a mixture
    m.rope_original_length = at_least(1, 8192, since=1)  # llama3, yarn: context of pretraining, tokens
    m.rope_beta_fast = positive(32.0, since=1)  # yarn: pairs with more turns in rope_original_length are kept
    m.rope_beta_slow = positive(1.0, since=1)  # yarn: pairs with fewer are slowed by rope_factor; in between, a mixture
    m.rope_attention_factor = at_least(0, 0.0, since=1)  # yarn: multiplies the rotated q and k; 0 = 0.1 ln(factor) + 1
    m.qk_norm = anything(False)  # RMSNorm of each head's q and k before RoPE
    m.qkv_bias = anything(False, since=1)  # biases of the projections to q, k and v (Qwen2)
    m.norm_plus_one = anything(False, since=1)  # norms multiply by 1 + weight, and weights start at 0 (Gemma)
    m.post_norms = anything(False, since=1)  # norms after attention and MLP, too, before the residual sums (Gemma 2, 3)
    m.tie_embeddings = anything(True)
    m.scale_embeddings = anything(False)  # multiply embeddings by sqrt(embed_dim) (Gemma)
    m.logit_softcap = at_least(0, 0.0)  # cap * tanh(logits / cap); 0 = none (Gemma 2: 30)
    m.lora_rank = at_least(0, 0, since=1)  # rank of low-rank updates of q, k, v and out, x W + (x A) B; 0 = none
    m.causal = anything(True, since=2)  # False: an encoder, whose tokens see the whole document; not for language_model
    m.dtype = choice(DTYPES[0], DTYPES)  # activations and matmuls; weights and logits are float32
    m.remat = choice("none", ("none", *REMAT_POLICIES))  # what backward recomputes, per block: dots = all but matmuls
    m.attention = _attention()
    return m


def _attention() -> Section:
    """The mixers of the layers. Each kind states which fields it uses (darkformer_jax/mixers)."""
    a = Section()
    a.kind = choice("dark", MIXERS)  # for every layer, unless there is a pattern
    # Kinds of successive layers, repeated over the depth: "softmax,dark,dark". The last repetition may be incomplete.
    # Layers may have options of their own: "softmax,dark(m=128,window=64)".
    a.pattern = anything("")
    a.query_scale = at_least(0, 0.0, since=1)  # factor on the products of q and k; 0 = head_dim^-0.5
    a.softcap = at_least(0, 0.0, off=0.0, since=1)  # exact attention: cap * tanh(logits / cap); 0 = none (Gemma 2: 50)
    a.local_window = at_least(0, 0, off=0, since=1)  # softmax_local: tokens that a query sees, its own included
    a.num_features = at_least(1, 64)  # m, random features per head; linformer: mixtures, nystromformer: landmarks
    a.projections = choice("orthogonal", get_args(ProjectionKind))  # orthogonal_unsigned: biased (docs/attention.md)
    a.redraw_every = at_least(0, 0, off=0)  # optimizer steps between redraws of the projections; 0 = never
    a.geometry_init = positive(1.0)  # M starts as this times the identity; 1 is Performer
    a.learn_projections = anything(False, off=False, since=1)  # dark: w is trained, too, and then estimates no kernel
    # performer, dark: q and k are taken in coordinates of their own, which `calibrate --geometry=balanced` finds.
    a.balanced = anything(False, off=False, since=8)
    a.chunk_size = at_least(1, 128)  # tokens per chunk of the linear scan; reformer: of the sorted text
    # What computes layers with features: scan | parallel, for GPUs | pallas, kernels for TPUs (docs/attention.md). auto
    # is the scan: no GPU or TPU has run the others. It is of the run, not of its model: verbs that load one take auto.
    a.backend = choice("auto", get_args(Backend), off="auto", since=9)
    a.window = at_least(0, 0, off=0)  # tokens seen exactly before the own chunk, whole chunks; 0 = features everywhere
    a.num_sinks = at_least(0, 0, off=0, needs="window")  # first tokens of a document that every query sees exactly
    # Kernel of the keys seen exactly: dark (which the features estimate) | softmax (without M).
    a.window_kernel = choice("dark", get_args(WindowKernel), off="dark", needs="window", since=1)
    a.far_gain = anything(False, off=False, needs="window", since=1)  # a learned log gain per head on the far part
    # Tokens of a document after which the total weight of what is seen through features stops growing; 0 = none.
    a.far_horizon = at_least(0, 0, off=0, needs="window", since=10)
    # The first key/value heads, with their queries, have exact attention to everything, and a cache that grows.
    a.exact_kv_heads = at_least(0, 0, off=0, since=8)
    # How a layer tells positions: rope rotates q and k; alibi multiplies the kernel by exp(-slope distance). Exact
    # attention with alibi or a decay holds all its logits in memory: no library has a fast kernel for it.
    a.positions = choice("rope", get_args(Positions), off="rope", since=3)
    # A decay of the kernel with the distance, per key/value head: learned = a slope; gate = each token decides.
    a.decay = choice("none", get_args(Decay), off="none", since=3)
    # Tokens after which a weight has fallen to 1/e, at the start: rises geometrically from head to head.
    a.shortest_memory = at_least(0.01, 2.0, off=2.0, needs="decay", since=3)
    a.longest_memory = at_least(0.01, 128.0, off=128.0, needs="decay", since=3)
    a.undecayed_heads = at_least(0, 0, off=0, needs="decay", since=3)  # key/value heads, the last ones, without decay
    # Tokens that a causal convolution of q, k and v sees, its own included, per head and dimension; 0 = none.
    a.conv_width = at_least(0, 0, off=0, since=3)
    a.horizon = at_least(0, 0, off=0, since=4)  # cosformer: tokens that a document may have at most
    a.state_size = at_least(1, 128, since=5)  # mamba2: numbers that its state holds for each dimension of a head
    a.expand = at_least(
        1, 2, since=5
    )  # mamba2: heads, as multiple of num_heads; gated_deltanet: size of v, of head_dim
    a.num_hashes = at_least(1, 2, since=6)  # reformer: rounds of hashing, each with rotations and a sorting of its own
    return a


def _data() -> Section:
    d = Section()
    d.source = choice("stdlib", SOURCES)
    # text: globs of .txt, .md, .jsonl, plain or .gz, and .parquet. chat: .jsonl and .parquet with conversations, whose
    # answers are learned, in the form of the tokenizer's chat template (docs/chat.md). labelled: .tsv, .csv, .jsonl,
    # .parquet. array_record: the directory that prepare_data wrote. text, array_record: several sources may have
    # weights, their shares of the training rows: "books:0.7,code/*.jsonl:0.3" (docs/training.md).
    d.files = anything("")
    d.text_field = anything("text", since=4)  # text: the field or column of .jsonl and .parquet with the text
    # bytes | bpe:<vocab> (trained on the training split) | a tokenizer.json | a SentencePiece .model; "" = the one that
    # prepared the array_record, else that of init_from.
    d.tokenizer = anything("bytes")
    # Share of the documents of each source, or of conversations, chosen by hash; 0 = 0.05, or 0.15 of labelled texts,
    # or as prepared.
    d.heldout_fraction = fraction(0.0, high=")")
    d.num_workers = at_least(0, 0)  # grain worker processes; 0 = threads in this process
    return d


def _optimizer() -> Section:
    o = Section()  # AdamW
    # all | qkv_geometry (q, k, v projections and M) | geometry (M, learned projections) | lora (low-rank updates of
    # rank model.lora_rank, and M). Each also trains what no pretrained model brings: a classifier's head, gates,
    # slopes, convolutions, E and F of linformer, and layers that are no attention. Other parameters are frozen and have
    # no moments.
    o.train = choice("all", REGIMES, since=1)
    o.learning_rate = positive(3e-3)  # peak
    o.geometry_learning_rate = at_least(0, 3e-4)  # peak, for M and learned projections, which scale exponents
    o.warmup_steps = at_least(0, 50)
    o.schedule = choice("cosine", ("cosine", "rsqrt", "constant"))  # after the warm-up
    o.final_fraction = fraction(0.1)  # cosine ends at this fraction of the peak
    o.b1 = fraction(0.9, high=")")
    o.b2 = fraction(0.95, high=")")
    o.eps = positive(1e-8)
    o.weight_decay = at_least(0, 0.1)  # on matrices; never on M, norms or biases
    o.clip_norm = at_least(0, 1.0)  # global gradient norm; 0 = no clipping
    o.z_loss = at_least(0, 1e-4, off=0.0)  # weight of mean(logsumexp(logits)^2), of a language model; 0 = none
    return o
