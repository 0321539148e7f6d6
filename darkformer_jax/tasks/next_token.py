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
from darkformer_jax.model.token_loss import LossFactors, Predictions, TokenFigures, token_figures, token_loss
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
        states, errors, taught = self._states(model, batch, constants)
        factors = LossFactors(1.0 - self.teacher_weight - self.hidden_weight, self.z_loss, self.teacher_weight)
        predictions = Predictions(states, model.unembedding)
        loss, figures = token_loss(predictions, batch["targets"], batch["weights"], factors, taught)
        sums = token_sums(figures, batch)
        if errors is not None:
            sums["hidden"] = jnp.sum(batch["weights"] * errors)
            loss += self.hidden_weight * sums["hidden"]
        return loss, sums

    def _states(
        self, model: Transformer, batch: Batch, constants: Any
    ) -> tuple[Array, Float[Array, "b n"] | None, Predictions | None]:
        """(the output of the final norm, each token's error of the hidden states, the teacher's predictions).

        What the loss does not learn from is None.
        """
        if self.teacher is None:
            return _states(model, batch), None, None
        teacher = self.teacher.bind(*constants)
        if not self.hidden_weight:
            return _states(model, batch), None, Predictions(_states(teacher, batch), teacher.unembedding)
        theirs, targets = hidden_states(teacher, batch)
        states, errors = matched(model, batch, targets)
        return states, errors, Predictions(theirs, teacher.unembedding) if self.teacher_weight else None

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
        figures = predict(model, batch)
        return token_sums(figures, batch), row_sums(figures, batch) if "source" in batch else {}

    def describe(self) -> Mapping[str, str]:
        """No rows: the model's sizes say everything."""
        return {}


def predict(model: Transformer, batch: Batch) -> TokenFigures:
    """What the model says of every target of a batch."""
    return token_figures(Predictions(_states(model, batch), model.unembedding), batch["targets"])


def _states(model: Transformer, batch: Batch) -> Float[Array, "b n embed"]:
    return model.hidden(batch["inputs"], batch["segment_ids"], batch["positions"])[0]


def token_values(figures: TokenFigures, batch: Batch) -> dict[str, Float[Array, "b n"]]:
    """Each token's part of the sums; 0 if it is not real.

    `nll` (nats), `z` (squared log normaliser), `correct`, `weight`, and `distill` (nats) if there is a teacher.
    """
    weights = batch["weights"]
    correct = (figures.best == batch["targets"]).astype(jnp.float32)
    values = {
        "nll": weights * figures.nll,
        "z": weights * jnp.square(figures.log_normalizer),
        "correct": weights * correct,
        "weight": weights,
    }
    return values if figures.divergence is None else values | {"distill": weights * figures.divergence}


def token_sums(figures: TokenFigures, batch: Batch) -> Sums:
    """`token_values`, summed over a batch."""
    return {name: jnp.sum(values) for name, values in token_values(figures, batch).items()}


def row_sums(figures: TokenFigures, batch: Batch) -> dict[str, Array]:
    """`nll` (nats) and `weight` summed over each row's real tokens, and the row's `source`, each [b]."""
    values = token_values(figures, batch)
    return {name: jnp.sum(values[name], axis=1) for name in ("nll", "weight")} | {"source": batch["source"]}
