"""The settings of an experiment: the config's fields that its mechanism uses, and the origin of its weights."""

import json
import os
from collections.abc import Mapping
from typing import Any

from darkformer_jax.calibration import CALIBRATION_FILE
from darkformer_jax.config.fields import flat_fields
from darkformer_jax.config.pattern import ATTENTION, Layer, parse_pattern, show_layer
from darkformer_jax.config.usage import fields_in_effect, mixer_fields
from darkformer_jax.config.validation import from_json
from darkformer_jax.data.files import read_json_object
from darkformer_jax.data.text_files import TEXT_FIELD
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from darkformer_jax.runs.metrics import METRICS_FILE
from darkformer_jax.runs.workdir import CHANGEABLE, CONFIG_FILE, Workdir

MECHANISM = "mechanism"  # the kinds of successive layers, such as "softmax,dark"; replaces attention.kind and .pattern
TOKENS = "tokens"  # the tokens of training: steps x sequences x their length
ORIGIN = "init_from"
M_FEATURES = ATTENTION + "num_features"
LEARNING_RATE = "optimizer.learning_rate"
GEOMETRY_RATE = "optimizer.geometry_learning_rate"
LEARNING_RATES = (LEARNING_RATE, GEOMETRY_RATE)
# Every page shows these, in a column or once above the table. Any other field has a column if rows differ in it.
HEADINGS = {
    M_FEATURES: "m",
    "model.attention.window": "window",
    "model.attention.num_sinks": "sinks",
    LEARNING_RATE: "learning rate",
    GEOMETRY_RATE: "learning rate of M",
    "num_steps": "steps",
    TOKENS: "tokens",
    ORIGIN: "began from",
}

Settings = dict[str, Any]

# What calibration.json has beside its options: what was found, which the seed decides with the text.
_NO_OPTIONS = ("seed", "workdir", "layers", "exact", "heads")

# They change how a batch is computed, measured or saved, not what is learned. The data has a fingerprint.
_NO_SETTINGS = ("seed.", "data.", "model.remat.", *(name + "." for name in CHANGEABLE if name != "num_steps"))


def settings_of(config: Mapping[str, Any], where: str) -> Settings:
    """The flat fields that the run's mechanism uses, without the seed, with MECHANISM, TOKENS and ORIGIN.

    Raises UserError, which names the workdir `where`, if a field is missing.
    """
    flat = dict(flat_fields(config))
    try:
        read = from_json(config)
        layers = parse_pattern(flat.pop(ATTENTION + "pattern"), flat.pop(ATTENTION + "kind"))
        not_used = mixer_fields() - fields_in_effect(read)
        tokens = flat["num_steps"] * flat["batch_size"] * flat["sequence_length"]
        origin = origin_of(flat[ORIGIN])
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{where}/{CONFIG_FILE} is not the config of a run of this version: {error!r}") from error
    used = [name for name in flat if name not in not_used and not (name + ".").startswith(_NO_SETTINGS)]
    mechanism = ",".join(map(show_layer, layers))
    return {name: flat[name] for name in used} | {MECHANISM: mechanism, TOKENS: tokens, ORIGIN: origin}


def key_of(settings: Settings, without: tuple[str, ...] = ()) -> str:
    """A string that is equal for settings that differ at most in the fields `without`."""
    return json.dumps({name: value for name, value in settings.items() if name not in without}, sort_keys=True)


def ancestors(workdir: str) -> list[str]:
    """The workdir, the one that it began from, and so on, as far as they exist.

    Relative paths are relative to the current directory. Raises UserError if a workdir began from itself.
    """
    chain: list[str] = []
    while workdir and os.path.isfile(os.path.join(workdir, CONFIG_FILE)):
        if os.path.realpath(workdir) in map(os.path.realpath, chain):
            raise UserError(f"{workdir} began from itself by init_from: {' <- '.join([*chain, workdir])}")
        chain.append(workdir)
        origin = Workdir(workdir).read_config().get("init_from")
        workdir = str(Workdir(origin)) if origin else ""
    return chain


def origin_of(init_from: str) -> Any:
    """The origin of a run as a JSON value, equal for origins that differ only in the seed.

    For an imported model it is its path. For a run or a calibration it is its settings, which include its own origin.
    """
    if not init_from:
        return None
    init_from = str(Workdir(init_from))
    calibration_file = os.path.join(init_from, CALIBRATION_FILE)
    is_calibration = os.path.isfile(calibration_file)
    if not is_calibration and not os.path.isfile(os.path.join(init_from, METRICS_FILE)):
        return os.path.realpath(init_from)
    ancestors(init_from)  # raises before a circle is followed
    origin = settings_of(Workdir(init_from).read_config(), init_from)
    if is_calibration:
        calibration = read_json_object(calibration_file)
        chosen = {name: value for name, value in calibration.items() if name not in _NO_OPTIONS}
        # Files from before an option lack it.
        origin["calibration"] = {"text_field": TEXT_FIELD, "exact_heads": "none", **chosen}
    return origin


def is_comparable(dark: Settings, other: Settings, counterpart: str, without: tuple[str, ...] = ()) -> bool:
    """Whether `other` has the counterpart in place of every DARK layer of `dark`, and equals it in all else.

    All else is the first ancestor and every field except M's learning rate, attention's fields that one of the two does
    not use, and the fields `without`. The counterpart is a kind, or "exact" for any exact kind.
    """
    layers = zip(_layers(dark), _layers(other), strict=False)  # their number is compared below
    if not all(_is_counterpart(a, b, counterpart) if a.kind == "dark" else a == b for a, b in layers):
        return False
    if _root(dark[ORIGIN]) != _root(other[ORIGIN]):
        return False
    may_differ = {MECHANISM, ORIGIN, GEOMETRY_RATE, "model.rope_local_theta", *without}
    may_differ |= {name for name in dark.keys() ^ other.keys() if name.startswith(ATTENTION)}
    return key_of(dark, tuple(may_differ)) == key_of(other, tuple(may_differ))


def role(settings: Settings) -> str:
    """`exact`, `control`, or the kind of the layers that are not exact; "" if those have several kinds."""
    roles = {layer.kind: MIXERS[layer.kind].role for layer in parse_pattern(settings[MECHANISM], "")}
    others = [kind for kind, role in roles.items() if role != "exact"]
    if not others:
        return "exact"
    if all(roles[kind] == "control" for kind in others):
        return "control"
    return others[0] if len(others) == 1 else ""


def _is_counterpart(dark: Layer, other: Layer, counterpart: str) -> bool:
    """Whether a layer has the counterpart's mechanism and all options of the DARK layer that it can have."""
    if counterpart not in (other.kind, MIXERS[other.kind].role):
        return False
    common = {name: value for name, value in dark.options.items() if name in MIXERS[other.kind].uses}
    return dict(other.options) == common


def _layers(settings: Settings) -> list[Layer]:
    layers = parse_pattern(settings[MECHANISM], "")
    return [layers[i % len(layers)] for i in range(settings["model.num_layers"])]


def _root(origin: Any) -> Any:
    return _root(origin[ORIGIN]) if isinstance(origin, dict) and origin[ORIGIN] is not None else origin
