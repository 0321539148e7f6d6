"""Names and values of a config's fields."""

from collections.abc import Iterator, Mapping
from typing import Any


def flat_fields(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field of a nested config."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from flat_fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
