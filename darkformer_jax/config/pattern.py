"""Which mixer each layer has: `model.attention.kind`, or a pattern of kinds with options of their own.

"softmax,dark,dark"              kinds of successive layers, repeated over the depth
"softmax,dark(m=128,window=64)"  a layer's own values of fields of model.attention
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from darkformer_jax.config.base import fields
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS

ATTENTION = "model.attention."
SHORT = {
    "m": "num_features",
    "chunk": "chunk_size",
    "sinks": "num_sinks",
    "conv": "conv_width",
    "init": "geometry_init",
}

# The training step redraws all layers at once, and the backend is that of a run.
_OF_ALL_LAYERS = ("kind", "pattern", "redraw_every", "backend")
_ENTRY = re.compile(r"\s*([^(),]*?)\s*(?:\(([^()]*)\))?\s*")


class Layer(NamedTuple):
    """One entry of a pattern."""

    kind: str
    options: Mapping[str, Any]  # fields of model.attention -> values


def parse_pattern(pattern: str | None, kind: str) -> tuple[Layer, ...]:
    """The layers of a pattern; without one, `kind` alone.

    Raises UserError for an unknown kind, and for an option that is unknown, out of range or not used by its kind.
    """
    if not isinstance(pattern, str | None):
        raise UserError(f"{ATTENTION}pattern = {pattern!r}: must be str")
    if not pattern and not (isinstance(kind, str) and kind in MIXERS):
        raise UserError(f"model.attention.kind = {kind!r}: allowed: {', '.join(MIXERS)}")
    entries = re.split(r",(?![^(]*\))", pattern or kind)
    return tuple(_parse_entry(entry) for entry in entries)


def pattern_kinds(pattern: str | None, kind: str) -> tuple[str, ...]:
    """The kinds of a pattern's layers."""
    return tuple(layer.kind for layer in parse_pattern(pattern, kind))


def show_layer(layer: Layer) -> str:
    """The entry of a pattern that parses as `layer`."""
    options = ",".join(f"{name}={value}" for name, value in layer.options.items())
    return f"{layer.kind}({options})" if options else layer.kind


def shortest_pattern(entries: Sequence[str]) -> tuple[str, ...]:
    """The shortest pattern whose repetitions, of which the last may be incomplete, are these entries of all layers."""
    lengths = range(1, len(entries) + 1)
    length = next(n for n in lengths if all(entry == entries[i % n] for i, entry in enumerate(entries)))
    return tuple(entries[:length])


def _parse_entry(entry: str) -> Layer:
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise UserError(f"{ATTENTION}pattern has {entry.strip()!r}: must be kind or kind(option=value,option=value)")
    kind, written = match.groups()
    if kind not in MIXERS:
        raise UserError(f"{ATTENTION}pattern has {kind!r}: allowed: {', '.join(MIXERS)}")
    options: dict[str, Any] = {}
    for text in [] if written is None or not written.strip() else written.split(","):
        name, value = _parse_option(kind, text)
        if name in options:
            raise UserError(f"{ATTENTION}pattern has {entry.strip()}: {name} is there twice")
        options[name] = value
    return Layer(kind, options)


def _parse_option(kind: str, text: str) -> tuple[str, Any]:
    name, _, value = (part.strip() for part in text.partition("="))
    name = SHORT.get(name, name)
    where = f"model.attention.pattern has {kind}({text.strip()})"
    options = sorted(name for name in MIXERS[kind].uses if ATTENTION + name in fields() and name not in _OF_ALL_LAYERS)
    if name not in options:
        raise UserError(f"{where}: {kind} has no option {name!r}; allowed: {', '.join(options) or 'none'}")
    field = fields()[ATTENTION + name]
    try:
        parsed = field.parse(value)
    except ValueError as error:
        raise UserError(f"{where}: {name} {error}") from error
    field.check(f"{where}: {name}", parsed)
    return name, parsed
