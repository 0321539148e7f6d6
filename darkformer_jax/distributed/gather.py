"""Products with matrices of which every device has a part: gathered for the product, their gradients scattered.

`mesh.fsdp` and `mesh.context` split them: devices with other rows, and devices with other tokens of the same rows.

A TPU's compiler makes an all-reduce of a reduce-scatter among all chips of a slice, which sends twice as much. Among
some of them it keeps the reduce-scatter. So matrices are gathered in two stages, and gradients, the transposed program,
are scattered in two: within groups of neighbours, and among the groups.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from darkformer_jax.distributed.sharding import RULES, axes_that_split, axis_size


def with_gathered(
    product: Callable[[Array, Array], Array],
    x: Array,
    matrix: Array,
    axes: Sequence[str | None],
    *,
    sums_in: jax.typing.DTypeLike,
) -> Array:
    """`product(x, matrix)`, on each device for its own rows and places, with the whole matrix.

    A plain call, which the compiler splits, where the mesh does not split the matrix, or does not divide x.

    Args:
      product: [b, n, ...] and a matrix -> [b, n, ...], each row and place by itself.
      axes: the logical names of the matrix's dimensions.
      sums_in: the dtype in which parts are sent and their gradients summed; see `ops.lowering.dtype_of_sums`.
    """
    rows, places = axis_size("batch"), axis_size("sequence")
    parts = axes_that_split("embed", matrix.shape[list(axes).index("embed")]) if "embed" in axes else ()
    mesh = jax.sharding.get_abstract_mesh()
    if not parts or mesh.manual_axes or x.ndim < 3 or x.shape[0] % rows or x.shape[1] % places:
        return product(x, matrix)
    place = list(axes).index("embed")
    split = P(RULES["batch"], RULES["sequence"])
    of_tokens = (*RULES["batch"], *RULES["sequence"])
    others = tuple(axis for axis in of_tokens if axis not in parts)

    # The backward pass gathers again: of all layers, whole matrices would fill a device. A loop over layers keeps XLA
    # from merging the two.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_device(x: Array, part: Array) -> Array:
        part = part.astype(sums_in)
        # First, so that gradients are scattered before they are summed over the other axes.
        part = jax.lax.pcast(part, others, to="varying")
        part = jnp.moveaxis(part, place, 0)  # of a TPU's reduce-scatters, those along the last axis become all-reduces
        return product(x, jnp.moveaxis(_gathered(part, parts), 0, place).astype(matrix.dtype))

    in_specs = (split, P(*(parts if name == "embed" else None for name in axes)))
    return jax.shard_map(of_device, in_specs=in_specs, out_specs=split, axis_names={*of_tokens})(x, matrix)


def _gathered(part: Array, axes: Sequence[str]) -> Array:
    """In a shard_map: the whole array, of which each device along the mesh axes has a share of the first dimension."""
    for axis in reversed(axes):  # the shares along the last one lie beside each other
        for groups in stages(jax.lax.axis_size(axis)):
            part = jax.lax.all_gather(part, axis, tiled=True, axis_index_groups=groups)
    return part


def scattered(part: Array, axes: Sequence[str]) -> Array:
    """In a shard_map: of the sum of all devices' arrays along the mesh axes, the device's share of the first dimension.

    The transposed program of the gather in `with_gathered`.
    """
    for axis in axes:
        for groups in reversed(stages(jax.lax.axis_size(axis))):
            part = jax.lax.psum_scatter(part, axis, tiled=True, axis_index_groups=groups)
    return part


def stages(ways: int) -> list[list[list[int]] | None]:
    """The groups of devices that gather in each stage; None: all in one, of a number that has no two factors.

    Groups of the first stage are neighbours, and those of the second have one device of each: so parts stay in order.
    """
    size = max(size for size in range(1, ways + 1) if ways % size == 0 and size * size <= ways)
    if size == 1:
        return [None]
    starts = range(0, ways, size)
    neighbours = [list(range(start, start + size)) for start in starts]
    return [neighbours, [[start + place for start in starts] for place in range(size)]]
