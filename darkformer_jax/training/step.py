"""The state of a run, and the pure functions that advance and measure it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import serialization
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from darkformer_jax.model import Network, logical_axes
from darkformer_jax.sharding import sharding_of
from darkformer_jax.training.regimes import Paths, join_params, split_params

Batch = dict[str, Array]  # see darkformer_jax.data.batches
Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """All that a run is, beside its config: the batch of a step and its projections are functions of (seed, step).

    The same structure serves for the shapes and for the shardings of these arrays.
    """

    step: Any  # optimizer updates made, int32
    params: dict
    projections: dict
    optimizer: Any


def make_state_init(
    network: Network, optimizer: optax.GradientTransformation, seed: int, trained: Paths | None = None
) -> Callable[[], TrainState]:
    """() -> the state before the first step. trained: the parameters that the optimizer is of; None = all."""

    def init() -> TrainState:
        params, projections = network.init(jax.random.key(seed))
        return TrainState(
            jnp.zeros((), jnp.int32), params, projections, optimizer.init(split_params(params, trained)[0])
        )

    return init


def state_shardings(
    network: Network,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    mesh: Mesh,
    trained: Paths | None = None,
) -> TrainState:
    """The sharding of every array: parameters by their logical axes, Adam's moments like their parameter.

    Raises:
      UserError: an array that the mesh does not divide.
    """

    def sharding(path: tuple, variable: Any) -> NamedSharding:
        return sharding_of("/".join(map(str, path)), logical_axes(variable), variable.shape, mesh)

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
    """Nested dicts of arrays, what a checkpoint holds."""
    saved = {"step": state.step, "params": state.params, "optimizer": serialization.to_state_dict(state.optimizer)}
    saved["projections"] = state.projections
    return _without_empty(saved)


def from_saved(saved: dict, like: TrainState) -> TrainState:
    """The inverse of `to_saved`; `like` is any state of the same structure, abstract ones included."""
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


def loss_sums(network: Network, params: dict, projections: dict, batch: Batch) -> Metrics:
    """Sums over a batch's real tokens: `nll` (nats), `z` (squared log normaliser), `correct`, and their `weight`."""
    logits, _ = network.bind(params, projections)(batch["inputs"], batch["segment_ids"], batch["positions"])
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    weights = batch["weights"]
    correct = (jnp.argmax(logits, axis=-1) == batch["targets"]).astype(jnp.float32)
    return {
        "nll": jnp.sum(weights * (log_normalizer - target_logits)),
        "z": jnp.sum(weights * jnp.square(log_normalizer)),
        "correct": jnp.sum(weights * correct),
        "weight": jnp.sum(weights),
    }


def make_train_step(
    network: Network,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    accumulation_steps: int,
    z_loss: float,
    redraw_every: int,
    trained: Paths | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """(state, batch) -> (state, metrics). Loss and gradients: sums over micro-batches over the total of real tokens.

    trained: the parameters that the optimizer is of (None = all). Of the others no gradient is computed.
    """

    def objective(learned: dict, frozen: dict, projections: dict, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        sums = loss_sums(network, join_params(learned, frozen), projections, batch)
        return sums["nll"] + z_loss * sums["z"], sums

    gradient = jax.grad(objective, has_aux=True)

    def gradient_sums(learned: dict, frozen: dict, projections: dict, batch: Batch) -> tuple[dict, Metrics]:
        if accumulation_steps == 1:
            return gradient(learned, frozen, projections, batch)
        # Rows a, a + A, a + 2A, ... are micro-batch a: each device keeps the rows it has.
        micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulation_steps, *x.shape[1:]), 1, 0), batch)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(gradient, learned, frozen, projections, jax.tree.map(lambda x: x[0], micro)),
        )

        def add(total: tuple[dict, Metrics], part: Batch) -> tuple[tuple[dict, Metrics], None]:
            return jax.tree.map(jnp.add, total, gradient(learned, frozen, projections, part)), None

        return jax.lax.scan(add, zeros, micro)[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        projections = state.projections
        if redraw_every:
            projections = jax.lax.cond(
                (state.step % redraw_every == 0) & (state.step > 0),
                lambda old: network.redraw(old, state.step // redraw_every),
                lambda old: old,
                projections,
            )
        learned, frozen = split_params(state.params, trained)
        gradients, sums = gradient_sums(learned, frozen, projections, batch)
        total = jnp.maximum(sums["weight"], 1.0)  # a batch of padding alone has no gradient, and no NaN
        gradients = jax.tree.map(lambda g: g / total, gradients)
        updates, moments = optimizer.update(gradients, state.optimizer, learned)
        metrics = {
            "loss": sums["nll"] / total,
            "accuracy": sums["correct"] / total,
            "z_loss": z_loss * sums["z"] / total,
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": schedule(state.step),
            "tokens": sums["weight"],
        }
        params = join_params(optax.apply_updates(learned, updates), frozen)
        return TrainState(state.step + 1, params, projections, moments), metrics

    return train_step
