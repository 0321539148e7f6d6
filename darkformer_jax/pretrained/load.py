"""Imports a checkpoint into a workdir. Arrays stream one by one onto the devices; each device reads its own slice."""

import contextlib
import ctypes
import dataclasses
import gc
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import ml_dtypes
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from darkformer_jax.config.specs import model_spec
from darkformer_jax.config.validation import validate
from darkformer_jax.data.files import whole_directory
from darkformer_jax.data.labelled import save_class_names
from darkformer_jax.data.progress import ProgressBar, no_progress
from darkformer_jax.distributed.sharding import make_mesh, sharding_of
from darkformer_jax.errors import UserError
from darkformer_jax.model.network import Network, logical_axes
from darkformer_jax.pretrained.classifiers import Head
from darkformer_jax.pretrained.families import Family, family_of
from darkformer_jax.pretrained.families.family import LLAMA_NAMES
from darkformer_jax.pretrained.hf_config import origin_of
from darkformer_jax.pretrained.key_map import Layout, Place, is_own, own_places, places_of
from darkformer_jax.pretrained.mechanism import (
    MechanismArray,
    check_mechanism,
    check_shapes,
    has_mechanism,
    mechanism_arrays,
    read_mechanism,
)
from darkformer_jax.pretrained.own_format import is_own_format, read_own_config
from darkformer_jax.pretrained.safetensors_files import DTYPES, SafetensorsFiles
from darkformer_jax.pretrained.source import Source
from darkformer_jax.runs.checkpoints import Checkpoints
from darkformer_jax.runs.origin import write_origin
from darkformer_jax.runs.workdir import Workdir

_BLOCK_BYTES = 4 * 2**20  # read at once
_HEAD, _EMBEDDING = LLAMA_NAMES["head"], LLAMA_NAMES["embedding"]  # in every family
_ALIGNMENT = 64  # bytes; XLA's
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# Buffers that old releases saved beside their weights.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class PlannedArray(NamedTuple):
    """An array of the model: its path, variable and dtype, and a function that reads a slice of it into memory."""

    path: tuple[str, ...]  # from "params" or "projections" on
    variable: Any
    dtype: np.dtype
    read: Callable[[Sequence[slice], np.ndarray], None]


class Import(NamedTuple):
    """A checkpoint whose names and shapes fit the model that its config.json describes. Nothing is loaded.

    head: of a classifier or a regression; None for a language model.
    """

    source: Source
    family: Family
    config: ml_collections.ConfigDict
    arrays: list[PlannedArray]
    origin: dict[str, Any]
    head: Head | None

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays as they are stored."""
        return sum(math.prod(array.variable.shape) * array.dtype.itemsize for array in self.arrays)


def plan_import(source: Source, config: ml_collections.ConfigDict, dtype: str | None = None) -> Import:
    """Checks everything that can be checked without reading an array.

    Args:
      config: the base config; its model and its task become the checkpoint's.
      dtype: to store the parameters in; None = their own, but float16 becomes float32.

    Raises:
      UserError: an architecture or option is not supported, or a name, shape or dtype does not fit.
    """
    has_own = is_own_format(source.config.values)
    beside, head = None, None  # the mechanisms of an export as the exact model; what a classifier's outputs mean
    if has_own:
        family, head = read_own_config(source.config, config)
    else:
        family = family_of(source.config)
        fields = family.read(source.config)
        config.update_from_flattened_dict({f"model.{name}": value for name, value in fields.items()})
        config.sequence_length = source.config.integer("max_position_embeddings", config.sequence_length)
        beside = read_mechanism(source.path, config, fields) if has_mechanism(source.path) else None
    if not has_own and beside is None:
        stored = {_stored_dtype(source, name, dtype) for name in source.arrays if not _IGNORED.fullmatch(name)}
        config.model.dtype = "bfloat16" if stored == {_BFLOAT16} else "float32"  # computes in what it stores
    config.data.tokenizer = ""
    validate(config)
    source.check_tokenizer()
    network = Network.of(model_spec(config, config.model.vocab_size, head.num_outputs if head else 0))
    places = places_of(network, family, own=has_own) + (own_places(network) if has_own else [])
    places = _in_file(source, places, config.model.tie_embeddings)
    _check_arrays(source, places, config.model.tie_embeddings)
    arrays = [_planned(source, place, dtype) for place in places]
    if beside:
        mechanism = mechanism_arrays(network)
        check_mechanism(beside, mechanism)
        arrays += [_planned_mechanism(beside, array) for array in mechanism]
    origin = origin_of(family.model_type, source.config, source.path, config.model.vocab_size)
    return Import(source, family, config, arrays, origin, head)


def run_import(plan: Import, workdir: str, progress_bar: ProgressBar = no_progress) -> None:
    """Writes the workdir, whole or not at all.

    Raises:
      UserError: the workdir is not empty, the disk is full, a file is damaged, or the tokenizer does not fit.
    """
    with whole_directory(workdir) as temporary:
        own = Workdir(temporary)
        own.write_config(plan.config.to_dict())
        _save_tokenizer(plan.source, plan.config.model.vocab_size, temporary)
        _return_freed_memory()
        _save_arrays(plan, own, progress_bar)
        write_origin(own, plan.origin)
        if plan.head is not None and plan.head.classes:
            save_class_names(temporary, plan.head.classes)


def _save_tokenizer(source: Source, vocab_size: int, directory: Path) -> None:
    """Saves the tokenizer: before the arrays, to show its errors at once. It is not kept: arrays need the memory."""
    tokenizer = source.tokenizer()
    size = tokenizer.vocab_size
    if vocab_size < size < 2 * vocab_size:
        raise UserError(
            f"{source.path}: its tokenizer has {size} ids, but the embedding {vocab_size} rows: ids from {vocab_size}"
            " on were added without rows. Take them out of the tokenizer's files, or give them rows in transformers"
            f" with model.resize_token_embeddings({size}) and save_pretrained, and convert that directory"
        )
    # Fewer ids than rows are common, because tables are padded. Fewer than half belong to another model's tokenizer.
    if not vocab_size / 2 <= size <= vocab_size:
        raise UserError(
            f"{source.path}: its tokenizer has {size} ids, which does not fit "
            f"vocab_size = {vocab_size} in {os.path.basename(source.config.path)}"
        )
    tokenizer.save(str(directory))


def _return_freed_memory() -> None:
    """Returns the tokenizer's memory to the system: glibc keeps it, some 20 MB of the peak. Without glibc, a no-op."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _save_arrays(plan: Import, workdir: Workdir, progress_bar: ProgressBar) -> None:
    mesh = _mesh(plan.config.model.embed_dim)
    state: dict[tuple[str, ...], jax.Array] = {}
    with progress_bar(plan.num_bytes, "B", "import") as bar:
        for array in plan.arrays:
            state[array.path] = loaded = _on_devices(array, mesh)
            bar.update(loaded.nbytes)
    state["step",] = jax.device_put(np.zeros((), np.int32), NamedSharding(mesh, P()))
    with contextlib.closing(Checkpoints(workdir, compress=False)) as checkpoints:
        checkpoints.save(0, unflatten_dict(state))


def _stored_dtype(source: Source, name: str, dtype: str | None) -> np.dtype:
    """The dtype to store an array in. Raises UserError unless it is a float of 16 or 32 bits."""
    array = source.arrays[name]
    if array.dtype not in DTYPES:
        raise UserError(f"{array.file}: array {name} is {array.dtype}; allowed: {', '.join(DTYPES)}")
    if dtype is not None:
        return jnp.dtype(dtype)
    return _BFLOAT16 if array.dtype == "BF16" else np.dtype(np.float32)


def _in_file(source: Source, places: list[Place], tied: bool) -> list[Place]:
    """The places, with the head's name for the embedding of a tied model whose file has only that one of the two."""
    if not tied or _EMBEDDING in source.arrays or _HEAD not in source.arrays:
        return places
    return [dataclasses.replace(place, names=(_HEAD,)) if place.names == (_EMBEDDING,) else place for place in places]


def _check_arrays(source: Source, places: Sequence[Place], tied: bool) -> None:
    wanted = {name: place.layout.hf_shape for place in places for name in place.names}
    arrays = {name: array for name, array in source.arrays.items() if not _IGNORED.fullmatch(name)}
    both = [arrays[name].shape for name in (_HEAD, _EMBEDDING) if name in arrays]
    if tied and both == [wanted.get(_EMBEDDING)] * 2:
        # A tied head that is saved too must equal the embedding. Another matrix would be another model.
        if not _equal(source, _HEAD, _EMBEDDING):
            raise UserError(
                f"{arrays[_HEAD].file}: array {_HEAD} differs from {_EMBEDDING}, but tie_word_embeddings says they are "
                "one"
            )
        del arrays[_HEAD]
    check_shapes(arrays, wanted, source.path, os.path.basename(source.config.path))


def _equal(source: Source, one: str, other: str) -> bool:
    rows = source.arrays[one].shape[0]
    slices = (slice(start, min(start + 4096, rows)) for start in range(0, rows, 4096))
    return all(np.array_equal(source.read(one, (part,)), source.read(other, (part,))) for part in slices)


def _planned(source: Source, place: Place, dtype: str | None) -> PlannedArray:
    def read(index: Sequence[slice], piece: np.ndarray) -> None:
        if not place.stacked:
            _read_blocks(source, place.names[0], place.layout, index, piece)
            return
        for name, row in zip(place.names[index[0]], piece, strict=True):
            _read_blocks(source, name, place.layout, index[1:], row)

    dtypes = {_stored_dtype(source, name, dtype) for name in place.names}
    stored = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)  # float32 holds any mixture
    if is_own(place.path):
        stored = np.dtype(place.variable.dtype)
    return PlannedArray((place.tree, *place.path), place.variable, stored, read)


def _planned_mechanism(files: SafetensorsFiles, array: MechanismArray) -> PlannedArray:
    def read(index: Sequence[slice], piece: np.ndarray) -> None:
        piece[...] = files.read(array.name, index)

    return PlannedArray((array.tree, *array.path), array.variable, np.dtype(array.variable.dtype), read)


def _read_blocks(source: Source, name: str, layout: Layout, index: Sequence[slice], piece: np.ndarray) -> None:
    """Fills `piece` with the slice `index` of an array, some rows of the checkpoint's array at a time."""
    axis = layout.groups[0][0]
    start, stop, _ = index[axis].indices(layout.shape[axis])
    step = max(1, _BLOCK_BYTES * (stop - start) // max(piece.nbytes, 1))
    for begin in range(start, stop, step):
        rows = slice(begin, min(begin + step, stop))
        part = (*index[:axis], rows, *index[axis + 1 :])
        there = source.read(name, layout.hf_index(part))
        block = piece[(slice(None),) * axis + (slice(rows.start - start, rows.stop - start),)]
        with np.errstate(over="ignore"):  # it is checked below
            block[...] = layout.from_hf(there, part)
        if not np.isfinite(block).all():
            file = source.arrays[name].file
            raise UserError(f"{file}: array {name} has a number that is not finite as {block.dtype}")


def _on_devices(array: PlannedArray, mesh: Mesh) -> jax.Array:
    """The array on the mesh, read one device's slice at a time: jax.make_array_from_callback would hold all slices."""
    shape = tuple(array.variable.shape)
    sharding = sharding_of("/".join(array.path), logical_axes(array.variable), shape, mesh)
    pieces = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None  # None is only for a device that holds nothing
        piece = _aligned_empty(sharding.shard_shape(shape), array.dtype)
        array.read(index, piece)
        pieces.append(jax.device_put(piece, device).block_until_ready())
        del piece
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def _aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array that a CPU device takes over without a copy, because its memory is aligned."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -memory.ctypes.data % _ALIGNMENT
    return memory[offset : offset + size].view(dtype).reshape(shape)


def _mesh(embed_dim: int) -> Mesh:
    """A mesh of as many devices as divide the width. They share every array; more devices would only hold copies."""
    count = math.gcd(embed_dim, len(jax.devices()))
    return make_mesh({"data": 1, "fsdp": count, "tensor": 1}, jax.devices()[:count])
