"""Where each of our arrays is in a Hugging Face checkpoint: its names, layer by layer, and the two layouts.

Hugging Face stores a matrix as [out, in] with heads merged. We store it as [in, out] with heads apart. So each axis
there is a group of our axes: q's kernel [D, H, d] is [H d, D] there, that is ((1, 2), (0,)).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from darkformer_jax.errors import UserError
from darkformer_jax.model.network import Network
from darkformer_jax.pretrained.families import Family

Shape = tuple[int, ...]
Index = tuple[slice, ...]

# End of our array's path -> the group of our axes that each axis there consists of.
_GROUPS: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "embedding": ((0,), (1,)),
    "head": ((0,), (1,)),
    "scale": ((0,),),
    "q/kernel": ((1, 2), (0,)),
    "k/kernel": ((1, 2), (0,)),
    "v/kernel": ((1, 2), (0,)),
    "out/kernel": ((2,), (0, 1)),
    "q/bias": ((0, 1),),
    "k/bias": ((0, 1),),
    "v/bias": ((0, 1),),
    "gate/kernel": ((1,), (0,)),
    "up/kernel": ((1,), (0,)),
    "down/kernel": ((1,), (0,)),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """One layer's array: its `shape` here, and its transposed and merged form in the checkpoint ("there")."""

    shape: Shape
    groups: tuple[tuple[int, ...], ...]

    @property
    def hf_shape(self) -> Shape:
        return tuple(math.prod(self.shape[axis] for axis in group) for group in self.groups)

    def hf_index(self, index: Sequence[slice]) -> Index:
        """The slice there that holds our `index`; only the first part of a merged axis may be split."""
        return tuple(self._merged(group, index) for group in self.groups)

    def from_hf(self, piece: np.ndarray, index: Sequence[slice]) -> np.ndarray:
        """The piece that `hf_index(index)` selects there, in our layout."""
        sizes = [len(range(*part.indices(size))) for part, size in zip(index, self.shape, strict=True)]
        order = self._order
        return piece.reshape([sizes[axis] for axis in order]).transpose(np.argsort(order))

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Our whole array in the checkpoint's layout."""
        return array.transpose(self._order).reshape(self.hf_shape)

    @property
    def _order(self) -> list[int]:
        return [axis for group in self.groups for axis in group]

    def _merged(self, group: tuple[int, ...], index: Sequence[slice]) -> slice:
        start, stop, _ = index[group[0]].indices(self.shape[group[0]])
        inner = math.prod(self.shape[axis] for axis in group[1:])
        if any(index[axis].indices(self.shape[axis])[:2] != (0, self.shape[axis]) for axis in group[1:]):
            raise ValueError(f"axes {group} of {self.shape} are merged in the checkpoint: only the first may be split")
        return slice(start * inner, stop * inner)


@dataclasses.dataclass(frozen=True)
class Place:
    """One of our arrays: its path, and its name in the checkpoint, or one name per row if it stacks layers."""

    path: tuple[str, ...]
    variable: Any
    names: tuple[str, ...]
    stacked: bool
    layout: Layout


def places_of(network: Network, family: Family) -> list[Place]:
    """Every parameter that the family's checkpoints hold, in the model's order.

    Parameters of feature mechanisms (M, learned projections) are left out: no family has them.

    Raises:
      UserError: an array of the model has no name in the family.
    """
    found: list[Place] = []
    strides = len(network.spec.pattern)

    def add(path: tuple[str, ...], variable: Any) -> None:
        stacked = path[0].startswith("blocks_")
        inner = path[1:] if stacked else path
        if is_mechanism(path):
            return
        name = "/".join(inner)
        if name not in family.names:
            raise UserError(f"a {family.model_type} model has no array for {'/'.join(path)}")
        hf_name, shape = family.names[name], tuple(variable.shape)
        names: tuple[str, ...] = (hf_name,)
        if stacked:
            first = int(path[0].removeprefix("blocks_"))
            names = tuple(f"model.layers.{first + strides * row}.{hf_name}" for row in range(shape[0]))
        layout = Layout(shape[1:] if stacked else shape, _groups(name))
        found.append(Place(path, variable, names, stacked, layout))

    network.map_params(add)
    return found


def is_mechanism(path: Sequence[str]) -> bool:
    """Whether an array belongs to an attention mechanism rather than to the transformer around it."""
    return "mechanism" in path


def _groups(name: str) -> tuple[tuple[int, ...], ...]:
    return next(groups for end, groups in _GROUPS.items() if name == end or name.endswith("/" + end))
