"""Matching a teacher's hidden states: what each block gives is a target of the student's block of the same number.

The student's blocks get the student's own inputs, so that they learn to make up for the errors of the blocks before
them. Gradients flow through all of them: a block also learns what helps the blocks behind it (docs/finetuning.md
compares this with gradients that stop at each block's input).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from darkformer_jax.model.transformer import Transformer
from darkformer_jax.tasks.task import Batch


def hidden_states(model: Transformer, batch: Batch) -> tuple[Array, Float[Array, "layers b n embed"]]:
    """(the output of the final norm, the output of every block)."""
    return model.observed(*_inputs(batch), lambda x, _: x)


def matched(
    model: Transformer, batch: Batch, targets: Float[Array, "layers b n embed"]
) -> tuple[Array, Float[Array, "b n"]]:
    """(the output of the final norm, the mean over layers of each token's |h - target|^2 / |target|^2).

    The errors are float32, and 0 where a token has no weight. Of the student's hidden states, only one layer's exist at
    a time, besides what gradients need.
    """
    weights = batch["weights"]

    def observe(x: Array, target: Array) -> Array:
        return relative_squared_errors(x, target, weights)

    x, errors = model.observed(*_inputs(batch), observe, targets)
    return x, jnp.mean(errors, axis=0)


def relative_squared_errors(
    x: Float[Array, "b n embed"], target: Float[Array, "b n embed"], weights: Float[Array, "b n"]
) -> Float[Array, "b n"]:
    """|x - target|^2 / |target|^2 of each token in float32; 0 where the weight is 0."""
    x, target = x.astype(jnp.float32), target.astype(jnp.float32)
    is_real = weights > 0
    sizes = jnp.where(is_real, jnp.sum(jnp.square(target), axis=-1), 1.0)
    return jnp.where(is_real, jnp.sum(jnp.square(x - target), axis=-1), 0.0) / sizes


def _inputs(batch: Batch) -> tuple[Array, Array, Array]:
    return batch["inputs"], batch["segment_ids"], batch["positions"]
