"""Every field of an experiment, with its default, its unit and what it allows. The only place with defaults.

Other configs call `get_config()` from here and change what their experiment needs. Unknown fields are refused by
ml_collections (the config is locked), contradictory values by `config.validation.validate`, both before any compile.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """A small byte-level DARKFormer on the Python standard library's own text."""
    c = ml_collections.ConfigDict()

    c.seed = 0  # every random choice (weights, projections, data order) is a function of this and the step
    c.num_steps = 1000  # optimizer steps; a resumed run may have more, and a cosine then ends later
    c.batch_size = 16  # sequences an optimizer step, over all devices
    c.sequence_length = 512  # tokens a sequence
    c.accumulation_steps = 1  # micro-batches an optimizer step; divides batch_size
    c.init_from = ""  # a workdir whose newest weights start this run ("" = from scratch); may change the mechanism

    w = c.task = ml_collections.ConfigDict()
    w.name = "language_model"  # what is learned: language_model | classification | regression
    # the others: data.source = labelled, and a head of its own on the pooled outputs of the last layer
    w.pooling = "last"  # of a sequence's outputs: last (of its last real token) | mean (over its real tokens)
    w.text_column = "text"  # of a table, or field of a JSON object
    w.label_column = "label"  # names of classes, or a regression's numbers
    w.heldout_files = ""  # as data.files; "" = data.heldout_fraction of data.files, chosen by a hash of each text

    m = c.model = ml_collections.ConfigDict()
    m.vocab_size = 0  # 0 = the tokenizer's; larger pads the table, smaller is refused
    m.num_layers = 4
    m.embed_dim = 128
    m.num_heads = 4  # query heads
    m.num_kv_heads = 4  # key/value heads; divides num_heads
    m.head_dim = 32
    m.mlp_dim = 384  # hidden width of the gated MLP
    m.activation = "silu"  # of the MLP gate: silu (Llama) | gelu_tanh (Gemma)
    m.norm_eps = 1e-6
    m.rope_theta = 10000.0  # of every layer; of all but the `softmax_local` ones where rope_local_theta is set
    m.rope_local_theta = (
        0.0  # of `softmax_local` layers, never scaled (Gemma 3: 10_000); 0 = rope_theta and its scaling
    )
    m.rope_scaling = "none"  # of rope_theta's frequencies: none | linear | llama3 (Llama 3.1) | yarn (arXiv 2309.00071)
    m.rope_factor = 1.0  # linear, llama3, yarn: the new context length over that of pretraining
    m.rope_low_freq_factor = 1.0  # llama3: fewer turns in rope_original_length than this are slowed by rope_factor
    m.rope_high_freq_factor = 4.0  # llama3: more turns than this are kept; in between, a mixture
    m.rope_original_length = 8192  # llama3, yarn: context of pretraining, tokens
    m.rope_beta_fast = 32.0  # yarn: more turns in rope_original_length than this are kept
    m.rope_beta_slow = 1.0  # yarn: fewer turns than this are slowed by rope_factor; in between, a mixture
    m.rope_attention_factor = 0.0  # yarn: multiplies the rotated q and k; 0 = 0.1 ln(rope_factor) + 1
    m.qk_norm = False  # RMSNorm of each head's q and k before RoPE
    m.qkv_bias = False  # biases of the projections to q, k and v (Qwen2)
    m.norm_plus_one = False  # norms multiply by 1 + weight, and weights start at 0 (Gemma)
    m.post_norms = False  # norms behind attention and behind the MLP too, before the residual sums (Gemma 2, 3)
    m.tie_embeddings = True
    m.scale_embeddings = False  # multiply embeddings by sqrt(embed_dim) (Gemma)
    m.logit_softcap = 0.0  # cap * tanh(logits / cap); 0 = none (Gemma 2: 30)
    m.lora_rank = 0  # of low-rank updates of q, k, v and out, x W + (x A) B; optimizer.train = lora needs it, 0 = none
    m.dtype = "bfloat16"  # of activations and matmul operands: bfloat16 | float32; weights and logits are float32
    m.remat = "none"  # what the backward pass recomputes, per block: none | dots (keep matmul outputs) | full

    a = m.attention = ml_collections.ConfigDict()
    a.kind = "dark"  # softmax | softmax_local | performer | dark | lfk | random | constant | window_only
    a.pattern = ""  # kinds of successive layers, repeated: "softmax,dark,dark"; "" = `kind` everywhere
    # (its length need not divide num_layers: the last repetition is then cut short)
    a.query_scale = 0.0  # of the products of q and k; 0 = head_dim^-0.5 (Gemma 2, 3: query_pre_attn_scalar^-0.5)
    a.softcap = 0.0  # softmax, softmax_local: cap * tanh(logits / cap); 0 = none (Gemma 2: 50)
    a.local_window = 0  # softmax_local: tokens that a query sees, its own included (Mistral, Gemma: sliding_window)
    a.num_features = 64  # m, random features a head
    a.projections = "orthogonal"  # iid | orthogonal | orthogonal_unsigned (biased; reproduces public Performer codes)
    a.redraw_every = 0  # optimizer steps between redraws of the projections; 0 = never
    a.geometry_init = 1.0  # M starts as this times the identity; 1 is Performer
    a.learn_projections = False  # dark: w is trained beside M (lfk: in its place), and then estimates no kernel
    a.chunk_size = 128  # tokens a chunk of the linear scan
    a.window = 0  # tokens before the own chunk that are seen exactly; a multiple of chunk_size; 0 = features everywhere
    a.num_sinks = 0  # first tokens of a document that every query sees exactly; needs a window
    a.window_kernel = "dark"  # of what is seen exactly: dark (what features estimate) | softmax (M left out)
    a.far_gain = False  # a learned log gain a query head on all that is seen through features; needs a window

    d = c.data = ml_collections.ConfigDict()
    d.source = "stdlib"  # stdlib | text | news | array_record | labelled
    d.files = (
        ""  # text: comma-separated globs of .txt, .md, .jsonl, plain or .gz; array_record: prepare_data's directory
    )
    # (labelled: globs of .tsv, .csv, .jsonl, plain or .gz)
    d.tokenizer = (
        "bytes"  # bytes | bpe:<vocab> (trained on the training split) | a tokenizer.json | a SentencePiece .model
    )
    # ("" with array_record: whatever the data was prepared with; else with init_from: its tokenizer)
    d.heldout_fraction = 0.0  # of the documents, chosen by a hash of each, never trained on; 0 = 0.05, or as prepared
    d.num_workers = 0  # grain worker processes; 0 = threads in this process

    o = c.optimizer = ml_collections.ConfigDict()  # AdamW
    o.train = "all"  # all | qkv_geometry (q, k, v projections and M) | geometry (M, learned projections)
    # | lora (low-rank updates of rank model.lora_rank, and M); what is not trained is frozen and takes no moments
    o.learning_rate = 3e-3  # peak
    o.geometry_learning_rate = 3e-4  # peak, of M and of learned projections: a tenth, they set the scale of exponents
    o.warmup_steps = 50
    o.schedule = "cosine"  # cosine | rsqrt | constant, after the warm-up
    o.final_fraction = 0.1  # cosine ends at this fraction of the peak
    o.b1 = 0.9
    o.b2 = 0.95
    o.eps = 1e-8
    o.weight_decay = 0.1  # of matrices; never of M, norms or biases
    o.clip_norm = 1.0  # global gradient norm; 0 = no clipping
    o.z_loss = 1e-4  # weight of mean(logsumexp(logits)^2); 0 = none

    t = c.distill = ml_collections.ConfigDict()  # learning from a teacher; its arrays take memory, it is not saved
    t.workdir = ""  # whose newest weights teach; same tokenizer and number of ids: the exact model of init_from, say
    t.weight = 0.0  # w in (1 - w) cross-entropy + w KL(teacher || student), to 1; 0 = none. `loss` stays cross-entropy

    e = c.eval = ml_collections.ConfigDict()
    e.every = 100  # steps; 0 = only at the end
    e.batches = 0  # held-out batches an evaluation; 0 = the whole split, as always after the last step
    e.batch_size = 16

    k = c.checkpoint = ml_collections.ConfigDict()
    k.every = 100  # steps; 0 = only at the end
    k.keep = 3  # newest checkpoints kept; beside them the best by held-out loss, of steps that are evaluated too

    g = c.log = ml_collections.ConfigDict()
    g.every = 10  # steps between lines of metrics.jsonl

    s = c.sample = ml_collections.ConfigDict()  # printed at the end and written to samples.txt
    s.prompts = ("def ", "import ", "The ")
    s.max_new_tokens = 120
    s.temperature = 0.8
    s.top_k = 0  # 0 = all
    s.top_p = 1.0

    p = c.profile = ml_collections.ConfigDict()  # a profiler's recording in <workdir>/profile, for TensorBoard or xprof
    p.first_step = 0  # 0 = none; 1 holds the compilation
    p.steps = 3

    h = c.mesh = ml_collections.ConfigDict()  # devices an axis; at most one -1 = what is left
    h.data = -1
    h.fsdp = 1  # splits the batch, as data does, and parameters and optimizer state by their width
    h.tensor = 1  # splits heads, the MLP and the vocabulary; random features where it does not divide num_kv_heads
    h.context = 1  # splits sequence_length, and with it the memory of activations; see docs/attention.md

    return c.lock()
