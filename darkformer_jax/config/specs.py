"""Makes a model's specs from a config. Specs have no defaults: every field comes from the config."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from darkformer_jax.config.base import fields
from darkformer_jax.config.pattern import ATTENTION, Layer, parse_pattern
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from darkformer_jax.mixers.positions import RopeSpec
from darkformer_jax.mixers.spec import MixerSpec
from darkformer_jax.model.spec import ModelSpec


def model_spec(config: ml_collections.ConfigDict, tokenizer_vocab: int, num_outputs: int = 0) -> ModelSpec:
    """The spec of the model, for a validated config, its tokenizer and its task.

    num_outputs: outputs per sequence that the task needs; 0 = logits of the next token.

    Raises:
      UserError: model.vocab_size is below the tokenizer's.
    """
    model = config.model
    if 0 < model.vocab_size < tokenizer_vocab:
        raise UserError(f"model.vocab_size = {model.vocab_size} is smaller than the tokenizer's {tokenizer_vocab}")
    own = {
        "vocab_size": model.vocab_size or tokenizer_vocab,
        "pattern": mixer_specs(config),
        "num_outputs": num_outputs,
        "pooling": config.task.pooling,
    }
    return ModelSpec(**_by_name(ModelSpec, own, model))


def mixer_specs(config: ml_collections.ConfigDict) -> tuple[MixerSpec, ...]:
    """The mixers of successive layers, as `model.attention.pattern` or `.kind` names them."""
    attention = config.model.attention
    return tuple(_mixer_spec(config, layer) for layer in parse_pattern(attention.pattern, attention.kind))


def _mixer_spec(config: ml_collections.ConfigDict, layer: Layer) -> MixerSpec:
    uses = MIXERS[layer.kind].uses
    options = {name: value for name, value in config.model.attention.items() if name not in ("kind", "pattern")}
    for name in options.keys() - uses:
        off = fields()[ATTENTION + name].off
        options[name] = options[name] if off is None else off
    if "positions" not in uses:
        options["positions"] = "none"  # the field's default, which it has where nothing uses it, is not this
    own = {"kind": layer.kind, "seed": config.seed, "rope": _rope(config.model, "rope_local_theta" in uses)}
    return MixerSpec(**_by_name(MixerSpec, {**own, **options, **layer.options}, config.model))


def _rope(model: ml_collections.ConfigDict, is_local: bool) -> RopeSpec:
    """The rotary positions of a layer. is_local: `rope_local_theta`, which is never scaled, applies to it."""
    rope = RopeSpec(**{field.name: model[f"rope_{field.name}"] for field in dataclasses.fields(RopeSpec)})
    if is_local and model.rope_local_theta:
        return dataclasses.replace(rope, theta=model.rope_local_theta, scaling="none")
    return rope


def _by_name(spec: Any, own: Mapping[str, Any], section: ml_collections.ConfigDict) -> dict[str, Any]:
    """The fields of a spec: those in `own`, and the rest from the config's section by their names."""
    names = [field.name for field in dataclasses.fields(spec)]
    return {name: own[name] if name in own else section[name] for name in names}
