"""What a checkpoint says beside its weights: an import keeps it, training hands it on, and an export gives it back."""

import json
import os
from collections.abc import Mapping
from typing import Any

from darkformer_jax.data.files import read_json_object, write_file

GENERATION_FILE = "generation_config.json"

_FILE = "pretrained.json"
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")


def keep_origin(workdir: str, model_type: str, config: Mapping[str, Any], source: str) -> None:
    """Writes down what `source`'s config.json and generation_config.json say of generating and lengths."""
    origin: dict[str, Any] = {
        "model_type": model_type,
        "config": {name: config[name] for name in _KEPT if name in config},
    }
    generation = os.path.join(source, GENERATION_FILE)
    if os.path.isfile(generation):
        origin["generation_config"] = read_json_object(generation)
    _write(workdir, origin)


def read_origin(workdir: str) -> dict[str, Any]:
    """What `keep_origin` wrote; nothing for a model that comes from no other."""
    path = os.path.join(workdir, _FILE)
    return read_json_object(path) if os.path.isfile(path) else {}


def hand_on_origin(source: str, workdir: str) -> None:
    """A run that starts from `source`'s weights has its origin."""
    origin = read_origin(source)
    if origin and not read_origin(workdir):
        _write(workdir, origin)


def ends_of_text(workdir: str) -> frozenset[int]:
    """The ids at which the original model stops, beside the one that its tokenizer ends documents with."""
    origin = read_origin(workdir)
    ids: set[int] = set()
    for section in ("config", "generation_config"):
        end = origin.get(section, {}).get("eos_token_id")
        ids |= set(end if isinstance(end, list) else [end])
    return frozenset(end for end in ids if isinstance(end, int))


def _write(workdir: str, origin: Mapping[str, Any]) -> None:
    write_file(os.path.join(workdir, _FILE), (json.dumps(origin, indent=2) + "\n").encode())
