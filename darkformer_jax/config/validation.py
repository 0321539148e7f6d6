"""From a config (ml_collections, or a workdir's JSON) to checked values; mistakes are found before any compile."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, get_args

import ml_collections

from darkformer_jax.config import base
from darkformer_jax.config.fields import flat_fields
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MECHANISMS
from darkformer_jax.mixers.layers import ACTIVATIONS
from darkformer_jax.mixers.positions import RopeScaling
from darkformer_jax.mixers.spec import AttentionSpec, pattern_kinds
from darkformer_jax.model.heads import Pooling
from darkformer_jax.model.trainable import REGIMES
from darkformer_jax.model.transformer import REMAT_POLICIES, ModelSpec
from darkformer_jax.ops.linear import WindowKernel
from darkformer_jax.ops.projections import ProjectionKind

SCHEDULES = ("cosine", "rsqrt", "constant")
LABELLED_TASKS = ("classification", "regression")
TASKS = ("language_model", *LABELLED_TASKS)
LABELLED_SOURCE = "labelled"
DTYPES = ("bfloat16", "float32")
FEATURE_KINDS = ("performer", "dark", "lfk")
WINDOW_KINDS = (*FEATURE_KINDS, "window_only")
EXACT_KINDS = ("softmax", "softmax_local")

_AT_LEAST_ONE = (
    "num_steps",
    "batch_size",
    "sequence_length",
    "accumulation_steps",
    "model.num_layers",
    "model.embed_dim",
    "model.num_heads",
    "model.num_kv_heads",
    "model.head_dim",
    "model.mlp_dim",
    "model.rope_factor",
    "model.rope_original_length",
    "model.attention.num_features",
    "model.attention.chunk_size",
    "eval.batch_size",
    "checkpoint.keep",
    "log.every",
    "profile.steps",
    "sample.max_new_tokens",
)
_AT_LEAST_ZERO = (
    "seed",
    "model.vocab_size",
    "model.lora_rank",
    "model.rope_local_theta",
    "model.rope_attention_factor",
    "model.attention.query_scale",
    "model.attention.softcap",
    "model.attention.local_window",
    "model.attention.redraw_every",
    "model.attention.window",
    "model.attention.num_sinks",
    "model.logit_softcap",
    "data.num_workers",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "optimizer.z_loss",
    "optimizer.geometry_learning_rate",
    "eval.every",
    "eval.batches",
    "checkpoint.every",
    "profile.first_step",
    "sample.temperature",
    "sample.top_k",
)
_POSITIVE = [
    "model.norm_eps",
    "model.rope_theta",
    "model.rope_low_freq_factor",
    "model.rope_high_freq_factor",
    "model.rope_beta_fast",
    "model.rope_beta_slow",
    "model.attention.geometry_init",
    "optimizer.learning_rate",
    "optimizer.eps",
]
_CHOICES: dict[str, tuple[str, ...]] = {
    "task.name": TASKS,
    "task.pooling": get_args(Pooling),
    "model.activation": tuple(ACTIVATIONS),
    "model.dtype": DTYPES,
    "model.remat": ("none", *REMAT_POLICIES),
    "model.rope_scaling": get_args(RopeScaling),
    "model.attention.kind": tuple(MECHANISMS),
    "model.attention.projections": get_args(ProjectionKind),
    "model.attention.window_kernel": get_args(WindowKernel),
    "optimizer.schedule": SCHEDULES,
    "optimizer.train": tuple(REGIMES),
}


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for the first field out of range or contradicting another, naming it and what is allowed."""
    flat = dict(flat_fields(config.to_dict()))
    for name, value in flat.items():
        _require(not isinstance(value, float) or math.isfinite(value), f"{name} = {value}: must be finite")
    for names, smallest in ((_AT_LEAST_ONE, 1), (_AT_LEAST_ZERO, 0)):
        for name in names:
            _require(flat[name] >= smallest, f"{name} = {flat[name]}: must be at least {smallest}")
    for name in _POSITIVE:
        _require(flat[name] > 0, f"{name} = {flat[name]}: must be positive")
    for name, allowed in _CHOICES.items():
        _require(flat[name] in allowed, f"{name} = {flat[name]!r}: allowed: {', '.join(allowed)}")
    _validate_model(config.model)
    _validate_training(config)
    _validate_task(config)


def _validate_model(model: ml_collections.ConfigDict) -> None:
    attention = model.attention
    _require(
        model.num_heads % model.num_kv_heads == 0,
        f"model.num_heads = {model.num_heads} is not a multiple of model.num_kv_heads = {model.num_kv_heads}",
    )
    _require(model.head_dim % 2 == 0, f"model.head_dim = {model.head_dim}: must be even, for rotary positions")
    kinds = pattern_kinds(model.attention.pattern, model.attention.kind)
    for kind in kinds:
        _require(kind in MECHANISMS, f"model.attention.pattern has {kind!r}: allowed: {', '.join(MECHANISMS)}")
    _require(
        len(kinds) <= model.num_layers,
        f"model.attention.pattern has {len(kinds)} entries, more than model.num_layers = {model.num_layers}",
    )
    _validate_rope(model, kinds)
    _validate_exact(attention, kinds)
    _require(
        attention.window % attention.chunk_size == 0,
        f"model.attention.window = {attention.window} is not a multiple of chunk_size = {attention.chunk_size}",
    )
    _require(
        not attention.num_sinks or attention.window > 0,
        f"model.attention.num_sinks = {attention.num_sinks} needs a window; model.attention.window = 0",
    )
    _require(
        not attention.window or bool({*WINDOW_KINDS} & set(kinds)),
        f"model.attention.window = {attention.window}: none of {', '.join(kinds)} has a window; allowed: 0",
    )
    _require(
        attention.window > 0 or attention.window_kernel == "dark",
        f"model.attention.window_kernel = {attention.window_kernel!r} needs a window; model.attention.window = 0",
    )
    _require(
        not attention.far_gain or (attention.window > 0 and bool({*FEATURE_KINDS} & set(kinds))),
        f"model.attention.far_gain = {attention.far_gain} needs a window and one of {', '.join(FEATURE_KINDS)}; "
        f"model.attention.window = {attention.window}, layers are {', '.join(kinds)}",
    )
    for kind in kinds:
        if kind in ("random", "constant"):
            _require(
                not attention.window, f"model.attention.window = {attention.window}: {kind!r} does not look at q and k"
            )
        if kind == "window_only":
            _require(attention.window > 0, "model.attention.window = 0: 'window_only' needs a window")
    _require(
        not attention.redraw_every or bool({"performer", "dark", "random"} & set(kinds)),
        f"model.attention.redraw_every = {attention.redraw_every}, but {', '.join(kinds)} has no random projections",
    )
    _require(
        not attention.learn_projections or "dark" in kinds,
        f"model.attention.learn_projections = True: none of {', '.join(kinds)} is dark; allowed: False",
    )
    _require(
        not (attention.learn_projections and attention.redraw_every),
        f"model.attention.redraw_every = {attention.redraw_every} with learn_projections = True; allowed: 0",
    )


def _validate_rope(model: ml_collections.ConfigDict, kinds: tuple[str, ...]) -> None:
    scaling = model.rope_scaling
    _require(
        not model.rope_local_theta or "softmax_local" in kinds,
        f"model.rope_local_theta = {model.rope_local_theta}: none of {', '.join(kinds)} is softmax_local; allowed: 0",
    )
    _require(
        scaling != "none" or model.rope_factor == 1,
        f"model.rope_factor = {model.rope_factor} with model.rope_scaling = 'none'; allowed: 1",
    )
    if scaling == "llama3":
        _require(
            model.rope_low_freq_factor < model.rope_high_freq_factor,
            f"model.rope_low_freq_factor = {model.rope_low_freq_factor}: must be below "
            f"model.rope_high_freq_factor = {model.rope_high_freq_factor}",
        )
    if scaling == "yarn":
        _require(
            model.rope_beta_slow < model.rope_beta_fast,
            f"model.rope_beta_slow = {model.rope_beta_slow}: must be below "
            f"model.rope_beta_fast = {model.rope_beta_fast}",
        )
        _require(model.rope_theta > 1, f"model.rope_theta = {model.rope_theta}: must be above 1 for 'yarn'")
    _require(
        scaling == "yarn" or not model.rope_attention_factor,
        f"model.rope_attention_factor = {model.rope_attention_factor} with model.rope_scaling = {scaling!r}; "
        "allowed: 0",
    )


def _validate_exact(attention: ml_collections.ConfigDict, kinds: tuple[str, ...]) -> None:
    _require(
        not attention.softcap or bool({*EXACT_KINDS} & set(kinds)),
        f"model.attention.softcap = {attention.softcap}: none of {', '.join(kinds)} is exact attention; allowed: 0",
    )
    if "softmax_local" in kinds:
        _require(attention.local_window > 0, "model.attention.local_window = 0: 'softmax_local' needs a window")
    else:
        _require(
            not attention.local_window,
            f"model.attention.local_window = {attention.local_window}: none of {', '.join(kinds)} is softmax_local; "
            "allowed: 0",
        )


def _validate_training(config: ml_collections.ConfigDict) -> None:
    optimizer, sample = config.optimizer, config.sample
    _require(config.seed < 2**32, f"seed = {config.seed}: must be below 2**32")
    _require(
        config.batch_size % config.accumulation_steps == 0,
        f"batch_size = {config.batch_size} is not a multiple of accumulation_steps = {config.accumulation_steps}",
    )
    _require(
        optimizer.warmup_steps < config.num_steps or config.num_steps == 1,
        f"optimizer.warmup_steps = {optimizer.warmup_steps} is not shorter than num_steps = {config.num_steps}",
    )
    for name in ("b1", "b2"):
        value = optimizer[name]
        _require(0 <= value < 1, f"optimizer.{name} = {value}: must be in [0, 1)")
    _require(
        0 <= optimizer.final_fraction <= 1, f"optimizer.final_fraction = {optimizer.final_fraction}: must be in [0, 1]"
    )
    rank = config.model.lora_rank
    _require(
        optimizer.train != "lora" or rank > 0, "model.lora_rank = 0 with optimizer.train = 'lora': must be at least 1"
    )
    _require(
        optimizer.train == "lora" or not rank,
        f"model.lora_rank = {rank} with optimizer.train = {optimizer.train!r}; allowed: 0, or optimizer.train = 'lora'",
    )
    _require(
        optimizer.train != "geometry" or optimizer.geometry_learning_rate > 0,
        "optimizer.geometry_learning_rate = 0.0 with optimizer.train = 'geometry': nothing would be trained",
    )
    _require(0 < sample.top_p <= 1, f"sample.top_p = {sample.top_p}: must be in (0, 1]")
    _require(
        all(isinstance(prompt, str) for prompt in sample.prompts),
        f"sample.prompts = {sample.prompts}: must be strings",
    )
    distill = config.distill
    _require(0 <= distill.weight <= 1, f"distill.weight = {distill.weight}: must be in [0, 1]")
    _require(
        bool(distill.workdir) == (distill.weight > 0),
        f"distill.weight = {distill.weight} with distill.workdir = {distill.workdir!r}; allowed: both or neither",
    )
    fraction = config.data.heldout_fraction
    _require(0 <= fraction < 1, f"data.heldout_fraction = {fraction}: must be at least 0 and below 1")


def _validate_task(config: ml_collections.ConfigDict) -> None:
    task, source = config.task, config.data.source
    labelled = task.name in LABELLED_TASKS
    _require(
        labelled == (source == LABELLED_SOURCE),
        f"data.source = {source!r} with task.name = {task.name!r}; allowed: {LABELLED_SOURCE!r} with "
        f"{' or '.join(LABELLED_TASKS)}, other sources with language_model",
    )
    unused: dict[str, Any] = {"optimizer.z_loss": 0.0, "distill.weight": 0.0}
    if not labelled:
        unused = {f"task.{name}": value for name, value in base.get_config().task.items() if name != "name"}
    flat = dict(flat_fields(config.to_dict()))
    for name, value in unused.items():
        _require(flat[name] == value, f"{name} = {flat[name]!r} with task.name = {task.name!r}; allowed: {value!r}")
    fraction = config.data.heldout_fraction
    _require(
        not (fraction and task.heldout_files),
        f"data.heldout_fraction = {fraction} with task.heldout_files = {task.heldout_files!r}; allowed: 0",
    )


def model_spec(config: ml_collections.ConfigDict, tokenizer_vocab: int, num_outputs: int = 0) -> ModelSpec:
    """The model that a validated config, its tokenizer and its task make.

    num_outputs: per sequence, of the task; 0 = logits of the next token.

    Raises:
      UserError: a model.vocab_size below the tokenizer's.
    """
    model, attention = config.model, config.model.attention
    if 0 < model.vocab_size < tokenizer_vocab:
        raise UserError(f"model.vocab_size = {model.vocab_size} is smaller than the tokenizer's {tokenizer_vocab}")
    computed = ("vocab_size", "pattern", "attention", "num_outputs", "pooling")
    fields = {field.name: model[field.name] for field in dataclasses.fields(ModelSpec) if field.name not in computed}
    spec = AttentionSpec(
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        num_features=attention.num_features,
        projections=attention.projections,
        geometry_init=attention.geometry_init,
        chunk_size=attention.chunk_size,
        window=attention.window,
        num_sinks=attention.num_sinks,
        seed=config.seed,
        query_scale=attention.query_scale,
        softcap=attention.softcap,
        local_window=attention.local_window,
        window_kernel=attention.window_kernel,
        far_gain=attention.far_gain,
        learn_projections=attention.learn_projections,
    )
    return ModelSpec(
        vocab_size=model.vocab_size or tokenizer_vocab,
        pattern=pattern_kinds(model.attention.pattern, model.attention.kind),
        attention=spec,
        num_outputs=num_outputs,
        pooling=config.task.pooling,
        **fields,
    )


def from_json(saved: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The config of a workdir's config.json."""
    return ml_collections.ConfigDict(saved).lock()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
