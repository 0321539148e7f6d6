"""Reads config.json and generation_config.json. Every field is checked, and an error names the field."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from darkformer_jax.data.files import read_json_object
from darkformer_jax.errors import UserError

GENERATION_FILE = "generation_config.json"

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LENGTH = "max_position_embeddings"
_REQUIRED: Any = object()
_LARGEST = 1e30  # bound of positive numbers, because all of them become float32


class HFConfig:
    """The fields of one config.json, or of a GGUF file's metadata; null counts as absent.

    Args:
      values: the JSON object.
      path: named in every error.
    """

    def __init__(self, values: Mapping[str, Any], path: str) -> None:
        self.values = values
        self.path = path

    @classmethod
    def read(cls, path: str) -> "HFConfig":
        """The fields of a file. Raises UserError if it is unreadable or not a JSON object."""
        return cls(read_json_object(path), path)

    def section(self, name: str) -> "HFConfig | None":
        """A nested object; None if it is absent or empty."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(name, "must be an object")
        return HFConfig(value, f"{self.path}: {name}") if value else None

    def integer(self, name: str, default: int = _REQUIRED, smallest: int = 1, largest: int = 2**31 - 1) -> int:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value <= largest:
            raise self.error(name, f"must be a whole number from {smallest} to {largest}")
        return value

    def window(self, absent: int) -> int:
        """sliding_window: 0 if it is null, `absent` if it is absent; transformers tells the two apart."""
        return 0 if self.values.get("sliding_window", absent) is None else self.integer("sliding_window", absent)

    def number(self, name: str, default: float = _REQUIRED) -> float:
        """A positive finite number."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _LARGEST:
            raise self.error(name, "must be a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "must be true or false")
        return value

    def choice(self, name: str, allowed: Sequence[str], default: str = _REQUIRED) -> str:
        value = self._value(name, default)
        if value not in allowed:
            raise self.error(name, f"allowed: {', '.join(allowed)}")
        return str(value)

    def token_ids(self, name: str, vocab_size: int) -> int | list[int] | None:
        """An id, a list of ids, or None. Old files also have -1 for "no padding"."""
        value = self.values.get(name)
        ids = value if isinstance(value, list) else [value] * (value is not None)
        first = -1 if name == "pad_token_id" else 0
        if not all(isinstance(i, int) and not isinstance(i, bool) and first <= i < vocab_size for i in ids):
            raise self.error(name, f"must be an id from 0 to {vocab_size - 1}, or a list of such ids")
        return value

    def strings(self, name: str) -> list[str] | None:
        value = self.values.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise self.error(name, "must be a list of strings")
        return value

    def refuse(self, name: str, why: str, *harmless: Any) -> None:
        """Raises unless the field is absent, false, or one of the harmless values."""
        value = self.values.get(name)
        if value is not None and value is not False and value not in harmless:
            raise self.error(name, why)

    def error(self, name: str, allowed: str) -> UserError:
        """`config.json: field = value: what is allowed`."""
        shown = json.dumps(self.values.get(name), default=str)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        return UserError(f"{self.path}: {name} = {shown}: {allowed}")

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is _REQUIRED:
                raise UserError(f"{self.path}: the field {name} is missing")
            return default
        return value


def origin_of(model_type: str, config: HFConfig, directory: str, vocab_size: int) -> dict[str, Any]:
    """The ids and lengths in config.json and in `directory`'s generation_config.json, if it has one.

    An import keeps them and an export writes them again: see `runs.origin`. Raises UserError for ids outside the
    vocabulary.
    """
    kept = {name: config.token_ids(name, vocab_size) for name in _IDS if name in config.values}
    if config.values.get(_LENGTH) is not None:
        kept[_LENGTH] = config.integer(_LENGTH)
    origin: dict[str, Any] = {"model_type": model_type, "config": kept}
    path = os.path.join(directory, GENERATION_FILE)
    if os.path.isfile(path):
        generation = HFConfig.read(path)
        for name in _IDS:
            generation.token_ids(name, vocab_size)
        origin["generation_config"] = dict(generation.values)
    return origin
