"""Brings a config.json of any earlier version to today's fields.

config.json holds the version that wrote it as `"version"`; files from before version 2 hold none. A field that is newer
than the file gets its default, which therefore must describe earlier runs. So a new field needs nothing here: declare
it with `since=VERSION`, and first raise VERSION by one if there was a release since its last change. A renamed or
removed field needs a function in `_STEPS`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from darkformer_jax.config.base import fields
from darkformer_jax.errors import UserError

VERSION = 10
_KEY = "version"


def migrate(saved: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a config.json, as nested dicts, with today's names and a value for each field that came later.

    Raises UserError, which names `where`, for an unknown version.
    """
    config = _copied(saved)
    version = config.pop(_KEY, 0)
    if type(version) is not int or not 0 <= version <= VERSION:
        newer = "; use a newer one" if type(version) is int and version > VERSION else ""
        raise UserError(f"{where} is of version {version!r}, but this darkformer_jax reads 0 to {VERSION}{newer}")
    _require_sections(config, where)
    for number in range(version + 1, VERSION + 1):
        if number in _STEPS:
            _STEPS[number](config)
        for name, field in fields().items():
            if field.since == number:
                _set_default(config, name, field.default)
    return config


def with_version(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json: `config` and the version."""
    return {_KEY: VERSION, **config}


def _no_window_kernel_without_geometry(config: dict[str, Any]) -> None:
    """Version 2 refuses a window_kernel that no layer uses. Before, configs/finetune.py set it even for M = I."""
    attention = config.get("model", {}).get("attention", {})
    kinds = str(attention.get("pattern") or attention.get("kind", "")).replace(" ", "").split(",")
    if "dark" not in kinds:
        attention["window_kernel"] = "dark"


# version -> changes fields of the version before it, in place; fields that are new in it are added afterwards
_STEPS: Mapping[int, Callable[[dict[str, Any]], None]] = {2: _no_window_kernel_without_geometry}


def _require_sections(config: Mapping[str, Any], where: str) -> None:
    for name in fields():
        section: Any = config
        for part in name.split(".")[:-1]:
            section = section.get(part, {})
            if not isinstance(section, Mapping):
                raise UserError(f"{where}: {part} = {section!r}: must be a section with fields")


def _set_default(config: dict[str, Any], name: str, value: Any) -> None:
    *sections, field = name.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    config.setdefault(field, value)


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _copied(value) if isinstance(value, Mapping) else value for name, value in tree.items()}
