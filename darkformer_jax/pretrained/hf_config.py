"""Reading a config.json: every field checked, named where it is wrong."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from darkformer_jax.data.files import read_json_object
from darkformer_jax.errors import UserError

_REQUIRED: Any = object()


class HFConfig:
    """The fields of one config.json (or of what a GGUF file says in its place); null counts as absent.

    Args:
      values: the JSON object.
      path: named in every error.
    """

    def __init__(self, values: Mapping[str, Any], path: str) -> None:
        self.values = values
        self.path = path

    @classmethod
    def read(cls, path: str) -> "HFConfig":
        """Raises UserError where the file is unreadable or no JSON object."""
        return cls(read_json_object(path), path)

    def section(self, name: str) -> "HFConfig | None":
        """A nested object; None where it is absent or empty."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(name, "must be an object")
        return HFConfig(value, f"{self.path}: {name}") if value else None

    def integer(self, name: str, default: int = _REQUIRED, smallest: int = 1) -> int:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise self.error(name, f"must be a whole number of at least {smallest}")
        return value

    def window(self, absent: int) -> int:
        """sliding_window: 0 where it is null, which to transformers is another thing than its absence."""
        return 0 if self.values.get("sliding_window", absent) is None else self.integer("sliding_window", absent)

    def number(self, name: str, default: float = _REQUIRED) -> float:
        """A positive finite number."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
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
