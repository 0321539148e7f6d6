"""A field of the config: its default, its range, and its value in runs from before the field."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal, InvalidOperation
from types import SimpleNamespace
from typing import Any

import ml_collections

from darkformer_jax.errors import UserError

Rule = Callable[[Any], bool]


class Section(SimpleNamespace):
    """Fields and sections by name, in the order in which they are declared."""


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of the config.

    Attributes:
      default: its value unless an experiment sets another; its type is the field's.
      rule, allowed: which values are allowed, as a test and in words.
      off: the value that means "not used"; None = the field is never off. A field that is not off must be used by a
        layer of the model or by the task (`config.validation`).
      needs: a field of the same section that must not be off if this one is not.
      since: the first version of config.json that has the field (`config.migrations`); 0 = all versions. In a run from
        before it, the field has its default.
      below: whole numbers are smaller than this.
    """

    default: Any
    rule: Rule
    allowed: str
    off: Any = None
    needs: str = ""
    since: int = 0
    below: int = 2**31

    def parse(self, text: str) -> Any:
        """The value that a text spells, of the field's type. Raises ValueError, which says what is allowed."""
        kind = type(self.default)
        words, read = _READ.get(kind, (kind.__name__, kind))
        try:
            return read(text)
        except ValueError as error:
            also = f" and {self.allowed.removeprefix('must be ')}" if kind in (int, float) and self.allowed else ""
            raise ValueError(f"must be {words}{also}") from error

    def check(self, name: str, value: Any) -> None:
        """Raises UserError, which names the field, its value and what is allowed."""
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} = {value}: must be finite")
        kind = type(self.default)
        also = {float: int, tuple: list}.get(kind, kind)  # JSON has no tuples, and may write a float without a point
        if type(value) not in (kind, also):
            raise UserError(f"{name} = {value!r}: must be {kind.__name__}")
        if kind is int and value >= self.below:
            raise UserError(f"{name} = {value}: must be below {self.below}")
        if not self.rule(value):
            shown = repr(value) if isinstance(value, str) else value
            raise UserError(f"{name} = {shown}: {self.allowed}")


def at_least(smallest: float, default: float, **more: Any) -> Any:
    """A number that is at least `smallest`."""
    return Field(default, lambda value: value >= smallest, f"must be at least {smallest}", **more)


def positive(default: float, **more: Any) -> Any:
    """A number above zero."""
    return Field(default, lambda value: value > 0, "must be positive", **more)


def fraction(default: float, low: str = "[", high: str = "]", **more: Any) -> Any:
    """A number from 0 to 1; `(` and `)` exclude the bound."""

    def rule(value: float) -> bool:
        return (value >= 0 if low == "[" else value > 0) and (value <= 1 if high == "]" else value < 1)

    return Field(default, rule, f"must be in {low}0, 1{high}", **more)


def choice(default: str, allowed: Mapping[str, Any] | tuple[str, ...], **more: Any) -> Any:
    """One of some names."""
    return Field(default, lambda value: value in allowed, f"allowed: {', '.join(allowed)}", **more)


def some_of(default: str, allowed: tuple[str, ...], **more: Any) -> Any:
    """Some of these names, each once, with commas between them; "" = none."""

    def rule(value: str) -> bool:
        names = value.split(",") if value else []
        return set(names) <= set(allowed) and len(names) == len(set(names))

    return Field(default, rule, f"allowed: {', '.join(allowed)}, or several with commas", **more)


def anything(default: Any, **more: Any) -> Any:
    """A string, a bool, or a number whose range depends on more than the config."""
    return Field(default, lambda value: True, "", **more)


def strings(*default: str, **more: Any) -> Any:
    """Several strings."""
    return Field(default, lambda value: all(isinstance(x, str) for x in value), "must be strings", **more)


def boolean(text: str) -> bool:
    """True or False, in capitals or not, or as absl writes them. Raises ValueError for other texts."""
    if text.lower() not in ("true", "t", "1", "false", "f", "0"):
        raise ValueError(text)
    return text.lower() in ("true", "t", "1")


def whole_number(text: str) -> int:
    """The number that a text spells exactly, in digits or as 1e3 or 1_000. Raises ValueError for other texts."""
    try:
        number = Decimal(text)
    except InvalidOperation:
        return int(text, 0)  # 0x10
    if not number.is_finite() or number.adjusted() > _MOST_DIGITS or number != number.to_integral_value():
        raise ValueError(f"{text!r} is not a whole number")
    return int(number)


_MOST_DIGITS = 400  # a number with a larger exponent fills the memory
_READ: Mapping[type, tuple[str, Callable[[str], Any]]] = {
    int: ("a whole number", whole_number),
    float: ("a number", float),
    bool: ("True or False", boolean),
}


def flat_section(section: Section, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """(dotted name, field) of every field of a section."""
    for name, value in vars(section).items():
        if isinstance(value, Section):
            yield from flat_section(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def default_config(section: Section) -> ml_collections.ConfigDict:
    """The defaults as a ConfigDict, not locked."""
    return ml_collections.ConfigDict(
        {name: default_config(x) if isinstance(x, Section) else x.default for name, x in vars(section).items()}
    )


def flat_fields(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field of a nested config."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from flat_fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
