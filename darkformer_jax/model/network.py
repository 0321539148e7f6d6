"""A model as pure functions of its arrays, and the metadata of its variables."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from darkformer_jax.distributed.sharding import sharding_of
from darkformer_jax.mixers.features import draw_layer
from darkformer_jax.mixers.spec import Geometry, Projection
from darkformer_jax.model.spec import ModelSpec
from darkformer_jax.model.transformer import Transformer
from darkformer_jax.ops.keys import key_of_seed


@dataclasses.dataclass(frozen=True)
class Network:
    """A model as pure functions of two nested dicts of arrays: parameters and projections."""

    spec: ModelSpec
    graphdef: Any
    abstract_params: nnx.State
    abstract_projections: nnx.State

    @classmethod
    def of(cls, spec: ModelSpec) -> "Network":
        """Builds the model abstractly: no array is allocated."""
        abstract = nnx.eval_shape(lambda: Transformer(spec, key_of_seed(0)))
        return cls(spec, *_split(abstract))

    def init(self, key: Array) -> tuple[dict, dict]:
        """(params, projections), freshly drawn."""
        _, params, projections = _split(Transformer(self.spec, key))
        return nnx.to_pure_dict(params), nnx.to_pure_dict(projections)

    def bind(self, params: dict, projections: dict) -> Transformer:
        """The module with these arrays, to be called inside a jitted function."""
        return nnx.merge(self.graphdef, params, projections)

    def redraw(self, projections: dict, epoch: Array) -> dict:
        """The projections of another redraw epoch. Other fixed noise does not change."""
        redrawn = dict(projections)
        count = len(self.spec.pattern)
        for place, mixer in enumerate(self.spec.pattern):
            block = projections.get(f"blocks_{place}", {})
            old = block.get("attention", {}).get("mechanism", {}).get("projections")
            if old is not None:
                layers = place + count * jnp.arange(old.shape[0])
                new = jax.vmap(functools.partial(draw_layer, mixer, epoch=epoch))(layers)
                mechanism = block["attention"]["mechanism"] | {"projections": new}
                redrawn[f"blocks_{place}"] = {"attention": {"mechanism": mechanism}}
        return redrawn

    def map_params(self, function: Any) -> dict:
        """function(path, variable) for every parameter, as a tree like `params`."""
        return _map_variables(self.abstract_params, function)

    def map_projections(self, function: Any) -> dict:
        """function(path, variable) for every projection array, as a tree like `projections`."""
        return _map_variables(self.abstract_projections, function)


def logical_axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    """Names of a variable's dimensions. A stacked variable has an unnamed axis of layers in front."""
    axes = tuple(variable.get_metadata()["axes"])
    return (None,) * (len(variable.shape) - len(axes)) + axes


def variable_sharding(path: tuple, variable: nnx.Variable, mesh: Mesh) -> NamedSharding:
    """The sharding of a variable, by its logical axes. Raises UserError if the mesh does not divide it."""
    return sharding_of("/".join(map(str, path)), logical_axes(variable), variable.shape, mesh)


def is_geometry(variable: nnx.Variable) -> bool:
    """Whether a parameter is M, a learned projection or a gain."""
    return issubclass(variable.type if hasattr(variable, "type") else type(variable), Geometry)


def _split(model: Transformer) -> tuple[Any, nnx.State, nnx.State]:
    """(structure, parameters, projections)."""
    parts: Any = nnx.split(model, nnx.Param, Projection)
    return parts


def _map_variables(state: nnx.State, function: Any) -> dict:
    return unflatten_dict({path: function(path, variable) for path, variable in nnx.to_flat_state(state)})
