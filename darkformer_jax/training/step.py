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
    return token_sums(predict(network, params, projections, batch), batch)


def predict(network: Network, params: dict, projections: dict, batch: Batch) -> Float[Array, "b n vocab"]:
    """The logits of a batch."""
    logits, _ = network.bind(params, projections)(batch["inputs"], batch["segment_ids"], batch["positions"])
    return logits


def token_sums(logits: Float[Array, "b n vocab"], batch: Batch) -> Metrics:
    """What `loss_sums` returns, of given logits."""
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


def kl_divergence(teacher: Float[Array, "... vocab"], student: Float[Array, "... vocab"]) -> Float[Array, "..."]:
    """KL(teacher || student) = sum_v p_v (log p_v - log q_v) of two arrays of logits, in nats."""
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


class Distillation(NamedTuple):
    """What makes the loss (1 - weight) cross-entropy + weight KL(teacher || student), means over real tokens."""

    teacher: Network
    weight: float


def _make_objective(network: Network, z_loss: float, distillation: Distillation | None) -> Callable[..., Any]:
    """(trained, (frozen, projections, the teacher's arrays), batch) -> (the sum to minimise, sums to report)."""

    def objective(learned: dict, fixed: tuple[dict, dict, Any], batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        frozen, projections, teacher = fixed
        logits = predict(network, join_params(learned, frozen), projections, batch)
        sums = token_sums(logits, batch)
        loss = sums["nll"]
        if distillation is not None:
            wanted = jax.lax.stop_gradient(predict(distillation.teacher, teacher[0], teacher[1], batch))
            sums["distill"] = jnp.sum(batch["weights"] * kl_divergence(wanted, logits))
            loss = (1.0 - distillation.weight) * loss + distillation.weight * sums["distill"]
        return loss + z_loss * sums["z"], sums

    return objective


def make_train_step(
    network: Network,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    accumulation_steps: int,
    z_loss: float,
    redraw_every: int,
    trained: Paths | None = None,
    distillation: Distillation | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """(state, batch) -> (state, metrics); with a distillation (state, batch, (params, projections) of the teacher).

    Loss and gradients are sums over micro-batches over the total of real tokens. The `loss` of metrics is the
    cross-entropy, distilled or not, so that runs compare; `distill` is the divergence.

    trained: the parameters that the optimizer is of (None = all). Of the others no gradient is computed.
    """
    gradient = jax.grad(_make_objective(network, z_loss, distillation), has_aux=True)

    def gradient_sums(learned: dict, fixed: tuple[dict, dict, Any], batch: Batch) -> tuple[dict, Metrics]:
        if accumulation_steps == 1:
            return gradient(learned, fixed, batch)
        # Rows a, a + A, a + 2A, ... are micro-batch a: each device keeps the rows it has.
        micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulation_steps, *x.shape[1:]), 1, 0), batch)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(gradient, learned, fixed, jax.tree.map(lambda x: x[0], micro)),
        )

        def add(total: tuple[dict, Metrics], part: Batch) -> tuple[tuple[dict, Metrics], None]:
            return jax.tree.map(jnp.add, total, gradient(learned, fixed, part)), None

        return jax.lax.scan(add, zeros, micro)[0]

    def train_step(state: TrainState, batch: Batch, teacher: Any = None) -> tuple[TrainState, Metrics]:
        projections = state.projections
        if redraw_every:
            projections = jax.lax.cond(
                (state.step % redraw_every == 0) & (state.step > 0),
                lambda old: network.redraw(old, state.step // redraw_every),
                lambda old: old,
                projections,
            )
        learned, frozen = split_params(state.params, trained)
        gradients, sums = gradient_sums(learned, (frozen, projections, teacher), batch)
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
        if distillation is not None:
            metrics["distill"] = sums["distill"] / total
        params = join_params(optax.apply_updates(learned, updates), frozen)
        return TrainState(state.step + 1, params, projections, moments), metrics

    return train_step
