"""Config fields that are another run's: sizes of a pretrained model are read from it, never retyped."""

from typing import Any

import ml_collections

from darkformer_jax.config.fields import flat_fields
from darkformer_jax.config.validation import EXACT_KINDS, FEATURE_KINDS
from darkformer_jax.errors import UserError
from darkformer_jax.mixers.spec import pattern_kinds
from darkformer_jax.runs.workdir import CONFIG_FILE, Workdir

_PATTERN, _KIND = "model.attention.pattern", "model.attention.kind"
_OF_LOCAL_LAYERS = {"model.attention.local_window": 0, "model.rope_local_theta": 0.0}
_OF_EXACT_LAYERS = {"model.attention.softcap": 0.0}


def inherit(config: ml_collections.ConfigDict, workdir: str | None = None) -> ml_collections.ConfigDict:
    """`config` with a value for every field that is None: the own workdir's where it has begun, else `init_from`'s.

    From `init_from`, `model.attention.pattern` is taken with this config's mechanism in the place of every layer's but
    `softmax_local`'s (of all layers where all are `softmax_local`), and fields of kinds that then no layer is of become
    0: see configs/finetune.py.

    Args:
      config: left as it is.
      workdir: of this run; None = it has none.

    Raises:
      UserError: there are such fields and no `init_from`, or its config.json cannot be read or lacks one of them.
    """
    missing = [name for name, value in flat_fields(config.to_dict()) if value is None]
    if not missing:
        return config
    if not config.init_from:
        raise UserError(
            f"init_from = '': {missing[0]} and {len(missing) - 1} more fields are those of the run to start from; give"
            " --config.init_from=<workdir of a run or of an imported model>"
        )
    own = None if workdir is None else Workdir(workdir)
    source = own if own is not None and own.has_begun else Workdir(config.init_from)
    saved = dict(flat_fields(source.read_config()))
    absent = [name for name in missing if saved.get(name) is None]
    if absent:
        raise UserError(f"{source}/{CONFIG_FILE} has no {absent[0]}; it is of another version")
    filled = {name: saved[name] for name in missing}
    if source is not own and _PATTERN in filled:
        filled[_PATTERN] = _with_mechanism(
            config.model.attention.kind, pattern_kinds(saved.get(_PATTERN), saved[_KIND])
        )
    new = config.copy_and_resolve_references()
    new.update_from_flattened_dict(filled)
    attention = new.model.attention
    unused = _unused(pattern_kinds(attention.pattern, attention.kind), attention.window).items()
    new.update_from_flattened_dict({name: none for name, none in unused if name in filled})
    return new


def _with_mechanism(kind: str, kinds: tuple[str, ...]) -> str:
    """A pattern in which `kind` does what the layers of `kinds` did; "" = everywhere."""
    if kind not in EXACT_KINDS and set(kinds) == {"softmax_local"}:
        return ""
    new = tuple(old if old == "softmax_local" else kind for old in kinds)
    return "" if set(new) == {kind} else ",".join(new)


def _unused(kinds: tuple[str, ...], window: int) -> dict[str, Any]:
    """Fields that no layer of `kinds` has, and their value for none."""
    unused: dict[str, Any] = {} if "softmax_local" in kinds else dict(_OF_LOCAL_LAYERS)
    if not window or not {*FEATURE_KINDS} & set(kinds):
        unused["model.attention.far_gain"] = False
    if "dark" not in kinds:
        unused["model.attention.learn_projections"] = False
    return unused if {*EXACT_KINDS} & set(kinds) else unused | _OF_EXACT_LAYERS
