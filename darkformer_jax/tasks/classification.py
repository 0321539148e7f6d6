"""Classification of whole texts: which of the classes that the training labels name."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jaxtyping import Array, Float

from darkformer_jax.data.labelled import (
    LABELS_FILE,
    Example,
    class_labels,
    class_names,
    load_class_names,
    save_class_names,
)
from darkformer_jax.errors import UserError
from darkformer_jax.model.transformer import Transformer
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.labelled import LabelledTask, labelled_shapes
from darkformer_jax.tasks.scores import ClassScores, class_scores, count_pairs
from darkformer_jax.tasks.table import table_lines
from darkformer_jax.tasks.task import Batch, Sums

_CLASSES_PER_LINE = 12


class ClassEvaluation(NamedTuple):
    """What a classifier makes of held-out examples.

    Attributes:
      loss: nats per example.
      scores: see there.
      confusion: [C, C], examples of class i that were taken for class j.
      names: of the C classes.
    """

    loss: float
    scores: ClassScores
    confusion: np.ndarray
    names: tuple[str, ...]

    @property
    def size(self) -> str:
        """What was classified."""
        return f"{int(self.confusion.sum()):,} examples"

    @property
    def row(self) -> ClassScores:
        """The scores."""
        return self.scores

    def as_metrics(self) -> dict[str, float]:
        """Names for metrics.jsonl."""
        return {f"heldout_{name}": value for name, value in {"loss": self.loss, **self.scores._asdict()}.items()}

    def as_result(self) -> dict[str, Any]:
        """With the classes' names and the confusion."""
        counts = self.confusion.astype(int).tolist()
        return {"loss": self.loss, **self.scores._asdict(), "labels": list(self.names), "confusion": counts}

    def details(self) -> list[str]:
        """The confusion as a table; without it where there are too many classes for a line."""
        if len(self.names) > _CLASSES_PER_LINE:
            return []
        cells = [[f"{count:,}" for count in counts] for counts in self.confusion.astype(int).tolist()]
        rows = [[name, *counts] for name, counts in zip(self.names, cells, strict=True)]
        return table_lines([["true \\ taken for", *self.names], *rows])

    def __str__(self) -> str:
        accuracy, f1, matthews = self.scores
        f1_name = f1_of(self.names)
        return f"loss {self.loss:.4f}  accuracy {100 * accuracy:.2f}%  {f1_name} {f1:.4f}  Matthews {matthews:.4f}"


@dataclasses.dataclass(frozen=True)
class Classes:
    """The objective of a classification; see `tasks.labelled.LabelledObjective`.

    Its loss is the cross-entropy, mean over examples.

    Attributes:
      vocab_size: ids of the tokenizer.
      sequence_length: tokens of a row.
      names: of the classes, in the order of the model's outputs.
    """

    vocab_size: int
    sequence_length: int
    names: tuple[str, ...]

    @property
    def num_outputs(self) -> int:
        """A logit per class."""
        return len(self.names)

    def batch_shapes(self, num_rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """A label is the number of its class."""
        return labelled_shapes(num_rows, self.sequence_length, jnp.int32)

    def loss(self, model: Transformer, batch: Batch, constants: Any) -> tuple[Float[Array, ""], Sums]:
        """`nll` (nats) and `correct`, summed over examples."""
        logits, nll = _predict(model, batch)
        correct = (jnp.argmax(logits, axis=-1) == batch["labels"]).astype(jnp.float32)
        weights = batch["weights"]
        return nll, {"nll": nll, "correct": jnp.sum(weights * correct), "weight": jnp.sum(weights)}

    def metrics(self, sums: Sums, weight: Float[Array, ""]) -> dict[str, Array]:
        """Means over the batch."""
        return {"loss": sums["nll"] / weight, "accuracy": sums["correct"] / weight, "examples": sums["weight"]}

    def measure(self, model: Transformer, batch: Batch) -> tuple[Sums, dict[str, Array]]:
        """`nll`, and `confusion` [C, C]: how many examples of class i were taken for class j."""
        logits, nll = _predict(model, batch)
        none = jnp.zeros((self.num_outputs, self.num_outputs), jnp.float32)
        confusion = none.at[batch["labels"], jnp.argmax(logits, axis=-1)].add(batch["weights"])
        return {"nll": nll, "confusion": confusion, "weight": jnp.sum(batch["weights"])}, {}

    def describe(self) -> Mapping[str, str]:
        """How many classes there are."""
        return {"classes": f"{self.num_outputs:,}"}

    def labels(self, examples: Sequence[Example]) -> np.ndarray:
        """The classes' numbers."""
        return class_labels(examples, self.names)

    def evaluation(self, sums: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray]) -> ClassEvaluation:
        """All figures are of sums."""
        loss = float(sums["nll"]) / max(float(sums["weight"]), 1.0)
        return ClassEvaluation(loss, class_scores(sums["confusion"]), sums["confusion"], self.names)

    @property
    def table_head(self) -> tuple[str, ...]:
        """As `ClassScores`."""
        return "accuracy", f1_of(self.names), "Matthews"

    def judge(self, labels: np.ndarray, predicted: np.ndarray) -> ClassScores:
        """The scores."""
        return class_scores(count_pairs(labels, predicted, self.num_outputs))

    def constant(self, labels: np.ndarray) -> tuple[str, float]:
        """The most frequent class."""
        commonest = int(np.argmax(np.bincount(labels, minlength=self.num_outputs)))
        return repr(self.names[commonest]), commonest


class Classification(LabelledTask[Classes, ClassEvaluation]):
    """Which class a text is of. The classes' names are saved in labels.json, and a resumed run has the same."""

    @classmethod
    def make_objective(cls, config: ml_collections.ConfigDict, vocab_size: int, training: Sequence[Example]) -> Classes:
        """Of the training labels' names."""
        return Classes(vocab_size, config.sequence_length, class_names(training))

    @classmethod
    def trained_objective(cls, config: ml_collections.ConfigDict, vocab_size: int, workdir: Workdir) -> Classes:
        """Of the names in labels.json."""
        return Classes(vocab_size, config.sequence_length, load_class_names(workdir.local))

    @classmethod
    def load(cls, config: ml_collections.ConfigDict, workdir: Workdir) -> "Classification":
        """Also compares the classes with those that the run began with."""
        task = super().load(config, workdir)
        names = task.objective.names
        if (workdir / LABELS_FILE).exists() and (saved := load_class_names(workdir.local)) != names:
            raise UserError(
                f"workdir {workdir} was trained on the labels {', '.join(saved)}; {config.data.files} has "
                f"{', '.join(names)}: use a new workdir or bring the data back"
            )
        return task

    def save(self, workdir: Workdir) -> None:
        """The tokenizer and the classes' names, where there are none yet."""
        super().save(workdir)
        if not (workdir / LABELS_FILE).exists():
            save_class_names(workdir.local, self.objective.names)


def f1_of(names: Sequence[str]) -> str:
    """What `ClassScores.f1` is of these classes."""
    return f"F1 of {names[1]!r}" if len(names) == 2 else "macro F1"


def _predict(model: Transformer, batch: Batch) -> tuple[Float[Array, "b classes"], Float[Array, ""]]:
    """Logits, and the sum of the cross-entropies in nats."""
    logits = model.outputs(batch["inputs"], batch["segment_ids"], batch["positions"])
    nll = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return logits, jnp.sum(batch["weights"] * nll)
