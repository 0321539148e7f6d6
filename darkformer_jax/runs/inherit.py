"""Config fields that come from another run: the sizes of a pretrained model are read from it, never retyped."""

from typing import Any

import ml_collections

from darkformer_jax.config.base import fields
from darkformer_jax.config.fields import flat_fields
from darkformer_jax.config.pattern import parse_pattern, pattern_kinds, show_layer
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from darkformer_jax.runs.workdir import CONFIG_FILE, Workdir

_PATTERN, _KIND = "model.attention.pattern", "model.attention.kind"


def inherit(config: ml_collections.ConfigDict, workdir: Workdir | None = None) -> ml_collections.ConfigDict:
    """`config` with a value for every field that is None: from the own workdir if it has begun, else from `init_from`.

    In the `model.attention.pattern` of `init_from`, this config's mechanism replaces every layer that is not local, or
    every layer if all are local. Inherited fields that no layer uses any more are turned off: see configs/finetune.py.

    Args:
      config: left as it is.
      workdir: of this run; None = it has none.

    Raises:
      UserError: a field is None and `init_from` is empty, or its config.json cannot be read or lacks the field.
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
        filled[_PATTERN] = _with_mechanism(config.model.attention.kind, saved[_PATTERN], saved[_KIND])
    new = config.copy_and_resolve_references()
    new.update_from_flattened_dict(filled)
    new.update_from_flattened_dict({name: off for name, off in _unused(new).items() if name in filled})
    return new


def _with_mechanism(kind: str, pattern: str, others: str) -> str:
    """The pattern after `kind` has replaced layers of `pattern` ("" = `others` everywhere); "" = `kind` everywhere."""
    layers = parse_pattern(pattern, others)
    if MIXERS[kind].role != "exact" and all(MIXERS[layer.kind].is_local for layer in layers):
        return ""
    entries = [show_layer(x) if MIXERS[x.kind].is_local or x.kind == kind else kind for x in layers]
    return "" if set(entries) == {kind} else ",".join(entries)


def _unused(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The fields that no layer uses or that need a field that is off, each with its value for "not used"."""
    attention = config.model.attention
    kinds = pattern_kinds(attention.pattern, attention.kind)
    used = set().union(*(MIXERS[kind].uses for kind in kinds))
    off = {name: field for name, field in fields().items() if field.off is not None}
    return {
        name: field.off
        for name, field in off.items()
        if name.rpartition(".")[2] not in used or (field.needs and not attention[field.needs])
    }
