"""Puts the heads of every layer in an order in which those that stay exact come first."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Int

from darkformer_jax.calibration.moments import Moments
from darkformer_jax.model.network import Network, logical_axes
from darkformer_jax.model.spec import ModelSpec
from darkformer_jax.training.step import TrainState

ByLayer = Mapping[int, Sequence[int]]  # layer -> the key/value heads that stay exact, for layers that have some


def with_exact_heads_first(state: TrainState, network: Network, by_layer: ByLayer) -> TrainState:
    """The state with the heads of these layers in another order, the exact ones first. The function does not change."""
    trees = ((state.params, network.map_params), (state.projections, network.map_projections))
    params, projections = (_in_order(tree, visit, network.spec, by_layer) for tree, visit in trees)
    return state._replace(params=params, projections=projections)


def _in_order(tree: dict, visit: Any, spec: ModelSpec, by_layer: ByLayer) -> dict:
    axes: dict[tuple[str, ...], tuple[str | None, ...]] = {}
    visit(lambda path, variable: axes.setdefault(tuple(path), logical_axes(variable)))
    new = flatten_dict(tree)
    for layer, first in by_layer.items():
        row, place = divmod(layer, len(spec.pattern))
        heads, kv_heads = spec.layers[layer].num_heads, spec.layers[layer].num_kv_heads
        order = _order(first, kv_heads)
        orders = {"kv_heads": order, "heads": _with_groups(order, heads)}
        for path in [path for path in new if path[:2] == (f"blocks_{place}", "attention")]:
            moved = new[path][row]
            for axis, name in enumerate(axes[path][1:]):  # the first axis is that of the stacked layers
                if name in orders:
                    moved = moved.take(orders[name], axis=axis)
            new[path] = new[path].at[row].set(moved)
    return unflatten_dict(new)


def restacked(state: TrainState, network: Network, other: Network, start: TrainState) -> TrainState:
    """`start`, a state of `other`, with every array that `state` of `network` has for the same layer."""
    trees = []
    for old, new in ((state.params, start.params), (state.projections, start.projections)):
        source, target = flatten_dict(old), flatten_dict(new)
        for path in [path for path in target if not path[0].startswith("blocks_")]:
            target[path] = source[path]
        for layer in range(network.spec.num_layers):
            (row, place), (to_row, to_place) = (divmod(layer, len(net.spec.pattern)) for net in (network, other))
            for path in [path for path in target if path[0] == f"blocks_{to_place}"]:
                value = source[(f"blocks_{place}", *path[1:])][row]
                target[path] = target[path].at[to_row].set(value)
        trees.append(unflatten_dict(target))
    return start._replace(params=trees[0], projections=trees[1])


def moments_in_order(moments: Moments, by_layer: ByLayer) -> Moments:
    """The moments of every layer, [layers, hkv, ...], of the heads in their new order."""
    new = {name: np.array(value) for name, value in moments._asdict().items()}
    for layer, first in by_layer.items():
        order = _order(first, moments.mean_k.shape[1])
        for name in new.keys() - {"tokens"}:
            new[name][layer] = new[name][layer][order]
    return Moments(**new)


def rows_in_order(rows: Sequence[Mapping[str, Any]], by_layer: ByLayer, num_kv: int) -> list[dict[str, Any]]:
    """The rows of `Calibrated.layers` for the model with exact heads: in the new order, and they have no error.

    Layers whose heads are all exact have no row, as they are not replaced.
    """
    new = []
    for row in rows:
        first = by_layer.get(row["layer"], ())
        if len(first) == num_kv:
            continue
        errors = {name: np.array(value) for name, value in row.items() if isinstance(value, list)}
        for name, value in errors.items():
            value = value[_with_groups(_order(first, num_kv), len(value))]
            value[: len(first) * len(value) // num_kv] = 0
            errors[name] = value
        new.append({**row, **{name: value.tolist() for name, value in errors.items()}})
    return new


def _order(first: Sequence[int], num_kv: int) -> Int[np.ndarray, "hkv"]:
    """The numbers that the key/value heads had before."""
    return np.array([*first, *(head for head in range(num_kv) if head not in first)])


def _with_groups(order: Int[np.ndarray, "hkv"], heads: int) -> Int[np.ndarray, "hq"]:
    """The same of the query heads, which go with their key/value head."""
    group = np.arange(heads // len(order))
    return np.asarray(order[:, None] * len(group) + group).ravel()
