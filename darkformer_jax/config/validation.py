"""Finds mistakes in a config before any compile: values out of range, and values that contradict each other."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import ml_collections

from darkformer_jax.config.base import LABELLED_SOURCE, LABELLED_TASKS, SOURCES, fields
from darkformer_jax.config.fields import flat_fields
from darkformer_jax.config.pattern import ATTENTION, Layer, parse_pattern
from darkformer_jax.config.specs import mixer_specs
from darkformer_jax.config.usage import (
    OF_LABELLED_FILES,
    OF_LABELLED_TASKS,
    OF_LANGUAGE_MODELS,
    Fault,
    refuse,
    unused_faults,
)
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from darkformer_jax.mixers.spec import MixerSpec


def validate(config: ml_collections.ConfigDict, overridden: Collection[str] = ()) -> None:
    """Raises UserError for the first field that is out of range or contradicts another.

    All fields of mixers that do not fit the layers are refused together.

    overridden: the fields that the command line of a new run sets; see `config.usage.refuse`.
    """
    values = dict(flat_fields(config.to_dict()))
    for name, field in fields().items():
        field.check(name, values[name])
    _validate_model(config.model)
    _validate_mixers(config, overridden)
    _validate_training(config)
    _validate_task(config)


def _validate_model(model: ml_collections.ConfigDict) -> None:
    _require(
        model.num_heads % model.num_kv_heads == 0,
        f"model.num_heads = {model.num_heads} is not a multiple of model.num_kv_heads = {model.num_kv_heads}",
    )
    _validate_rope(model)


def _validate_mixers(config: ml_collections.ConfigDict, overridden: Collection[str]) -> None:
    """Raises UserError for a field that no layer uses, a need that is not met, or layers that contradict themselves."""
    attention = config.model.attention
    layers = parse_pattern(attention.pattern, attention.kind)
    _require(
        len(layers) <= config.model.num_layers,
        f"model.attention.pattern has {len(layers)} entries, more than model.num_layers = {config.model.num_layers}",
    )
    for mixer in mixer_specs(config):  # first: no other field mends that
        MIXERS[mixer.kind].check_direction(mixer)
    to_be_used = [name for name, field in fields().items() if field.off is not None or name in overridden]
    faults = unused_faults(config, to_be_used)
    specs = zip(layers, mixer_specs(config), strict=True)
    needs = [fault for layer, mixer in specs for fault in _unmet_needs(config, layer, mixer)]
    refuse(list(dict.fromkeys(faults + needs)), overridden)
    for mixer in mixer_specs(config):
        _require(
            mixer.conv_width <= config.sequence_length,
            f"model.attention.conv_width = {mixer.conv_width}: must be at most sequence_length = "
            f"{config.sequence_length}",
        )
        _require(
            not mixer.horizon or mixer.horizon >= config.sequence_length,
            f"model.attention.horizon = {mixer.horizon}: must be at least sequence_length = {config.sequence_length}",
        )
        _require(
            mixer.head_dim % 2 == 0 or not mixer.has_rope,
            f"model.head_dim = {mixer.head_dim}: must be even, for rotary positions",
        )
        MIXERS[mixer.kind].check(mixer)


def _unmet_needs(config: ml_collections.ConfigDict, layer: Layer, mixer: MixerSpec) -> Iterator[Fault]:
    """The fields that a layer needs but that are off, and those that are not off but need one that is.

    Raises UserError for an option of the layer's own in the pattern, which no other field mends.
    """
    for name in sorted(MIXERS[mixer.kind].uses):
        field = fields().get(ATTENTION + name)
        if field is None or field.off is None:
            continue
        value, shown = getattr(mixer, name), f"{ATTENTION}{name} = {getattr(mixer, name)!r}"
        if value == field.off and name in MIXERS[mixer.kind].needs:
            # A document may be as long as a row, and a window has whole chunks.
            fitting = {
                "horizon": config.sequence_length,
                "window": mixer.chunk_size,
                "local_window": 64,
                "decay": "gate",
            }
            needed = "'gate'" if name == "decay" else "at least 1"
            fault = Fault(ATTENTION + name, f"{shown}: {mixer.kind!r} needs {needed}", fitting[name], is_on=False)
        elif value != field.off and field.needs and _is_off(mixer, field.needs):
            why = f"{shown} needs {field.needs}, but {ATTENTION}{field.needs} = {getattr(mixer, field.needs)!r}"
            fault = Fault(ATTENTION + name, why, field.off)
        else:
            continue
        _require(name not in layer.options, fault.why)
        yield fault


def _is_off(mixer: MixerSpec, name: str) -> bool:
    return bool(getattr(mixer, name) == fields()[ATTENTION + name].off)


def _validate_rope(model: ml_collections.ConfigDict) -> None:
    scaling = model.rope_scaling
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


def _validate_training(config: ml_collections.ConfigDict) -> None:
    optimizer = config.optimizer
    _require(
        config.batch_size % config.accumulation_steps == 0,
        f"batch_size = {config.batch_size} is not a multiple of accumulation_steps = {config.accumulation_steps}",
    )
    _require(
        optimizer.warmup_steps < config.num_steps or config.num_steps == 1,
        f"optimizer.warmup_steps = {optimizer.warmup_steps} is not shorter than num_steps = {config.num_steps}; "
        f"allowed: up to {config.num_steps - 1}, such as --config.optimizer.warmup_steps={config.num_steps // 4} "
        "(0 = no warm-up)",
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
    _require(
        not config.eval.patience or config.eval.every > 0,
        f"eval.patience = {config.eval.patience} with eval.every = 0: one evaluation ends no run; "
        "allowed: 0, or eval.every of at least 1",
    )
    distill = config.distill
    shown = f"distill.weight = {distill.weight}"
    shown += f" and distill.hidden_weight = {distill.hidden_weight}" if distill.hidden_weight else ""
    _require(
        bool(distill.workdir) == (distill.weight + distill.hidden_weight > 0),
        f"{shown} with distill.workdir = {distill.workdir!r}; allowed: both or neither",
    )
    _require(distill.weight + distill.hidden_weight <= 1, f"{shown}: their sum must be at most 1")


def _validate_task(config: ml_collections.ConfigDict) -> None:
    """Raises UserError if a field that the task does not use is set: is neither off nor as it is by default."""
    task, source = config.task, config.data.source
    is_labelled = task.name in LABELLED_TASKS
    sources = (LABELLED_SOURCE,) if is_labelled else SOURCES
    _require(
        source in sources,
        f"data.source = {source!r} with task.name = {task.name!r}; allowed: {', '.join(map(repr, sources))}",
    )
    of_labelled = [*OF_LABELLED_TASKS, *(() if source == LABELLED_SOURCE else OF_LABELLED_FILES)]
    values = dict(flat_fields(config.to_dict()))
    for name in OF_LANGUAGE_MODELS if is_labelled else of_labelled:
        value, default, off = values[name], fields()[name].default, fields()[name].off
        allowed = default if off is None else off
        _require(value in (default, off), f"{name} = {value!r} with task.name = {task.name!r}; allowed: {allowed!r}")
    share = config.data.heldout_fraction
    _require(
        not (share and task.heldout_files),
        f"data.heldout_fraction = {share} with task.heldout_files = {task.heldout_files!r}; allowed: 0",
    )


def from_json(saved: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The config of a workdir's config.json, each field of the type of its default, so that flags can override it."""
    return ml_collections.ConfigDict(_typed(saved)).lock()


def _typed(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    typed = {}
    for name, value in section.items():
        field = fields().get(prefix + name)
        kind = type(value) if field is None else type(field.default)
        if isinstance(value, Mapping):
            typed[name] = _typed(value, f"{prefix}{name}.")
        else:
            typed[name] = kind(value) if (type(value), kind) in ((int, float), (list, tuple)) else value
    return typed


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
