"""Where each of our arrays is in a Hugging Face checkpoint: its names, layer by layer, and the two layouts.

Hugging Face stores a matrix as [out, in] with heads merged. We store it as [in, out] with heads apart. So each axis
there is a group of our axes: q's kernel [D, H, d] is [H d, D] there, that is ((1, 2), (0,)).
"""

import dataclasses
import functools
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
    "classifier/kernel": ((1,), (0,)),
    "classifier/bias": ((0,),),
}

_OWN = ("mechanism", "convolution", "forgetting")  # parts of attention
_CLASSIFIER = {"classifier/kernel": "score.weight", "classifier/bias": "score.bias"}


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
    """One of our arrays: its path, and its name in the checkpoint, or one name per row if it stacks layers.

    `tree` is "params" or "projections".
    """

    path: tuple[str, ...]
    variable: Any
    names: tuple[str, ...]
    stacked: bool
    layout: Layout
    tree: str = "params"


def places_of(network: Network, family: Family, *, own: bool = False) -> list[Place]:
    """Every parameter that the family's checkpoints hold, in the model's order.

    Args:
      own: the arrays that only this package's format has are left out, as those of mechanisms always are.

    Raises:
      UserError: an array of the model has no name in the family.
    """
    found: list[Place] = []

    def add(path: tuple[str, ...], variable: Any) -> None:
        if is_mechanism(path) or (own and is_own(path)):
            return
        inner = path[1:] if _is_stacked(path) else path
        name = "/".join(inner)
        if name not in family.names:
            raise UserError(f"a {family.model_type} model has no array for {'/'.join(path)}")
        found.append(_place(network, path, variable, family.names[name], _groups(name)))

    network.map_params(add)
    return found


def own_places(network: Network) -> list[Place]:
    """The arrays that no family has.

    Those of attention are under `model.layers.<layer>.self_attn.` and our path, in our layout; a classifier's head is
    `score`, as in transformers.
    """
    found: list[Place] = []

    def add(tree: str, path: tuple[str, ...], variable: Any) -> None:
        name = "/".join(path)
        if name in _CLASSIFIER:
            found.append(_place(network, path, variable, _CLASSIFIER[name], _groups(name)))
        elif is_own(path):
            groups = tuple((axis,) for axis in range(len(variable.shape) - 1))
            name = ".".join(("self_attn", *path[2:]))
            found.append(_place(network, path, variable, name, groups, tree))

    network.map_params(functools.partial(add, "params"))
    network.map_projections(functools.partial(add, "projections"))
    return found


def _place(
    network: Network,
    path: tuple[str, ...],
    variable: Any,
    name: str,
    groups: tuple[tuple[int, ...], ...],
    tree: str = "params",
) -> Place:
    shape = tuple(variable.shape)
    names: tuple[str, ...] = (name,)
    if _is_stacked(path):
        first, strides = int(path[0].removeprefix("blocks_")), len(network.spec.pattern)
        names = tuple(f"model.layers.{first + strides * row}.{name}" for row in range(shape[0]))
    stacked = _is_stacked(path)
    return Place(path, variable, names, stacked, Layout(shape[1:] if stacked else shape, groups), tree)


def _is_stacked(path: Sequence[str]) -> bool:
    return path[0].startswith("blocks_")


def is_own(path: Sequence[str]) -> bool:
    """Whether no family has an array: it belongs to a classifier's head, or to a part of attention that is ours."""
    return "/".join(path) in _CLASSIFIER or (path[1:2] == ("attention",) and path[2] in _OWN)


def is_mechanism(path: Sequence[str]) -> bool:
    """Whether an array belongs to an attention mechanism rather than to the transformer around it."""
    return "mechanism" in path


def _groups(name: str) -> tuple[tuple[int, ...], ...]:
    return next(groups for end, groups in _GROUPS.items() if name == end or name.endswith("/" + end))
