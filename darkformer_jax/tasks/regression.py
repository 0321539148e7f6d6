"""Regression on whole texts: one number per text, judged by its correlation with the label."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array, Float

from darkformer_jax.data.labelled import Example, number_labels
from darkformer_jax.model.transformer import Transformer
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.labelled import LabelledTask, labelled_shapes
from darkformer_jax.tasks.scores import Correlations, correlations
from darkformer_jax.tasks.task import Batch, Sums


class NumberEvaluation(NamedTuple):
    """The figures of a regression on held-out examples.

    Attributes:
      loss: mean squared error.
      correlations: Pearson and Spearman.
      examples: the number of examples.
    """

    loss: float
    correlations: Correlations
    examples: int

    @property
    def size(self) -> str:
        """How much was predicted."""
        return f"{self.examples:,} examples"

    @property
    def row(self) -> tuple[float, ...]:
        """The figures under `Numbers.table_head`."""
        return self.loss, *self.correlations

    def as_metrics(self) -> dict[str, float]:
        """The figures by their names in metrics.jsonl."""
        return {f"heldout_{name}": value for name, value in self.as_result().items()}

    def as_result(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {"loss": self.loss, **self.correlations._asdict()}

    def details(self) -> list[str]:
        """No lines."""
        return []

    def __str__(self) -> str:
        return "squared error {:.4f}  Pearson {:.4f}  Spearman {:.4f}".format(self.loss, *self.correlations)


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The objective of a regression; see `tasks.labelled.LabelledObjective`.

    Its loss is the squared error, averaged over examples.

    Attributes:
      vocab_size: number of the tokenizer's ids.
      sequence_length: tokens per row.
    """

    vocab_size: int
    sequence_length: int

    num_outputs = 1  # not a field
    weight_name: ClassVar[str] = "examples"
    table_head = ("squared error", "Pearson", "Spearman")

    def batch_shapes(self, num_rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a batch; a label is a number."""
        return labelled_shapes(num_rows, self.sequence_length, jnp.float32)

    def loss(self, model: Transformer, batch: Batch, constants: Any) -> tuple[Float[Array, ""], Sums]:
        """The squared error and the other sums over examples."""
        sums, _ = self.measure(model, batch)
        return sums["squared_error"], sums

    def metrics(self, sums: Sums, weight: Float[Array, ""]) -> dict[str, Array]:
        """Means over the batch."""
        return {"loss": sums["squared_error"] / weight, "examples": sums["weight"]}

    def measure(self, model: Transformer, batch: Batch) -> tuple[Sums, dict[str, Array]]:
        """`squared_error`, and each row's prediction, label and weight, because ranks cannot be summed."""
        predicted = model.outputs(batch["inputs"], batch["segment_ids"], batch["positions"])[:, 0]
        labels, weights = batch["labels"], batch["weights"]
        sums = {"squared_error": jnp.sum(weights * jnp.square(predicted - labels)), "weight": jnp.sum(weights)}
        return sums, {"predicted": predicted, "labels": labels, "weights": weights}

    def describe(self) -> Mapping[str, str]:
        """No rows: the model's sizes say everything."""
        return {}

    def labels(self, examples: Sequence[Example]) -> np.ndarray:
        """The labels as numbers."""
        return number_labels(examples)

    def evaluation(self, sums: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray]) -> NumberEvaluation:
        """The figures; correlations are over the rows that are not padding."""
        loss = float(sums["squared_error"]) / max(float(sums["weight"]), 1.0)
        is_real = rows["weights"] > 0
        correlated = correlations(rows["labels"][is_real], rows["predicted"][is_real])
        return NumberEvaluation(loss, correlated, int(is_real.sum()))

    def judge(self, labels: np.ndarray, predicted: np.ndarray) -> tuple[float, ...]:
        """The squared error and the correlations."""
        return float(np.mean(np.square(predicted.astype(np.float64) - labels))), *correlations(labels, predicted)

    def constant(self, labels: np.ndarray) -> tuple[str, float]:
        """The mean label."""
        return "the mean", float(labels.mean(dtype=np.float64))

    def answer(self, outputs: np.ndarray) -> dict[str, Any]:
        """The number."""
        return {"number": float(outputs[0])}


class Regression(LabelledTask[Numbers, NumberEvaluation]):
    """The task of predicting a number for each text."""

    loss_unit: ClassVar[str] = "squared units of the label"

    @classmethod
    def make_objective(cls, config: ml_collections.ConfigDict, vocab_size: int, training: Sequence[Example]) -> Numbers:
        """The objective, which depends on sizes alone."""
        return Numbers(vocab_size, config.sequence_length)

    @classmethod
    def trained_objective(cls, config: ml_collections.ConfigDict, vocab_size: int, workdir: Workdir) -> Numbers:
        """The objective, which depends on sizes alone."""
        return Numbers(vocab_size, config.sequence_length)
