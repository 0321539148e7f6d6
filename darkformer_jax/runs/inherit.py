"""Config fields that come from another run: the sizes of a pretrained model are read from it, never retyped."""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from darkformer_jax.config.base import fields
from darkformer_jax.config.fields import flat_fields
from darkformer_jax.config.pattern import Layer, parse_pattern, show_layer
from darkformer_jax.config.usage import fields_in_effect, mixer_fields, unused_fields
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from darkformer_jax.runs.workdir import CONFIG_FILE, Workdir

_PATTERN, _KIND = "model.attention.pattern", "model.attention.kind"
_EXACT_HEADS = "model.attention.exact_kv_heads"
_OF_A_MECHANISM = ("num_features", "window", "num_sinks", "window_kernel")  # which a conversion chooses anew


def inherit(config: ml_collections.ConfigDict, workdir: Workdir | None = None) -> ml_collections.ConfigDict:
    """`config` with a value for every field that is None: from the own workdir if it has begun, else from `init_from`.

    In the `model.attention.pattern` of `init_from`, this config's mechanism replaces every layer that is not local, or
    every layer if all are local. If `model.attention.kind` is None, all layers stay as they are. Inherited fields that
    no layer uses any more are turned off: see configs/finetune.py.

    Args:
      config: left as it is.
      workdir: of this run; None = it has none.

    Raises:
      UserError: a field is None and `init_from` is empty, or its config.json cannot be read or lacks the field; or this
        config's mechanism would replace layers that `init_from` keeps exact beside others, or heads likewise.
    """
    missing = [name for name, value in flat_fields(config.to_dict()) if value is None]
    if not missing:
        return config
    if not config.init_from:
        raise UserError(
            f"init_from = '': {missing[0]} and {len(missing) - 1} more fields come from the run to start from; give"
            " --config.init_from=<workdir of a run or of an imported model>"
        )
    source = workdir if workdir is not None and workdir.has_begun else Workdir(config.init_from)
    saved = dict(flat_fields(source.read_config()))
    absent = [name for name in missing if saved.get(name) is None]
    if absent:
        raise UserError(f"{source}/{CONFIG_FILE} has no {absent[0]}; another version wrote it")
    filled = {name: saved[name] for name in missing}
    if source is not workdir and _PATTERN in filled:
        filled[_PATTERN] = _with_mechanism(config, saved)
    new = config.copy_and_resolve_references()
    new.update_from_flattened_dict(filled)
    new.update_from_flattened_dict({name: off for name, off in _unused(new).items() if name in filled})
    return new


def other_causality(config: ml_collections.ConfigDict) -> str:
    """What to say where the model of `init_from` sees later tokens and this one does not, or the reverse; else "".

    That is allowed, but another model than the weights were trained for. An `init_from` that is no workdir is refused
    elsewhere.
    """
    source = Workdir(config.init_from) if config.init_from else None
    if source is None or not source.has_begun:
        return ""
    own, theirs = config.model.causal, source.read_config()["model"]["causal"]
    said = f"model.causal = {own}, but {theirs} in init_from = {source}; --config.model.causal={theirs} keeps it"
    return said if own != theirs else ""


def other_mechanism(config: ml_collections.ConfigDict) -> str:
    """What to say where layers of `init_from` have this mechanism already, with another window or other features.

    As for `other_causality`, that is allowed.
    """
    source = Workdir(config.init_from) if config.init_from else None
    if source is None or not source.has_begun:
        return ""
    own, theirs = config.model.attention, source.read_config()["model"]["attention"]
    if own.kind not in {layer.kind for layer in parse_pattern(theirs["pattern"], theirs["kind"])}:
        return ""
    changed = [name for name in _OF_A_MECHANISM if name in MIXERS[own.kind].uses and own[name] != theirs[name]]
    said = ", ".join(f"{name} = {own[name]!r} instead of {theirs[name]!r}" for name in changed)
    has = f"init_from = {source} has {own.kind} already; configs/finetune.py:keep keeps it as it is"
    return f"model.attention: {said}: {has}" if said else ""


def _with_mechanism(config: ml_collections.ConfigDict, saved: Mapping[str, Any]) -> str:
    """The saved pattern with the config's mechanism in place of every layer but local ones; "" = it is everywhere."""
    kind = config.model.attention.kind
    layers = parse_pattern(saved[_PATTERN], saved[_KIND])
    if kind is None:
        return str(saved[_PATTERN])
    _require_one_meaning(config, layers)
    _require_exact_heads(config, layers, saved.get(_EXACT_HEADS, 0))
    if MIXERS[kind].role != "exact" and all(MIXERS[layer.kind].is_local for layer in layers):
        return ""
    # An option is inherited as its field is: what is the mechanism's own choice comes from this config.
    inherited = {name for name in MIXERS[kind].uses if config.model.attention.get(name, 0) is None}
    replaced = [Layer(kind, {n: v for n, v in layer.options.items() if n in inherited}) for layer in layers]
    entries = [show_layer(x if MIXERS[x.kind].is_local else y) for x, y in zip(layers, replaced, strict=True)]
    return "" if set(entries) == {kind} else ",".join(entries)


def _require_one_meaning(config: ml_collections.ConfigDict, layers: Sequence[Layer]) -> None:
    """Raises UserError for a mechanism where some layers have one already and others were left exact.

    Whoever names the mechanism may mean either of the two, and training would undo the choice without a word.
    """
    kind, roles = config.model.attention.kind, [MIXERS[x.kind].role for x in layers if not MIXERS[x.kind].is_local]
    if MIXERS[kind].role != "exact" and "exact" in roles and set(roles) != {"exact"}:
        kinds = ", ".join(dict.fromkeys(layer.kind for layer in layers))
        raise UserError(
            f"init_from = {config.init_from}: its layers are {kinds}; {kind} would replace the exact ones, too; "
            f"allowed: configs/finetune.py:keep, which keeps them, or --config.model.attention.pattern={kind}"
        )


def _require_exact_heads(config: ml_collections.ConfigDict, layers: Sequence[Layer], of_all: int) -> None:
    """Raises UserError for a mechanism that would replace heads left exact, because its layers cannot have any.

    of_all: `exact_kv_heads` of layers without that option.
    """
    kind = config.model.attention.kind
    has_some = any(layer.options.get("exact_kv_heads", of_all) for layer in layers)
    if has_some and MIXERS[kind].role != "exact" and "exact_kv_heads" not in MIXERS[kind].uses:
        raise UserError(
            f"init_from = {config.init_from}: some of its heads are exact (exact_kv_heads); {kind} would replace them, "
            f"too; allowed: configs/finetune.py:keep, which keeps them, or --config.model.attention.pattern={kind}"
        )


def _unused(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Fields that no layer uses, or that need a field which is off, and their value for "not used"."""
    names = mixer_fields() - fields_in_effect(config)
    off = {name: fields()[name].off for name in names if fields()[name].off is not None}
    return {name: fields()[name].default for name in unused_fields(config)} | off
