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

# version -> what brings the fields of the version before it to its own, in place; for more than a new field
_STEPS: Mapping[int, Callable[[dict[str, Any]], None]] = {}


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
        _STEPS.get(number, _nothing)(config)
        for name, field in fields().items():
            if field.since == number:
                _set_default(config, name, field.meaning_before)
    return config


def with_version(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json holds."""
    return {_KEY: VERSION, **config}


def _nothing(config: dict[str, Any]) -> None:
    """Of a version that has new fields only."""


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
