"""From a workdir to a Hugging Face directory: config.json, safetensors, tokenizer, generation_config.json."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from darkformer_jax.config.fields import flat_fields
from darkformer_jax.data.files import whole_directory, write_json
from darkformer_jax.data.progress import ProgressBar, no_progress
from darkformer_jax.data.tokenizers import save_for_transformers
from darkformer_jax.errors import UserError
from darkformer_jax.pretrained.classifiers import fit_tokenizer, head_config, head_of
from darkformer_jax.pretrained.families import Family, fitting_family
from darkformer_jax.pretrained.hf_config import GENERATION_FILE
from darkformer_jax.pretrained.key_map import Place, is_own, own_places, places_of
from darkformer_jax.pretrained.mechanism import (
    JSON_FILE,
    STEM,
    exact_fields,
    is_exact,
    mechanism_arrays,
    write_mechanism,
)
from darkformer_jax.pretrained.own_format import (
    check_own_format,
    needs_own_format,
    own_config,
    stock_fields,
    write_code,
)
from darkformer_jax.pretrained.safetensors_files import ArrayToWrite, shard, write_safetensors
from darkformer_jax.runs.load import WorkdirModel, load_model
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
    as_exact: bool = False,
    progress_bar: ProgressBar = no_progress,
) -> str:
    """Writes the Hugging Face directory, whole or not at all, and returns a line that says what it holds.

    A model that no family has gets code of its own (`own_format`), which transformers runs with trust_remote_code. So
    does every classifier and regression (`classifiers`).

    Args:
      step: the checkpoint; None = the newest undamaged one.
      dtype: of the arrays written; None = as they are stored. Mechanisms keep theirs.
      shard_bytes: the largest size of a safetensors file; an array that is larger has a file of its own.
      as_exact: a model with other attention becomes the same transformer with exact attention, which is another model.
        Its mechanisms go into files of our own beside it (`mechanism`).
      progress_bar: shows the bytes written.

    Raises:
      UserError: there is no usable checkpoint, no family has the model, no export holds its head, or the directory
        exists and is not empty.
    """
    with whole_directory(directory) as temporary:
        model = load_model(workdir, step)
        head = head_of(workdir, model, as_exact=as_exact)
        fields = dict(flat_fields(model.config.model.to_dict()))
        fields["vocab_size"] = model.config.model.vocab_size = model.network.spec.vocab_size
        if as_exact and is_exact(fields):
            raise UserError(f"--as_exact: {workdir} has exact attention already")
        origin = read_origin(workdir)
        where, preferred = str(workdir), origin.get("model_type", "")
        own = head is not None or (not as_exact and needs_own_format(fields, where, preferred))
        if own:
            check_own_format(fields, where)
        stock = stock_fields(fields) if own else exact_fields(fields, where)
        family = fitting_family(stock, where, preferred)
        places = places_of(model.network, family, own=own) + (own_places(model.network) if own else [])
        save_for_transformers(model.tokenizer, str(temporary))  # before the arrays, to show its errors at once
        if head is not None:
            fit_tokenizer(temporary, model.tokenizer, model.config.sequence_length)
        arrays = _write_arrays(temporary, model, places, dtype, shard_bytes, progress_bar)
        config = family.write(stock) | _config_extras(model, family, origin)
        config["torch_dtype"] = config["dtype"] = str(_common_dtype(places, arrays))
        if own:
            config = own_config(config, model.config, family) | (head_config(head) if head else {})
            write_code(temporary, model.config, head)
        elif as_exact:
            write_mechanism(temporary, model.config, family.architecture)
            _write_mechanism_arrays(temporary, model)
        write_json(temporary / "config.json", config, sort_keys=True)
        ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(temporary / GENERATION_FILE, origin.get("generation_config", ids), sort_keys=True)
    return _summary(config, family, model.step, arrays, "own" if own else "exact" if as_exact else "stock")


def _summary(config: Mapping[str, Any], family: Family, step: int, arrays: Sequence[ArrayToWrite], kind: str) -> str:
    """A line that says what an export holds. kind: "own", "exact" or "stock"."""
    notes = {
        "own": "; transformers runs its own code (trust_remote_code=True, README.md)",
        "exact": f"; its mechanisms in {JSON_FILE} and in {STEM}.safetensors: transformers has exact attention "
        "(README.md)",
        "stock": "",
    }
    name = config["architectures"][0] + (f" on {family.model_type}" if kind == "own" else "")
    size = sum(array.nbytes for array in arrays)
    return f"{name}, step {step}, {len(arrays)} arrays, {size / 1e6:,.1f} MB{notes[kind]}"


def _write_arrays(
    directory: Path,
    model: WorkdirModel,
    places: Sequence[Place],
    dtype: str | None,
    shard_bytes: int,
    progress_bar: ProgressBar,
) -> list[ArrayToWrite]:
    arrays, sources = [], {}
    trees = {"params": flatten_dict(model.params), "projections": flatten_dict(model.projections)}
    for place in places:
        stored = trees[place.tree][place.path]
        for row, name in enumerate(place.names):
            written = jnp.dtype(dtype) if dtype and not is_own(place.path) else np.dtype(stored.dtype)
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


def _common_dtype(places: Sequence[Place], arrays: Sequence[ArrayToWrite]) -> np.dtype:
    """The dtype of the family's arrays: what it lacks has a dtype of its own."""
    own = {name for place in places if is_own(place.path) for name in place.names}
    return np.result_type(*{array.dtype for array in arrays if array.name not in own})


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
