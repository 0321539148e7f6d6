"""Ids and lengths of a pretrained model: an import keeps them, training hands them on, an export writes them again."""

import os
from collections.abc import Mapping
from typing import Any

from darkformer_jax.data.files import read_json_object, write_json
from darkformer_jax.errors import UserError
from darkformer_jax.runs.workdir import Workdir

_FILE = "pretrained.json"


def write_origin(workdir: Workdir, origin: Mapping[str, Any]) -> None:
    """Writes the origin of a model into its workdir."""
    write_json(workdir / _FILE, origin)


def read_origin(workdir: Workdir) -> dict[str, Any]:
    """What `write_origin` wrote; {} for a model that does not come from a pretrained one."""
    path = str(workdir / _FILE)
    if not os.path.isfile(path):
        return {}
    origin = read_json_object(path)
    if not isinstance(origin.get("config"), dict) or not isinstance(origin.get("generation_config", {}), dict):
        raise UserError(f"{path}: config and generation_config must be objects")
    return origin


def hand_on_origin(source: Workdir, workdir: Workdir) -> None:
    """Gives a run that starts from `source`'s weights the origin of `source`, unless it has one."""
    origin = read_origin(source)
    if origin and not read_origin(workdir):
        write_origin(workdir, origin)


def ends_of_text(workdir: Workdir) -> frozenset[int]:
    """The ids at which the original model stops, apart from its tokenizer's end-of-document id."""
    origin = read_origin(workdir)
    ids: set[int] = set()
    for section in ("config", "generation_config"):
        end = origin.get(section, {}).get("eos_token_id")
        ids |= set(end if isinstance(end, list) else [end])
    return frozenset(end for end in ids if isinstance(end, int))
