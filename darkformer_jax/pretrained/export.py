"""From a workdir to a Hugging Face directory: config.json, safetensors, tokenizer, generation_config.json."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from darkformer_jax.config.fields import flat_fields
from darkformer_jax.data.files import whole_directory, write_json
from darkformer_jax.data.progress import ProgressBar, no_progress
from darkformer_jax.errors import UserError
from darkformer_jax.pretrained.families import Family, fitting_family
from darkformer_jax.pretrained.hf_config import GENERATION_FILE
from darkformer_jax.pretrained.key_map import Place, places_of
from darkformer_jax.pretrained.mechanism import (
    JSON_FILE,
    STEM,
    exact_fields,
    is_exact,
    mechanism_arrays,
    write_mechanism,
)
from darkformer_jax.pretrained.safetensors_files import ArrayToWrite, shard, write_safetensors
from darkformer_jax.runs.load import WorkdirModel, load_language_model
from darkformer_jax.runs.origin import read_origin
from darkformer_jax.runs.workdir import Workdir

SHARD_GB = 5  # the largest file of an export unless the caller wants another


def export_workdir(
    workdir: Workdir,
    directory: str,
    *,
    step: int | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_GB * 10**9,
    progress_bar: ProgressBar = no_progress,
) -> str:
    """Writes the Hugging Face directory, whole or not at all, and returns a line that says what it holds.

    A model with feature mechanisms becomes the same transformer with exact attention. Its mechanisms go into files of
    our own beside it, with a README.md.

    Args:
      step: the checkpoint; None = the newest undamaged one.
      dtype: of the arrays written; None = as they are stored. Mechanisms keep theirs.
      shard_bytes: the largest size of a safetensors file; an array that is larger has a file of its own.
      progress_bar: shows the bytes written.

    Raises:
      UserError: there is no usable checkpoint, no family has the model, or the directory exists and is not empty.
    """
    with whole_directory(directory) as temporary:
        model = load_language_model(workdir, step)
        origin = read_origin(workdir)
        fields = dict(flat_fields(model.config.model.to_dict()))
        fields["vocab_size"] = model.network.spec.vocab_size
        exact = exact_fields(fields, str(workdir))
        family = fitting_family(exact, str(workdir), origin.get("model_type", ""))
        config = family.write(exact) | _config_extras(model, family, origin)
        arrays = _write_arrays(temporary, model, family, dtype, shard_bytes, progress_bar)
        config["torch_dtype"] = config["dtype"] = str(np.result_type(*{array.dtype for array in arrays}))
        write_json(temporary / "config.json", config, sort_keys=True)
        ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(temporary / GENERATION_FILE, origin.get("generation_config", ids), sort_keys=True)
        model.tokenizer.save(str(temporary))
        has_own = not is_exact(fields)
        if has_own:
            model.config.model.vocab_size = fields["vocab_size"]
            write_mechanism(temporary, model.config, family.architecture)
            _write_mechanism_arrays(temporary, model)
    size = sum(array.nbytes for array in arrays)
    return f"{family.architecture}, step {model.step}, {len(arrays)} arrays, {size / 1e6:,.1f} MB" + (
        f"; its mechanisms in {JSON_FILE} and in {STEM}.safetensors: transformers alone has exact attention (README.md)"
        if has_own
        else ""
    )


def _write_arrays(
    directory: Path,
    model: WorkdirModel,
    family: Family,
    dtype: str | None,
    shard_bytes: int,
    progress_bar: ProgressBar,
) -> list[ArrayToWrite]:
    arrays, sources, params = [], {}, flatten_dict(model.params)
    for place in places_of(model.network, family):
        stored = params[place.path]
        for row, name in enumerate(place.names):
            written = jnp.dtype(dtype) if dtype else np.dtype(stored.dtype)
            arrays.append(ArrayToWrite(name, place.layout.hf_shape, written))
            sources[name] = (place, stored, row)

    def values(bar: Any) -> Iterator[np.ndarray]:
        for array in arrays:
            with np.errstate(over="ignore"):  # the next line checks for it
                value = _as_hf(*sources[array.name]).astype(array.dtype)
            if not np.isfinite(value).all():
                raise UserError(f"array {array.name} has a number that is not finite as {array.dtype}")
            bar.update(array.nbytes)
            yield value

    with progress_bar(sum(array.nbytes for array in arrays), "B", "export") as bar:
        write_safetensors(directory, "model", shard(arrays, shard_bytes), values(bar))
    return arrays


def _as_hf(place: Place, stored: jax.Array, row: int) -> np.ndarray:
    return place.layout.to_hf(np.asarray(stored[row] if place.stacked else stored))


def _write_mechanism_arrays(directory: Path, model: WorkdirModel) -> None:
    trees = {"params": flatten_dict(model.params), "projections": flatten_dict(model.projections)}
    found = {array.name: trees[array.tree][array.path] for array in mechanism_arrays(model.network)}
    arrays = [ArrayToWrite(name, tuple(value.shape), np.dtype(value.dtype)) for name, value in found.items()]
    write_safetensors(directory, STEM, [arrays], (np.asarray(value) for value in found.values()))


def _config_extras(model: WorkdirModel, family: Family, origin: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json that do not follow from the model's fields."""
    ids = {"bos_token_id": model.tokenizer.bos_id, "eos_token_id": model.tokenizer.eos_id, "pad_token_id": None}
    kept = origin.get("config", {})
    longest = max(model.config.sequence_length, kept.get("max_position_embeddings", 0))
    names = {"architectures": [family.architecture], "model_type": family.model_type}
    return names | ids | kept | {"max_position_embeddings": longest}
