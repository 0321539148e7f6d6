"""AdamW with a separate learning rate for the geometry."""

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx

from darkformer_jax.model.network import Network, is_geometry
from darkformer_jax.model.trainable import split_params, trained_paths

MODEL, GEOMETRY = "model", "geometry"


def make_schedule(optimizer: ml_collections.ConfigDict, num_steps: int, peak: float) -> optax.Schedule:
    """Linear warm-up to `peak`, then cosine to final_fraction * peak at num_steps, peak sqrt(warm-up / step), or flat.

    Its argument is the number of earlier updates: the first update is step 1 of the warm-up.
    """
    warmup = optimizer.warmup_steps

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(count, jnp.float32) + 1.0
        rising = step / max(warmup, 1)
        if optimizer.schedule == "rsqrt":
            after = jnp.sqrt(max(warmup, 1) / step)
        elif optimizer.schedule == "cosine":
            progress = jnp.clip((step - warmup) / max(num_steps - warmup, 1), 0.0, 1.0)
            fall = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
            after = optimizer.final_fraction + (1.0 - optimizer.final_fraction) * fall
        else:
            after = jnp.ones_like(step)
        return peak * jnp.where(step < warmup, rising, after)

    return schedule


def make_optimizer(
    optimizer: ml_collections.ConfigDict, num_steps: int, network: Network
) -> optax.GradientTransformation:
    """Clipping by the global norm, Adam, decoupled weight decay of matrices, and a separate learning rate for M.

    M, learned projections, norms and biases are never decayed. The transformation applies to the parameters that
    `optimizer.train` trains, as `split_params` separates them. Frozen parameters have no moments and no decay, and do
    not count in the norm that is clipped.

    Raises:
      UserError: the model has nothing that `optimizer.train` trains.
    """
    trained = trained_paths(network, optimizer.train)
    labels = network.map_params(lambda _, variable: GEOMETRY if is_geometry(variable) else MODEL)

    def is_matrix(path: tuple, variable: nnx.Variable) -> bool:
        return path[-1] != "bias" and len(variable.get_metadata()["axes"]) > 1 and not is_geometry(variable)

    labels, _ = split_params(labels, trained)
    decayed, _ = split_params(network.map_params(is_matrix), trained)
    rates = {
        MODEL: optax.scale_by_learning_rate(make_schedule(optimizer, num_steps, optimizer.learning_rate)),
        GEOMETRY: optax.scale_by_learning_rate(make_schedule(optimizer, num_steps, optimizer.geometry_learning_rate)),
    }
    parts = [optax.clip_by_global_norm(optimizer.clip_norm)] if optimizer.clip_norm else []
    parts += [
        optax.scale_by_adam(b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps),
        optax.add_decayed_weights(optimizer.weight_decay, mask=decayed),
        optax.partition(rates, labels),
    ]
    return optax.chain(*parts)
