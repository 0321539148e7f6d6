"""Which mesh axis each named dimension of an array is split over. The only place that knows mesh axis names."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from darkformer_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "context")
CONTEXT = "context"

# Axes that may span slices, in the order in which they are spread over them. The network between slices is slow, so
# `tensor` may not span them: it sends activations several times per layer.
SLOW_AXES = ("data", "fsdp", "context")

# logical name of a dimension -> mesh axes
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "sequence": (CONTEXT,),
    "vocab": ("tensor",),
    "embed": ("fsdp", CONTEXT),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "features": ("tensor",),
}

# dimension -> the dimension that is split instead if the mesh does not divide it, and otherwise stays whole. With
# grouped queries, a single key/value head cannot be split, but its random features can.
INSTEAD = {"kv_heads": "features"}

# dimension -> the last of its mesh axes, along which it is copied if all of them together do not divide it
COPIED_OVER = {"embed": CONTEXT}
_HEADS = ("kv_heads", "heads")


def mesh_axes_of(axis: str | None, size: int, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The mesh axes that shall split a dimension of that size; whether they divide it is for the caller to say.

    A width that `fsdp` and `context` do not divide together is split by `fsdp`, and copied along `context`.
    """
    axes = () if axis is None else RULES.get(axis, ())
    last = COPIED_OVER.get(axis or "")
    if last and (mesh.shape[last] == 1 or size % _size_of(axes, mesh)):
        return tuple(name for name in axes if name != last)
    return axes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The device mesh with the given number of devices per axis; one may be -1 = all that the others leave.

    Axes that `sizes` does not name have size 1.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or do not fit the slices (`device_array`).
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes.get(name, 1) for name in MESH_AXES]
    known = int(np.prod([size for size in shape if size != -1]))
    if shape.count(-1) > 1 or min(shape) < -1 or 0 in shape:
        raise UserError(f"mesh {dict(sizes)}: sizes must be at least 1, and at most one may be -1")
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if int(np.prod(shape)) != len(devices):
        on_cpu = known > len(devices) and devices[0].platform == "cpu"
        raise UserError(
            f"mesh {dict(sizes)} does not fit the {len(devices)} devices there are: the product must be {len(devices)},"
            " or a divisor of it with one size -1"
            + (f"; on a CPU, JAX_NUM_CPU_DEVICES={known} before the command starts so many" if on_cpu else "")
        )
    return Mesh(device_array(shape, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def device_array(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as an array of the mesh's shape, in which the devices that talk most share the fastest network.

    A slow network joins the devices of different slices (TPU pods, hosts of GPUs: their `slice_index` differs). As much
    of `data` as the number of slices allows goes over it, then of `fsdp`, then of `context`.

    Raises:
      UserError: the slices differ in size, or data * fsdp * context is not a multiple of their number.
    """
    slices = Counter(getattr(device, "slice_index", 0) for device in devices)
    if len(slices) > 1:
        left, over_slices = len(slices), [1] * len(shape)
        for name in SLOW_AXES:
            axis = MESH_AXES.index(name)
            over_slices[axis] = math.gcd(shape[axis], left)
            left //= over_slices[axis]
        if left > 1 or len(set(slices.values())) > 1:
            raise UserError(
                f"mesh {dict(zip(MESH_AXES, shape, strict=True))} does not fit {len(slices)} slices of "
                f"{', '.join(map(str, sorted(set(slices.values()))))} devices: the slices must be equal, and "
                f"{' x '.join(SLOW_AXES)} a multiple of their number"
            )
        within = [size // count for size, count in zip(shape, over_slices, strict=True)]
        return mesh_utils.create_hybrid_device_mesh(within, over_slices, devices, allow_split_physical_axes=True)
    if len(devices) > 1 and devices[0].platform == "tpu":  # neighbours in the mesh are neighbours in the torus
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return np.asarray(devices).reshape(shape)


def spec_of(name: str, axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """The partition of array `name`, whose dimensions have the logical names `axes`.

    Raises:
      UserError: two dimensions are on one mesh axis, or their mesh axes do not divide a size.
    """
    if len(axes) != len(shape):
        raise UserError(f"{name} has shape {tuple(shape)} and axes {tuple(axes)}: their lengths differ")
    entries: list[tuple[str, ...] | None] = []
    used: set[str] = set()
    whole = _kept_whole(axes, shape, mesh)
    for axis, size in zip(axes, shape, strict=True):
        mesh_axes = mesh_axes_of(axis, size, mesh)
        ways = _size_of(mesh_axes, mesh)
        if ways == 1 or axis in whole:
            entries.append(None)
            continue
        if size % ways:
            raise UserError(
                f"{name}: dimension {axis!r} of size {size} is not divisible by {ways} = mesh axes {mesh_axes}"
            )
        if used & set(mesh_axes):
            raise UserError(f"{name}: two of its dimensions {tuple(axes)} are split over mesh axes {mesh_axes}")
        used |= set(mesh_axes)
        entries.append(mesh_axes)
    return P(*entries)


def _kept_whole(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> set[str]:
    """The dimension of each pair in `INSTEAD` that is not split."""
    whole = set()
    for first, second in INSTEAD.items():
        if first in axes:
            fits = shape[list(axes).index(first)] % _ways(first, mesh) == 0
            whole.add(second if fits else first)
    return whole


def sharding_of(name: str, axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """The sharding by `spec_of` on a mesh."""
    return NamedSharding(mesh, spec_of(name, axes, shape, mesh))


def with_sharding(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """An array's shape and dtype with its sharding."""
    return leaf.update(sharding=sharding)


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows of every batch that one process reads: the `index`-th of `count` equal parts."""

    index: int
    count: int


@functools.cache
def part_of_process(sharding: NamedSharding, process: int | None = None) -> Part:
    """The part of a process (None: this one). Processes read the same rows if the mesh splits none between them.

    Raises UserError for a mesh that gives processes unequal numbers of rows, or rows that overlap in part.
    """
    if sharding.is_fully_addressable:
        return Part(0, 1)
    held: dict[int, set[int]] = {}
    whole = sharding.num_devices  # a number of rows that all axes divide, to see who holds what
    indices: Mapping[Any, Any] = sharding.devices_indices_map((whole, whole))
    for device, (rows, _) in indices.items():
        held.setdefault(device.process_index, set()).update(range(*rows.indices(whole)))
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if len({len(rows) for rows in parts}) > 1 or sum(map(len, parts)) > whole:
        raise UserError(
            f"mesh {dict(sharding.mesh.shape)}: two processes must hold the same rows of a batch, or none in common, "
            f"and all must hold as many; let data x fsdp be a multiple or a divisor of the {len(held)} processes"
        )
    own = held[jax.process_index() if process is None else process]
    return Part(parts.index(tuple(sorted(own))), len(parts))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler how the current mesh (`jax.set_mesh`) splits an activation. Without a mesh, returns `x`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    known = [mesh_axes_of(axis, size, mesh) for axis, size in zip(axes, x.shape, strict=True)]
    split = [names if size % _size_of(names, mesh) == 0 else () for names, size in zip(known, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, P(*(names or None for names in split)))


def map_shards(
    function: Callable[..., jax.Array],
    arrays: Sequence[jax.Array],
    in_axes: Sequence[Sequence[str | None]],
    out_axes: Sequence[str | None],
) -> jax.Array:
    """Runs `function(*arrays)` on every device's own part of the arrays (`jax.shard_map`) on the current mesh.

    Where `tensor` does not divide the key/value or the query heads, the compiler chooses what runs over that axis.
    A layer with exact heads calls this twice, with some of its heads each time.

    Raises:
      UserError: the mesh does not divide an array.
    """
    mesh = jax.sharding.get_abstract_mesh()
    dimensions = [pair for axes, x in zip(in_axes, arrays, strict=True) for pair in zip(axes, x.shape, strict=True)]
    by_heads = all(size % _ways(axis, mesh) == 0 for axis, size in dimensions if axis in _HEADS)
    manual = set(MESH_AXES) - (set() if by_heads else {name for axis in _HEADS for name in RULES[axis]})

    def spec(axes: Sequence[str | None]) -> P:
        names = ([name for name in RULES[axis] if name in manual] if axis else [] for axis in axes)
        return P(*(tuple(entry) or None for entry in names))

    for axes, x in zip(in_axes, arrays, strict=True):
        split = [axis if axis and manual.issuperset(RULES[axis]) else None for axis in axes]
        spec_of("an array of attention", split, x.shape, mesh)
    in_specs = tuple(spec(axes) for axes in in_axes)
    return jax.shard_map(function, in_specs=in_specs, out_specs=spec(out_axes), axis_names=manual)(*arrays)


def context_size(mesh: Mesh | AbstractMesh | None = None) -> int:
    """The number of devices over which a mesh (None: the current one) splits each sequence; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return int(mesh.shape.get(CONTEXT, 1))


def splits_rows(rows: int) -> bool:
    """Whether the current mesh splits a batch of `rows` rows over several devices."""
    ways = axis_size("batch")
    return ways > 1 and rows % ways == 0


def axes_that_split(axis: str, size: int) -> tuple[str, ...]:
    """The axes of the current mesh, each of several devices, that split a dimension of that size; () without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = () if mesh.empty else mesh_axes_of(axis, size, mesh)
    return tuple(name for name in axes if mesh.shape[name] > 1) if size % _size_of(axes, mesh) == 0 else ()


def axis_size(axis: str) -> int:
    """Among how many devices the current mesh splits a dimension with this logical name; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _ways(axis, mesh)


def tensor_size(mesh: Mesh | AbstractMesh) -> int:
    """The number of devices over which a mesh splits heads."""
    return _ways("kv_heads", mesh)


def _ways(axis: str, mesh: Mesh | AbstractMesh) -> int:
    return _size_of(RULES[axis], mesh)


def _size_of(axes: Sequence[str], mesh: Mesh | AbstractMesh) -> int:
    return int(np.prod([mesh.shape[name] for name in axes]))
