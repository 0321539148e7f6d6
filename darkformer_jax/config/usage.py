"""Which fields the layers of a config use, as mixers state it, and which its task does not use."""

import functools
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from darkformer_jax.config.base import LANGUAGE_MODEL, SOURCES, fields
from darkformer_jax.config.pattern import ATTENTION, parse_pattern
from darkformer_jax.config.specs import mixer_specs
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from darkformer_jax.mixers.spec import MixerSpec

OF_LANGUAGE_MODELS = ("optimizer.z_loss", "distill.weight")
OF_LABELLED_TASKS = ("task.pooling", "model.causal")
OF_LABELLED_FILES = ("task.text_column", "task.label_column", "task.heldout_files")
_SWAPS = {f"{ATTENTION}kind", f"{ATTENTION}pattern"}  # which mixers there are

# Fields that do nothing unless another field has one of these values.
READ_WITH: Mapping[str, tuple[str, tuple[str, ...]]] = {
    **{name: ("task.name", (LANGUAGE_MODEL,)) for name in fields() if name.startswith("sample.")},
    "data.text_field": ("data.source", ("text",)),
    "data.files": ("data.source", tuple(source for source in SOURCES if source != "stdlib")),
    "model.rope_low_freq_factor": ("model.rope_scaling", ("llama3",)),
    "model.rope_high_freq_factor": ("model.rope_scaling", ("llama3",)),
    "model.rope_original_length": ("model.rope_scaling", ("llama3", "yarn")),
    "model.rope_beta_fast": ("model.rope_scaling", ("yarn",)),
    "model.rope_beta_slow": ("model.rope_scaling", ("yarn",)),
    "optimizer.final_fraction": ("optimizer.schedule", ("cosine",)),
}


@functools.cache
def mixer_fields() -> frozenset[str]:
    """The dotted names of the fields that only mixers use."""
    names = set().union(*(mixer.uses for mixer in MIXERS.values()))
    return frozenset(name for name in fields() if _own(name) in names)


def unused_fields(config: ml_collections.ConfigDict) -> set[str]:
    """The dotted names of mixer fields that no layer uses, or that every layer that uses them has as an option."""
    used = _used(config)
    return {name for name in mixer_fields() if _own(name) not in used}


def fields_in_effect(config: ml_collections.ConfigDict) -> set[str]:
    """The dotted names of mixer fields that change what a layer computes or learns beyond rounding."""
    layers = parse_pattern(config.model.attention.pattern, config.model.attention.kind)
    specs = zip(layers, mixer_specs(config), strict=True)
    names = set().union(*(_in_effect(spec) - layer.options.keys() for layer, spec in specs))
    return {name for name in mixer_fields() if _own(name) in names}


class Fault(NamedTuple):
    """A mixer's field whose value does not fit the layers.

    Attributes:
      name: the field.
      why: what is wrong, with its value.
      fitting: a value that fits; None = the field is to be left out.
      is_on: whether its value is another than the one that means "not used".
    """

    name: str
    why: str
    fitting: Any
    is_on: bool = True


def refuse(faults: Sequence[Fault], overridden: Collection[str] = ()) -> None:
    """Raises UserError for all faults at once, if there are any. With overrides, it has the flags that mend them.

    overridden: the fields that the command line sets; the experiment set the others.
    """
    said = []
    flags: dict[str, list[str]] = {"add": [], "instead give": [], "leave out": []}
    for name, why, fitting, is_on in faults:
        is_experiments = is_on and name not in overridden
        if overridden:
            said.append(f"{why}, but the experiment sets it" if is_experiments else why)
        else:
            said.append(f"{why}; allowed: {_shown(fitting)}" if is_on and fitting is not None else why)
        if fitting is None:
            flags["leave out"].append(name)
        else:
            flag = shlex.quote(f"--config.{name}={fitting}")
            flags["instead give" if name in overridden else "add"].append(flag)
    if overridden:
        said += [f"{verb} {' '.join(group)}" for verb, group in flags.items() if group]
    if faults:
        raise UserError("; ".join(said))


def require_new_uses(config: ml_collections.ConfigDict, overridden: Collection[str] = ()) -> None:
    """Raises UserError for fields that a new run sets although nothing uses them.

    The experiment sets a field by giving it another value than the default, the command line by naming it. Where the
    command line swaps the mechanism, what the experiment set for its own mechanism may be left without a use. A saved
    run is not asked: earlier versions allowed such fields.

    overridden: the fields that the command line sets, by their names or after the config's colon.
    """
    _require_of_task(config, overridden)
    refuse(unused_faults(config, overridden), overridden)
    _require_read(config, overridden)
    if _SWAPS.isdisjoint(overridden):
        refuse([Fault(name, _unused(config, name), fields()[name].default) for name in _set_in_vain(config)])


def reset_unused(config: ml_collections.ConfigDict, keep: Collection[str]) -> None:
    """Gives the fields of mixers that no layer uses their defaults, but not those of `keep` and those that are None."""
    for name in _set_in_vain(config):
        if name not in keep:
            config.update_from_flattened_dict({name: fields()[name].default})


def unused_faults(config: ml_collections.ConfigDict, names: Iterable[str]) -> list[Fault]:
    """Those of these fields that belong to mixers and have a value although no layer uses it."""
    used = _used(config)
    return [
        Fault(name, _unused(config, name), fields()[name].off)
        for name in names
        if name in mixer_fields() and _own(name) not in used and _value(config, name) not in (None, fields()[name].off)
    ]


def _require_of_task(config: ml_collections.ConfigDict, names: Iterable[str]) -> None:
    """Raises UserError for the first of these fields that belongs to language models alone, in another task."""
    for name in names:
        value, off = _value(config, name), fields()[name].off
        if name in OF_LANGUAGE_MODELS and config.task.name != LANGUAGE_MODEL and value != off:
            raise UserError(f"{name} = {value!r} with task.name = {config.task.name!r}; allowed: {off!r}")


def _require_read(config: ml_collections.ConfigDict, names: Collection[str]) -> None:
    """Raises UserError for the first of these fields that is set although another field makes it do nothing.

    Of `data`, the experiment's own fields are asked, too, unless the command line swaps the source: the run would read
    other texts than they name.
    """
    rotated = any(spec.has_rope for spec in mixer_specs(config))
    of_data = [name for name in READ_WITH if name.startswith("data.") and READ_WITH[name][0] not in names]
    for name in [*names, *of_data]:
        if _value(config, name) in (fields()[name].default, fields()[name].off):
            continue
        if name.startswith("model.rope_") and not rotated:
            raise UserError(
                f"{name} = {_shown(_value(config, name))}: no layer has rotary positions (model.attention.positions); "
                f"allowed: {_shown(fields()[name].default)}"
            )
        if name not in READ_WITH:
            continue
        other, values = READ_WITH[name]
        if _value(config, other) not in values:
            raise UserError(
                f"{name} = {_shown(_value(config, name))} with {other} = {_shown(_value(config, other))}; allowed: "
                f"{_shown(fields()[name].default)}, or {other} = {' or '.join(map(_shown, values))}"
            )


def _used(config: ml_collections.ConfigDict) -> set[str]:
    """The fields that layers use and do not have as an option, by their own names.

    Where model.attention.pattern is None, another run decides which layers are local ones: they may be there. Where the
    kind is None, too, it decides over all layers.
    """
    attention = config.model.attention
    if attention.kind is None:
        return set().union(*(mixer.uses for mixer in MIXERS.values()))
    layers = parse_pattern(attention.pattern, attention.kind)
    used = set().union(*(MIXERS[layer.kind].uses - layer.options.keys() for layer in layers))
    if attention.pattern is None:
        used |= set().union(*(mixer.uses for mixer in MIXERS.values() if mixer.is_local))
    return used


def _set_in_vain(config: ml_collections.ConfigDict) -> list[str]:
    """The fields of mixers that no layer uses and that differ from their defaults, in the config's order."""
    unused = unused_fields(config)
    return [
        name for name, field in fields().items() if name in unused and _value(config, name) not in (None, field.default)
    ]


def _unused(config: ml_collections.ConfigDict, name: str) -> str:
    """The value, and why no layer uses it: none does, or each that would has a value of its own."""
    attention = config.model.attention
    kinds = list(dict.fromkeys(layer.kind for layer in parse_pattern(attention.pattern, attention.kind)))
    own = [kind for kind in kinds if _own(name) in MIXERS[kind].uses]
    why = f"every {' and '.join(own)} layer has a value of its own" if own else f"no {' or '.join(kinds)} layer uses it"
    return f"{name} = {_shown(_value(config, name))}: {why}"


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, str) else str(value)


def _in_effect(spec: MixerSpec) -> set[str]:
    """What the mixer says, without the fields that need one which is off."""
    names = MIXERS[spec.kind].in_effect(spec)
    needs = {name: fields()[ATTENTION + name].needs for name in names if ATTENTION + name in fields()}
    return {name for name in names if not needs.get(name) or getattr(spec, needs[name]) != _off(needs[name])}


def _off(name: str) -> object:
    return fields()[ATTENTION + name].off


def _own(name: str) -> str:
    return name.rpartition(".")[2]


def _value(config: ml_collections.ConfigDict, name: str) -> object:
    *sections, own = name.split(".")
    return functools.reduce(lambda section, part: section[part], sections, config)[own]
