"""Next-token prediction: the loss of a language model, which may also learn from a teacher.

The teacher is frozen. Its predictions are targets (distillation, Hinton et al., arXiv 1503.02531), its hidden states,
or both.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float

from darkformer_jax.model.network import Network
from darkformer_jax.model.transformer import Transformer
from darkformer_jax.tasks.hidden_states import hidden_states, matched
from darkformer_jax.tasks.task import Batch, Sums


@dataclasses.dataclass(frozen=True)
class NextToken:
    """The objective of a language model; see `tasks.task.Objective`.

    Its loss is (1 - w - v) cross-entropy + w KL(teacher || student) + v hidden + z_loss (log normaliser)^2, averaged
    over real tokens. `hidden` is the relative squared error of the hidden states (`tasks.hidden_states`).

    Attributes:
      vocab_size: number of the tokenizer's ids.
      sequence_length: tokens per row.
      z_loss: weight of the squared log normaliser.
      teacher: the loss gets its arrays as constants, (params, projections).
      teacher_weight: w.
      hidden_weight: v.
    """

    vocab_size: int
    sequence_length: int
    z_loss: float
    teacher: Network | None = None
    teacher_weight: float = 0.0
    hidden_weight: float = 0.0

    num_outputs = 0  # not a field
    weight_name: ClassVar[str] = "tokens"

    @classmethod
    def of(cls, config: ml_collections.ConfigDict, vocab_size: int, teacher: Network | None = None) -> "NextToken":
        """The objective for a config and the tokenizer's number of ids."""
        weights = (config.distill.weight, config.distill.hidden_weight) if teacher else (0.0, 0.0)
        return cls(vocab_size, config.sequence_length, config.optimizer.z_loss, teacher, *weights)

    def batch_shapes(self, num_rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a batch of darkformer_jax.data.batches."""
        shape = (num_rows, self.sequence_length)
        ids = ("inputs", "targets", "segment_ids", "positions")
        return {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ids} | {
            "weights": jax.ShapeDtypeStruct(shape, jnp.float32)
        }

    def loss(self, model: Transformer, batch: Batch, constants: Any) -> tuple[Float[Array, ""], Sums]:
        """The loss, and `token_sums`. With a teacher, the sums of what it teaches are there, too, as far as they count:

        `distill`, the divergences from its predictions in nats, and `hidden`, the relative squared errors.
        """
        if self.teacher is None:
            sums = token_sums(predict(model, batch), batch)
            return sums["nll"] + self.z_loss * sums["z"], sums
        sums = self._taught(model, batch, self.teacher.bind(*constants))
        of_text = 1.0 - self.teacher_weight - self.hidden_weight
        factors = {"nll": of_text, "distill": self.teacher_weight, "hidden": self.hidden_weight, "z": self.z_loss}
        # What has no part in the loss is left out, so that no gradient of it is computed.
        return sum((factor * sums[name] for name, factor in factors.items() if factor), jnp.zeros(())), sums

    def _taught(self, model: Transformer, batch: Batch, teacher: Transformer) -> Sums:
        """All sums of `loss` with a teacher."""
        if not self.hidden_weight:
            logits, wanted = predict(model, batch), predict(teacher, batch)
            return token_sums(logits, batch) | {"distill": _divergences(wanted, logits, batch)}
        theirs, targets = hidden_states(teacher, batch)
        hidden, errors = matched(model, batch, targets)
        logits = model.logits(hidden)
        sums = token_sums(logits, batch) | {"hidden": jnp.sum(batch["weights"] * errors)}
        if self.teacher_weight:
            sums["distill"] = _divergences(teacher.logits(theirs), logits, batch)
        return sums

    def metrics(self, sums: Sums, weight: Float[Array, ""]) -> dict[str, Array]:
        """Means over the batch. `loss` is the cross-entropy even with a teacher, so that runs can be compared."""
        metrics = {
            "loss": sums["nll"] / weight,
            "accuracy": sums["correct"] / weight,
            "z_loss": self.z_loss * sums["z"] / weight,
            "tokens": sums["weight"],
        }
        return metrics | {name: sums[name] / weight for name in ("distill", "hidden") if name in sums}

    def measure(self, model: Transformer, batch: Batch) -> tuple[Sums, dict[str, Array]]:
        """`token_sums`. Rows of a mixture have the values `nll`, `weight` and `source`; others have none."""
        logits = predict(model, batch)
        return token_sums(logits, batch), row_sums(logits, batch) if "source" in batch else {}

    def describe(self) -> Mapping[str, str]:
        """No rows: the model's sizes say everything."""
        return {}


def predict(model: Transformer, batch: Batch) -> Float[Array, "b n vocab"]:
    """The logits of a batch."""
    logits, _ = model(batch["inputs"], batch["segment_ids"], batch["positions"])
    return logits


def token_sums(logits: Float[Array, "b n vocab"], batch: Batch) -> Sums:
    """Sums over a batch's real tokens: `nll` (nats), `z` (squared log normaliser), `correct`, and their `weight`."""
    log_normalizer, target_logits = _log_normalizer_and_target(logits, batch)
    weights = batch["weights"]
    correct = (jnp.argmax(logits, axis=-1) == batch["targets"]).astype(jnp.float32)
    return {
        "nll": jnp.sum(weights * (log_normalizer - target_logits)),
        "z": jnp.sum(weights * jnp.square(log_normalizer)),
        "correct": jnp.sum(weights * correct),
        "weight": jnp.sum(weights),
    }


def row_sums(logits: Float[Array, "b n vocab"], batch: Batch) -> dict[str, Array]:
    """`nll` (nats) and `weight` summed over each row's real tokens, and the row's `source`, each [b]."""
    log_normalizer, target_logits = _log_normalizer_and_target(logits, batch)
    weights = batch["weights"]
    nll = jnp.sum(weights * (log_normalizer - target_logits), axis=1)
    return {"nll": nll, "weight": jnp.sum(weights, axis=1), "source": batch["source"]}


def _log_normalizer_and_target(
    logits: Float[Array, "b n vocab"], batch: Batch
) -> tuple[Float[Array, "b n"], Float[Array, "b n"]]:
    """The logarithm of the sum of exp(logits), and the logit of the target."""
    target_logits = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1), target_logits


def _divergences(
    wanted: Float[Array, "b n vocab"], logits: Float[Array, "b n vocab"], batch: Batch
) -> Float[Array, ""]:
    return jnp.sum(batch["weights"] * kl_divergence(jax.lax.stop_gradient(wanted), logits))


def kl_divergence(teacher: Float[Array, "... vocab"], student: Float[Array, "... vocab"]) -> Float[Array, "..."]:
    """KL(teacher || student) = sum_v p_v (log p_v - log q_v) of two arrays of logits, in nats."""
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
