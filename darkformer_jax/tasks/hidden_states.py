"""Matching a teacher's hidden states: each layer's output is a target of the student's, on the student's own inputs."""

import os

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from darkformer_jax.model.transformer import Transformer
from darkformer_jax.tasks.task import Batch

STOP = os.environ.get("LIN_STOP") == "1"


def hidden_states(model: Transformer, batch: Batch) -> tuple[Array, Float[Array, "layers b n embed"]]:
    """(the output of the final norm, the output of every block)."""
    places = batch["inputs"], batch["segment_ids"], batch["positions"]
    return model.observed(*places, lambda x, _: (x, x))


def matched(
    model: Transformer, batch: Batch, targets: Float[Array, "layers b n embed"]
) -> tuple[Array, Float[Array, "b n"]]:
    """(the output of the final norm, the mean over layers of each token's relative squared error)."""
    weights = batch["weights"]

    def observe(x: Array, target: Array) -> tuple[Array, Array]:
        error = relative_squared_error(x, target, weights)
        return (jax.lax.stop_gradient(x) if STOP else x), error

    places = batch["inputs"], batch["segment_ids"], batch["positions"]
    x, errors = model.observed(*places, observe, targets)
    return x, jnp.mean(errors, axis=0)


def relative_squared_error(x: Array, target: Array, weights: Array) -> Float[Array, "b n"]:
    """|x - target|^2 / |target|^2 of each token in float32; 0 where the weight is 0."""
    x, target = x.astype(jnp.float32), target.astype(jnp.float32)
    sizes = jnp.where(weights > 0, jnp.sum(jnp.square(target), axis=-1), 1.0)
    return jnp.where(weights > 0, jnp.sum(jnp.square(x - target), axis=-1), 0.0) / sizes
