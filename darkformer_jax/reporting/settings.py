"""What sets one experiment apart from another: the config's fields that its mechanism uses, and what it began from."""

import json
import os
from collections.abc import Mapping
from typing import Any

from darkformer_jax.calibration import REPORT_FILE as CALIBRATION_FILE
from darkformer_jax.config.fields import flat_fields
from darkformer_jax.config.pattern import pattern_kinds
from darkformer_jax.data.files import read_json_object
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from darkformer_jax.runs.metrics import METRICS_FILE
from darkformer_jax.runs.workdir import CHANGEABLE, CONFIG_FILE, read_config

EXACT_KINDS = tuple(kind for kind, mixer in MIXERS.items() if mixer.role == "exact")
CONTROLS = ("window_only", "constant", "random")

MECHANISM = "mechanism"  # kinds of successive layers, "dark" or "softmax,dark"; instead of attention.kind and .pattern
TOKENS = "tokens"  # that training sees: steps x sequences x their length
ORIGIN = "init_from"
M_FEATURES = "model.attention.num_features"
LEARNING_RATE = "optimizer.learning_rate"
GEOMETRY_RATE = "optimizer.geometry_learning_rate"
LEARNING_RATES = (LEARNING_RATE, GEOMETRY_RATE)

Settings = dict[str, Any]

_ATTENTION = "model.attention."
# How the same batch is computed, when it is measured and saved; the data is compared by its fingerprint.
_NO_SETTINGS = ("seed", "data", "model.remat", *(name for name in CHANGEABLE if name != "num_steps"))

_FAR_GAIN = _ATTENTION + "far_gain"
_FEATURES = {_FAR_GAIN, *(_ATTENTION + name for name in ("num_features", "projections", "redraw_every"))}
_WINDOW = {_ATTENTION + name for name in ("window", "num_sinks", "chunk_size")}
_GEOMETRY = {GEOMETRY_RATE, *(_ATTENTION + name for name in ("geometry_init", "learn_projections", "window_kernel"))}
_EXACT = {_ATTENTION + name for name in ("softcap", "local_window")}
_UNUSED_BY = {
    "softmax": _FEATURES | _WINDOW | _GEOMETRY | {_ATTENTION + "local_window"},
    "softmax_local": _FEATURES | _WINDOW | _GEOMETRY,
    "performer": _GEOMETRY | _EXACT,
    "dark": _EXACT,
    "lfk": _EXACT | _GEOMETRY - {GEOMETRY_RATE},
    "random": _WINDOW | _GEOMETRY | _EXACT,
    "constant": _FEATURES | _WINDOW | _GEOMETRY | _EXACT,
    "window_only": _FEATURES | _GEOMETRY | _EXACT,
}
# What two mechanisms that are compared must have in common where both use it; the rest of attention is their own.
_SHARED = {*_FEATURES, *_WINDOW, _ATTENTION + "query_scale"}


def settings_of(config: Mapping[str, Any], where: str) -> Settings:
    """The fields that the run's mechanism uses, flat, without the seed; MECHANISM, TOKENS and ORIGIN among them.

    Args:
      config: of a workdir, nested.
      where: its path, for errors.

    Raises:
      UserError: a field is missing.
    """
    flat = dict(flat_fields(config))
    try:
        kinds = pattern_kinds(flat.pop(_ATTENTION + "pattern"), flat.pop(_ATTENTION + "kind"))
        unused = set.intersection(*(_UNUSED_BY.get(kind, set()) for kind in kinds))
        if not flat[_ATTENTION + "window"]:
            unused |= _WINDOW - {_ATTENTION + "window"}  # the chunk then only orders the sums
            unused |= {_FAR_GAIN, _ATTENTION + "window_kernel"}
        if _FAR_GAIN not in unused and flat[_FAR_GAIN]:
            unused = unused - {GEOMETRY_RATE}  # a gain learns at M's rate
        tokens = flat["num_steps"] * flat["batch_size"] * flat["sequence_length"]
        origin = origin_of(flat[ORIGIN])
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{where}/{CONFIG_FILE} is not the config of a run of this version: {error!r}") from error
    used = {name: value for name, value in flat.items() if name not in unused and not _is_no_setting(name)}
    return used | {MECHANISM: ",".join(kinds), TOKENS: tokens, ORIGIN: origin}


def key_of(settings: Mapping[str, Any], without: tuple[str, ...] = ()) -> str:
    """Equal for equal settings."""
    return json.dumps({name: value for name, value in settings.items() if name not in without}, sort_keys=True)


def ancestors(workdir: str) -> list[str]:
    """The workdir and those that it began from, as far as they are there; relative paths are of this directory.

    Raises UserError where one began from itself.
    """
    chain: list[str] = []
    while workdir and os.path.isfile(os.path.join(workdir, CONFIG_FILE)):
        if os.path.realpath(workdir) in map(os.path.realpath, chain):
            raise UserError(f"{workdir} began from itself by init_from: {' <- '.join([*chain, workdir])}")
        chain.append(workdir)
        workdir = read_config(workdir).get("init_from") or ""
    return chain


def origin_of(init_from: str) -> Any:
    """What a run began from, as a JSON value that is the same for runs that differ in the seed alone.

    An import is its path; a run or a calibration is its own settings, and what it began from in turn.
    """
    if not init_from:
        return None
    made_here = [os.path.isfile(os.path.join(init_from, name)) for name in (METRICS_FILE, CALIBRATION_FILE)]
    if not any(made_here):
        return os.path.realpath(init_from)
    ancestors(init_from)  # raises before a circle is followed
    origin = settings_of(read_config(init_from), init_from)
    if made_here[1]:
        calibration = read_json_object(os.path.join(init_from, CALIBRATION_FILE))
        chosen = {name: value for name, value in calibration.items() if name not in ("seed", "workdir", "layers")}
        origin["calibration"] = chosen
    return origin


def is_comparable(dark: Settings, other: Settings, kinds: tuple[str, ...], without: tuple[str, ...] = ()) -> bool:
    """Whether `other` is `dark` with one of `kinds` in the place of every DARK layer, and equal in all else.

    Equal are: the first ancestor, every field outside attention but M's learning rate and `without`, and of attention
    the features, the window and the scale, where both mechanisms have them.
    """
    mine, theirs = _layers(dark), _layers(other)
    if len(mine) != len(theirs) or _root(dark[ORIGIN]) != _root(other[ORIGIN]):
        return False
    if any(b not in kinds if a == "dark" else b != a for a, b in zip(mine, theirs, strict=True)):
        return False
    own = {MECHANISM, ORIGIN, GEOMETRY_RATE, "model.rope_local_theta", *without}
    for name in (dark.keys() | other.keys()) - own:
        if name.startswith(_ATTENTION):
            if name in _SHARED and name in dark and name in other and dark[name] != other[name]:
                return False
        elif (name in dark, dark.get(name)) != (name in other, other.get(name)):
            return False
    return True


def role(settings: Settings) -> str:
    """`exact`, `control`, or the kind of the layers that are not exact; "" where they are of several kinds."""
    kinds = set(settings[MECHANISM].split(",")) - set(EXACT_KINDS)
    if not kinds:
        return "exact"
    if kinds <= set(CONTROLS):
        return "control"
    return kinds.pop() if len(kinds) == 1 else ""


def _layers(settings: Settings) -> list[str]:
    kinds = settings[MECHANISM].split(",")
    return [kinds[i % len(kinds)] for i in range(settings["model.num_layers"])]


def _root(origin: Any) -> Any:
    return _root(origin[ORIGIN]) if isinstance(origin, dict) and origin[ORIGIN] is not None else origin


def _is_no_setting(name: str) -> bool:
    return any(name == other or name.startswith(other + ".") for other in _NO_SETTINGS)
