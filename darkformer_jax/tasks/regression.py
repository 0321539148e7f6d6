"""Regression on whole texts: one number for each, judged by its correlation with the labels."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
    """What a regression makes of held-out examples.

    Attributes:
      loss: mean squared error.
      correlations: see there.
      examples: how many.
    """

    loss: float
    correlations: Correlations
    examples: int

    @property
    def size(self) -> str:
        """What was predicted."""
        return f"{self.examples:,} examples"

    @property
    def row(self) -> tuple[float, ...]:
        """As in metrics.jsonl."""
        return self.loss, *self.correlations

    def as_metrics(self) -> dict[str, float]:
        """Names for metrics.jsonl."""
        return {f"heldout_{name}": value for name, value in self.as_result().items()}

    def as_result(self) -> dict[str, Any]:
        """The same without `heldout_`."""
        return {"loss": self.loss, **self.correlations._asdict()}

    def details(self) -> list[str]:
        """None."""
        return []

    def __str__(self) -> str:
        return "squared error {:.4f}  Pearson {:.4f}  Spearman {:.4f}".format(self.loss, *self.correlations)


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The objective of a regression; see `tasks.labelled.LabelledObjective`.

    Its loss is the squared error, mean over examples.

    Attributes:
      vocab_size: ids of the tokenizer.
      sequence_length: tokens of a row.
    """

    vocab_size: int
    sequence_length: int

    num_outputs = 1  # not a field
    table_head = ("squared error", "Pearson", "Spearman")

    def batch_shapes(self, num_rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """A label is a number."""
        return labelled_shapes(num_rows, self.sequence_length, jnp.float32)

    def loss(self, model: Transformer, batch: Batch, constants: Any) -> tuple[Float[Array, ""], Sums]:
        """`squared_error`, summed over examples."""
        sums, _ = self.measure(model, batch)
        return sums["squared_error"], sums

    def metrics(self, sums: Sums, weight: Float[Array, ""]) -> dict[str, Array]:
        """Means over the batch."""
        return {"loss": sums["squared_error"] / weight, "examples": sums["weight"]}

    def measure(self, model: Transformer, batch: Batch) -> tuple[Sums, dict[str, Array]]:
        """`squared_error`; and of each row its prediction, label and weight, because ranks are no sums."""
        predicted = model.outputs(batch["inputs"], batch["segment_ids"], batch["positions"])[:, 0]
        labels, weights = batch["labels"], batch["weights"]
        sums = {"squared_error": jnp.sum(weights * jnp.square(predicted - labels)), "weight": jnp.sum(weights)}
        return sums, {"predicted": predicted, "labels": labels, "weights": weights}

    def describe(self) -> Mapping[str, str]:
        """Nothing that the model's own sizes do not say."""
        return {}

    def labels(self, examples: Sequence[Example]) -> np.ndarray:
        """The labels' numbers."""
        return number_labels(examples)

    def evaluation(self, sums: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray]) -> NumberEvaluation:
        """Correlations of the rows that are no padding."""
        loss = float(sums["squared_error"]) / max(float(sums["weight"]), 1.0)
        is_real = rows["weights"] > 0
        correlated = correlations(rows["labels"][is_real], rows["predicted"][is_real])
        return NumberEvaluation(loss, correlated, int(is_real.sum()))

    def judge(self, labels: np.ndarray, predicted: np.ndarray) -> tuple[float, ...]:
        """Squared error and correlations."""
        return float(np.mean(np.square(predicted - labels))), *correlations(labels, predicted)

    def constant(self, labels: np.ndarray) -> tuple[str, float]:
        """The mean."""
        return "the mean", float(labels.mean())


class Regression(LabelledTask[Numbers, NumberEvaluation]):
    """Which number a text has."""

    @classmethod
    def make_objective(cls, config: ml_collections.ConfigDict, vocab_size: int, training: Sequence[Example]) -> Numbers:
        """Of sizes alone."""
        return Numbers(vocab_size, config.sequence_length)

    @classmethod
    def trained_objective(cls, config: ml_collections.ConfigDict, vocab_size: int, workdir: Workdir) -> Numbers:
        """Of sizes alone."""
        return Numbers(vocab_size, config.sequence_length)
