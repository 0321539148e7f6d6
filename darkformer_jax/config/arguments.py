"""The arguments after the colon of --config=configs/<experiment>.py:name=value,name=value."""

from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from darkformer_jax.config.usage import require_used, reset_unused
from darkformer_jax.errors import UserError

Fields = Mapping[str, tuple[str, Any]]  # argument -> (field of the config, what parses its value: a type, `boolean`)


def set_arguments(c: ml_collections.ConfigDict, arguments: Iterable[str], fields: Fields, file: str) -> None:
    """Sets the fields that `name=value` strings name. What `file` set for another mechanism is as by default again.

    Raises UserError for an argument that `file` does not know, or whose field no mixer uses.
    """
    names = []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in fields:
            raise UserError(f"{file} has no argument {name!r}; allowed: {', '.join(fields)}")
        field, kind = fields[name]
        try:
            c.update_from_flattened_dict({field: kind(value)})
        except ValueError as error:
            raise UserError(f"{file}: {argument!r}: expected {name}=<{kind.__name__}>") from error
        names.append(field)
    require_used(c, names)
    reset_unused(c)
