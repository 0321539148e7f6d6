"""Which mesh axis each named dimension of an array is split over. The only place that knows mesh axis names."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from darkformer_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

# logical name of a dimension -> mesh axes
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The device mesh with the given number of devices an axis; one of them may be -1, what the others leave.

    Raises:
      UserError: where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes[name] for name in MESH_AXES]
    known = int(np.prod([size for size in shape if size != -1]))
    if shape.count(-1) > 1 or min(shape) < -1 or 0 in shape:
        raise UserError(f"mesh {dict(sizes)}: sizes must be at least 1, and at most one may be -1")
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if int(np.prod(shape)) != len(devices):
        raise UserError(f"mesh {dict(sizes)} does not fit the {len(devices)} devices there are")
    array = np.asarray(devices).reshape(shape)
    if len(devices) > 1 and devices[0].platform == "tpu":  # neighbours in the mesh are neighbours in the torus
        from jax.experimental import mesh_utils

        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def spec_of(name: str, axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> P:
    """The partition of array `name`, whose dimensions have the logical names `axes`.

    Raises:
      UserError: two dimensions on one mesh axis, or a size that its mesh axes do not divide.
    """
    if len(axes) != len(shape):
        raise UserError(f"{name} has shape {tuple(shape)} and axes {tuple(axes)}: their lengths differ")
    entries: list[tuple[str, ...] | None] = []
    used: set[str] = set()
    for axis, size in zip(axes, shape, strict=True):
        mesh_axes = RULES.get(axis, ()) if axis is not None else ()
        ways = int(np.prod([mesh.shape[a] for a in mesh_axes]))
        if ways == 1:
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


def sharding_of(name: str, axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """`spec_of` on its mesh."""
    return NamedSharding(mesh, spec_of(name, axes, shape, mesh))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler how an activation is split over the current mesh (`jax.set_mesh`); nothing without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    known = [axis if axis is None or x.shape[i] % _ways(axis, mesh) == 0 else None for i, axis in enumerate(axes)]
    return jax.lax.with_sharding_constraint(x, P(*(RULES[axis] if axis else None for axis in known)))


def _ways(axis: str, mesh: jax.sharding.AbstractMesh) -> int:
    return int(np.prod([mesh.shape[a] for a in RULES[axis]]))
