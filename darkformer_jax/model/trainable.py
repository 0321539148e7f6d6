"""Which parameters a run trains: all, or some. The others do not change by a single bit."""

from collections.abc import Callable, Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from darkformer_jax.errors import UserError
from darkformer_jax.model.lora import is_lora
from darkformer_jax.model.network import Network, is_geometry

ParamPath = tuple[str, ...]
Paths = frozenset[ParamPath]

# Of a layer's attention. Else a layer has a mechanism's, a gate, a convolution, or a mixer that is no attention.
_OF_PRETRAINED_ATTENTION = ("q", "k", "v", "out", "q_norm", "k_norm")


def _is_qkv(path: ParamPath) -> bool:
    return path[1:2] == ("attention",) and path[2] in ("q", "k", "v")


def _is_new(path: ParamPath) -> bool:
    """Whether no pretrained model of another library has the parameter; every regime trains it."""
    return path[0] == "classifier" or (path[1:2] == ("attention",) and path[2] not in _OF_PRETRAINED_ATTENTION)


# optimizer.train -> whether it is named after the parameter (path, variable). It also trains what is new.
REGIMES: Mapping[str, Callable[[ParamPath, Any], bool]] = {
    "all": lambda path, variable: True,
    "qkv_geometry": lambda path, variable: _is_qkv(path) or is_geometry(variable),
    "geometry": lambda path, variable: is_geometry(variable),
    "lora": lambda path, variable: is_lora(path) or is_geometry(variable),
}


def trained_paths(network: Network, regime: str) -> Paths:
    """The parameters that `optimizer.train = regime` trains. Raises UserError if the model has none that it names."""
    named = _paths(network, REGIMES[regime])
    if not named:
        kinds = ", ".join(sorted(set(network.spec.layer_kinds)))
        raise UserError(
            f"optimizer.train = {regime!r}: a model of {kinds} layers has no M and no learned projections to train; "
            f"allowed: {', '.join(name for name in REGIMES if name != regime)}"
        )
    return named | _paths(network, lambda path, variable: _is_new(path))


def _paths(network: Network, is_in: Callable[[ParamPath, Any], bool]) -> Paths:
    return frozenset(path for path, found in flatten_dict(network.map_params(is_in)).items() if found)


def split_params(params: dict, trained: Paths) -> tuple[dict, dict]:
    """(trained, frozen): the paths of a tree like `params` that are in `trained`, and the rest."""
    flat = flatten_dict(params)
    return (
        unflatten_dict({path: leaf for path, leaf in flat.items() if path in trained}),
        unflatten_dict({path: leaf for path, leaf in flat.items() if path not in trained}),
    )


def join_params(trained: dict, frozen: dict) -> dict:
    """The inverse of `split_params`."""
    if not frozen:
        return trained
    joined: dict = unflatten_dict(flatten_dict(trained) | flatten_dict(frozen))
    return joined
