"""The files that the export of a model with feature mechanisms has beyond a Hugging Face model.

darkformer.json holds every field of `model` and the seed. darkformer.safetensors holds M, gains, learned and random
projections, under our paths and in our layout. config.json and model.safetensors beside them hold the same transformer
with exact attention. README.md says so.
"""

import dataclasses
import functools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import ml_collections
from flax.traverse_util import unflatten_dict

from darkformer_jax.config import base
from darkformer_jax.config.fields import flat_fields
from darkformer_jax.config.migrations import migrate, with_version
from darkformer_jax.config.pattern import parse_pattern
from darkformer_jax.data.files import read_json_object, write_file, write_json
from darkformer_jax.errors import UserError, one_line
from darkformer_jax.mixers import MIXERS
from darkformer_jax.model.network import Network
from darkformer_jax.pretrained.families import Fields, canonical
from darkformer_jax.pretrained.families.family import FULL, LOCAL, kinds_of, layer_fields
from darkformer_jax.pretrained.key_map import is_mechanism
from darkformer_jax.pretrained.safetensors_files import SafetensorsFiles, StoredArray

STEM = "darkformer"
JSON_FILE = f"{STEM}.json"
_FORMAT = 1
_README = """# An exported DARKFormer

Attention, layer by layer: {kinds}.

Plain `transformers` does not know feature attention. It reads `config.json` and the weights beside it as a
`{architecture}`: the same transformer with **exact softmax attention in every layer**.

* It loads without missing or unexpected keys. Its embeddings, projections, MLPs and norms are this model's.
* Its logits are **not** this model's. They are those of softmax attention with these weights, with its quadratic cost
  and growing cache. Use it as a starting point, not to judge this model.

Two more files hold the rest of the model. transformers ignores them:

* `darkformer.json`: every field of the model, mechanism and window included, and the seed;
* `darkformer.safetensors`: M (the learned geometry), learned and random projections, under their names here;
  empty if these mechanisms have no arrays.

darkformer_jax reads both back, bit for bit:

    python -m darkformer_jax.convert --source=<this directory> --workdir=runs/copy
    python -m darkformer_jax.generate --workdir=runs/copy --prompt="..."
"""


@dataclasses.dataclass(frozen=True)
class MechanismArray:
    """An array of a mechanism: which tree it is in ("params" or "projections"), its path there, and the variable."""

    tree: str
    path: tuple[str, ...]
    variable: Any

    @property
    def name(self) -> str:
        return "/".join((self.tree, *self.path))


def mechanism_arrays(network: Network) -> list[MechanismArray]:
    """Every array of the model that has no place in a Hugging Face model."""
    found: list[MechanismArray] = []

    def collect(tree: str, path: tuple[str, ...], variable: Any) -> None:
        if is_mechanism(path):
            found.append(MechanismArray(tree, path, variable))

    network.map_params(functools.partial(collect, "params"))
    network.map_projections(functools.partial(collect, "projections"))
    return found


def is_exact(fields: Fields) -> bool:
    """Whether every layer has exact attention, so that a Hugging Face model is all of the model."""
    return all(map(_is_exact_kind, kinds_of(fields)))


def exact_fields(fields: Fields, where: str) -> Fields:
    """The same transformer with exact attention in place of every feature mechanism.

    Options of single layers become those of the model: the exact layers' options, or all layers' if none is exact.

    Args:
      where: the name of the model, for the error.

    Raises:
      UserError: these layers have different values of an option, and a Hugging Face model has one.
    """
    layers = parse_pattern(fields["attention.pattern"], fields["attention.kind"])
    deciding = [layer for layer in layers if _is_exact_kind(layer.kind)] or layers
    common = fields.copy()
    for name in sorted(MIXERS[FULL].uses | MIXERS[LOCAL].uses):
        field = f"attention.{name}"
        using = [layer for layer in deciding if name in MIXERS[layer.kind].uses]
        if field not in fields or not using:
            continue
        common[field], *others = sorted({layer.options.get(name, fields[field]) for layer in using})
        if others:
            raise UserError(
                f"{where}: {name} is {common[field]} in some layers and {others[0]} in others, by "
                f"model.attention.pattern = {fields['attention.pattern']!r}; a Hugging Face model has one {name}"
            )
    kinds = [kind if _is_exact_kind(kind) else FULL for kind in kinds_of(fields)]
    return canonical(common | layer_fields(kinds, common["attention.local_window"]))


def write_mechanism(directory: Path, config: ml_collections.ConfigDict, architecture: str) -> None:
    """Writes darkformer.json, and README.md: what plain transformers can and cannot do with the export."""
    fields = dict(flat_fields(config.model.to_dict()))
    content = {"format": _FORMAT, "seed": config.seed, "model": fields}
    write_json(directory / JSON_FILE, with_version(content))
    counts = Counter(kinds_of(fields))
    shown = (f"{count} x {kind}{' (exact)' * _is_exact_kind(kind)}" for kind, count in counts.items())
    readme = _README.format(kinds=", ".join(shown), architecture=architecture)
    write_file(str(directory / "README.md"), readme.encode())


def has_mechanism(directory: str) -> bool:
    """Whether a directory is the export of a model with feature mechanisms."""
    return os.path.isfile(os.path.join(directory, JSON_FILE))


def read_mechanism(directory: str, config: ml_collections.ConfigDict, exact: Fields) -> SafetensorsFiles:
    """Sets the fields of darkformer.json in `config`, migrated, and opens the files with the mechanisms' arrays.

    Args:
      exact: the model's fields according to config.json.

    Raises:
      UserError: the format is another, this version does not have a field, or config.json describes another
        transformer.
    """
    path = os.path.join(directory, JSON_FILE)
    content = read_json_object(path)
    if content.get("format") != _FORMAT or not isinstance(content.get("model"), dict):
        raise UserError(f"{path}: format = {content.get('format')!r}: allowed: {_FORMAT}, with an object `model`")
    read_own_fields(content, path, config)
    said, exact = exact_fields(dict(flat_fields(config.model.to_dict())), path), canonical(exact)
    for name in exact:
        if said[name] != exact[name]:
            raise UserError(f"{path}: model.{name} = {said[name]!r}, but config.json beside it says {exact[name]!r}")
    return SafetensorsFiles(directory, STEM)


def read_own_fields(content: dict[str, Any], where: str, config: ml_collections.ConfigDict) -> None:
    """Sets model and seed of `config` to `content["model"]`, whose names have dots, and `content["seed"]`, migrated.

    Raises:
      UserError: this version does not have a field, or a field is missing.
    """
    try:
        saved = migrate(content | {"model": unflatten_dict(content["model"], sep=".")}, where)["model"]
        fields = {f"model.{name}": value for name, value in flat_fields(saved)}
        missing = [name for name in base.fields() if name.startswith("model.") and name not in fields]
        if missing:
            raise UserError(f"{where}: {missing[0]} is missing")
        config.update_from_flattened_dict(fields)
        config.seed = content["seed"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} does not fit this version: {one_line(error)}") from error


def check_mechanism(files: SafetensorsFiles, arrays: list[MechanismArray]) -> None:
    """Raises UserError for an array of a mechanism that is missing, extra or of another shape."""
    wanted = {array.name: tuple(array.variable.shape) for array in arrays}
    check_shapes(files.arrays, wanted, os.path.join(files.directory, f"{STEM}.safetensors"), JSON_FILE)


def check_shapes(arrays: dict[str, StoredArray], wanted: dict[str, tuple[int, ...]], where: str, config: str) -> None:
    """Raises UserError for the first array that is missing, has another shape, or is not wanted.

    Args:
      where: the file or directory that should hold a missing array.
      config: the file that the shapes follow from.
    """
    for name, shape in wanted.items():
        if name not in arrays:
            raise UserError(f"{where}: array {name} is missing")
        if arrays[name].shape != shape:
            found = list(arrays[name].shape)
            raise UserError(f"{arrays[name].file}: array {name} has shape {found}; {config} makes it {list(shape)}")
    for name in arrays:
        if name not in wanted:
            raise UserError(f"{arrays[name].file}: array {name} is not part of the model that {config} describes")


def _is_exact_kind(kind: str) -> bool:
    return MIXERS[kind].role == "exact"
