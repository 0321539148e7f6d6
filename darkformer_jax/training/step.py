"""The state of a run, and the pure functions that advance and measure it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import serialization
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from darkformer_jax.model.network import Network, variable_sharding
from darkformer_jax.model.trainable import Paths, join_params, split_params
from darkformer_jax.ops.keys import key_of_seed
from darkformer_jax.tasks.task import Batch, Objective, Sums

Metrics = dict[str, Array]
OF_THE_UPDATE = ("grad_norm", "learning_rate")  # the metrics that do not come from the objective


class TrainState(NamedTuple):
    """Everything that changes while a run trains; the batch of a step is a function of (seed, step).

    The same structure holds the shapes of these arrays, or their shardings.
    """

    step: Any  # optimizer updates made, int32
    params: dict
    projections: dict
    optimizer: Any


def make_state_init(
    network: Network, optimizer: optax.GradientTransformation, seed: int, trained: Paths
) -> Callable[[], TrainState]:
    """() -> the state before the first step. trained: the parameters that the optimizer updates."""

    def init() -> TrainState:
        params, projections = network.init(key_of_seed(seed))
        return TrainState(
            jnp.zeros((), jnp.int32), params, projections, optimizer.init(split_params(params, trained)[0])
        )

    return init


def state_shardings(
    network: Network,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    mesh: Mesh,
    trained: Paths,
) -> TrainState:
    """The sharding of every array: parameters by their logical axes, Adam's moments like their parameter.

    Raises:
      UserError: the mesh does not divide an array.
    """
    sharding = functools.partial(variable_sharding, mesh=mesh)
    everywhere = NamedSharding(mesh, P())
    params = network.map_params(sharding)
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, spec: spec,
        abstract.optimizer,
        split_params(params, trained)[0],
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, params, network.map_projections(sharding), moments)


def to_saved(state: TrainState) -> dict:
    """The nested dicts of arrays that a checkpoint holds."""
    saved = {"step": state.step, "params": state.params, "optimizer": serialization.to_state_dict(state.optimizer)}
    saved["projections"] = state.projections
    return _without_empty(saved)


def from_saved(saved: dict, like: TrainState) -> TrainState:
    """The inverse of `to_saved`. `like` is any state of the same structure, which may be abstract."""
    full = _with_empty(saved, to_full(like))
    optimizer = serialization.from_state_dict(like.optimizer, full["optimizer"])
    return TrainState(full["step"], full["params"], full["projections"], optimizer)


def to_full(state: TrainState) -> dict:
    """`to_saved` with the empty dicts that a checkpoint cannot hold."""
    optimizer = serialization.to_state_dict(state.optimizer)
    return {"step": state.step, "params": state.params, "optimizer": optimizer, "projections": state.projections}


def _without_empty(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    kept = {name: _without_empty(value) for name, value in tree.items()}
    return {name: value for name, value in kept.items() if not (isinstance(value, dict) and not value)}


def _with_empty(saved: Any, like: Any) -> Any:
    if not isinstance(like, dict):
        return saved
    return {name: _with_empty(saved.get(name, {}), value) for name, value in like.items()}


def make_train_step(
    network: Network,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    accumulation_steps: int,
    redraw_every: int,
    trained: Paths,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """(state, batch, the task's constants) -> (state, metrics).

    Loss and gradients are summed over micro-batches and divided by the total weight, such as the number of real tokens.

    trained: the parameters that the optimizer updates. No gradient is computed for the others.
    """

    def loss(learned: dict, fixed: tuple[dict, dict, Any], batch: Batch) -> tuple[Float[Array, ""], Sums]:
        frozen, projections, constants = fixed
        return objective.loss(network.bind(join_params(learned, frozen), projections), batch, constants)

    gradient = jax.grad(loss, has_aux=True)

    def gradient_sums(learned: dict, fixed: tuple[dict, dict, Any], batch: Batch) -> tuple[dict, Sums]:
        if accumulation_steps == 1:
            return gradient(learned, fixed, batch)
        # Rows a, a + A, a + 2A, ... are micro-batch a: each device keeps the rows it has.
        micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulation_steps, *x.shape[1:]), 1, 0), batch)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(gradient, learned, fixed, jax.tree.map(lambda x: x[0], micro)),
        )

        def add(total: tuple[dict, Sums], part: Batch) -> tuple[tuple[dict, Sums], None]:
            return jax.tree.map(jnp.add, total, gradient(learned, fixed, part)), None

        return jax.lax.scan(add, zeros, micro)[0]

    def train_step(state: TrainState, batch: Batch, constants: Any = None) -> tuple[TrainState, Metrics]:
        projections = state.projections
        if redraw_every:
            projections = jax.lax.cond(
                (state.step % redraw_every == 0) & (state.step > 0),
                lambda old: network.redraw(old, state.step // redraw_every),
                lambda old: old,
                projections,
            )
        learned, frozen = split_params(state.params, trained)
        gradients, sums = gradient_sums(learned, (frozen, projections, constants), batch)
        total = jnp.maximum(sums["weight"], 1.0)  # so that a batch of only padding has gradient 0, not NaN
        gradients = jax.tree.map(lambda g: g / total, gradients)
        updates, moments = optimizer.update(gradients, state.optimizer, learned)
        metrics = objective.metrics(sums, total) | {
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": schedule(state.step),
        }
        params = join_params(optax.apply_updates(learned, updates), frozen)
        return TrainState(state.step + 1, params, projections, moments), metrics

    return train_step
