"""From a config.json of any earlier version to today's fields.

config.json holds the number of the version that wrote it, `"version"`; files from before version 2 hold none. A field
that is younger than the file means what `config.base` says of the time before it. So a new field needs nothing here:
it is declared with `since=VERSION`, after VERSION went up by one if a release lies between. What is renamed or
removed gets a function in `_STEPS`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from darkformer_jax.config.base import fields
from darkformer_jax.errors import UserError

VERSION = 2
_KEY = "version"


def migrate(saved: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a config.json, as nested dicts, with today's names and a value for each field that came later.

    Raises UserError, which names `where`, for a version that is not known.
    """
    config = _copied(saved)
    version = config.pop(_KEY, 0)
    if type(version) is not int or not 0 <= version <= VERSION:
        raise UserError(
            f"{where} is of version {version!r}, and this darkformer_jax reads 0 to {VERSION}; a newer one reads it"
        )
    for number in range(version + 1, VERSION + 1):
        if number in _STEPS:
            _STEPS[number](config)
        for name, field in fields().items():
            if field.since == number:
                _set_default(config, name, field.meaning_before)
    return config


def with_version(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json holds."""
    return {_KEY: VERSION, **config}


def _no_window_kernel_without_geometry(config: dict[str, Any]) -> None:
    """Version 2 refuses a window_kernel that no layer uses; before, configs/finetune.py set it where M = I, too."""
    attention = config["model"]["attention"]
    kinds = (attention.get("pattern") or attention.get("kind", "")).replace(" ", "").split(",")
    if "dark" not in kinds:
        attention["window_kernel"] = "dark"


# version -> what brings the fields of the version before it to its own, in place, before its new fields are added
_STEPS: Mapping[int, Callable[[dict[str, Any]], None]] = {2: _no_window_kernel_without_geometry}


def _set_default(config: dict[str, Any], name: str, value: Any) -> None:
    *sections, field = name.split(".")
    for section in sections:
        inner = config.setdefault(section, {})
        if not isinstance(inner, dict):  # not a config: validation says so
            return
        config = inner
    config.setdefault(field, value)


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _copied(value) if isinstance(value, Mapping) else value for name, value in tree.items()}
