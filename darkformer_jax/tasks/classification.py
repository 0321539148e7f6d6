"""Classification of whole texts into the classes that the training labels name."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import scipy.special
from jaxtyping import Array, Float

from darkformer_jax.data.labelled import (
    LABELS_FILE,
    Example,
    class_labels,
    class_names,
    load_class_names,
    save_class_names,
    shown_label,
)
from darkformer_jax.data.progress import ProgressBar, no_progress
from darkformer_jax.errors import UserError
from darkformer_jax.model.transformer import Transformer
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.labelled import LabelledTask, labelled_shapes
from darkformer_jax.tasks.scores import ClassScores, class_scores, count_pairs
from darkformer_jax.tasks.table import table_lines
from darkformer_jax.tasks.task import Batch, Sums

_CLASSES_PER_LINE = 12


class ClassEvaluation(NamedTuple):
    """The figures of a classifier on held-out examples.

    Attributes:
      loss: nats per example.
      scores: accuracy, F1 and Matthews.
      confusion: [C, C]; entry (i, j) counts the examples of class i that were taken for class j.
      names: the names of the C classes.
    """

    loss: float
    scores: ClassScores
    confusion: np.ndarray
    names: tuple[str, ...]

    @property
    def size(self) -> str:
        """How much was classified."""
        return f"{int(self.confusion.sum()):,} examples"

    @property
    def row(self) -> ClassScores:
        """The scores."""
        return self.scores

    def as_metrics(self) -> dict[str, float]:
        """The figures by their names in metrics.jsonl."""
        return {f"heldout_{name}": value for name, value in {"loss": self.loss, **self.scores._asdict()}.items()}

    def as_result(self) -> dict[str, Any]:
        """The figures with the classes' names and the confusion, as JSON values."""
        counts = self.confusion.astype(int).tolist()
        return {"loss": self.loss, **self.scores._asdict(), "labels": list(self.names), "confusion": counts}

    def details(self) -> list[str]:
        """The confusion as a table; no lines if there are too many classes for a line."""
        if len(self.names) > _CLASSES_PER_LINE:
            return []
        cells = [[f"{count:,}" for count in counts] for counts in self.confusion.astype(int).tolist()]
        names = [shown_label(name) for name in self.names]
        rows = [[name, *counts] for name, counts in zip(names, cells, strict=True)]
        return table_lines([["true \\ taken for", *names], *rows])

    def __str__(self) -> str:
        accuracy, f1, matthews = self.scores
        f1_name = f1_of(self.names)
        return f"loss {self.loss:.4f}  accuracy {100 * accuracy:.2f}%  {f1_name} {f1:.4f}  Matthews {matthews:.4f}"


@dataclasses.dataclass(frozen=True)
class Classes:
    """The objective of a classification; see `tasks.labelled.LabelledObjective`.

    Its loss is the cross-entropy, averaged over examples.

    Attributes:
      vocab_size: number of the tokenizer's ids.
      sequence_length: tokens per row.
      names: the names of the classes, in the order of the model's outputs.
    """

    vocab_size: int
    sequence_length: int
    names: tuple[str, ...]

    weight_name: ClassVar[str] = "examples"

    @property
    def num_outputs(self) -> int:
        """One logit per class."""
        return len(self.names)

    def batch_shapes(self, num_rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a batch; a label is the index of its class."""
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
        """The number of classes."""
        return {"classes": f"{self.num_outputs:,}"}

    def labels(self, examples: Sequence[Example]) -> np.ndarray:
        """The index of each example's class."""
        return class_labels(examples, self.names)

    def evaluation(self, sums: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray]) -> ClassEvaluation:
        """The figures, which need only the sums."""
        loss = float(sums["nll"]) / max(float(sums["weight"]), 1.0)
        return ClassEvaluation(loss, class_scores(sums["confusion"]), sums["confusion"], self.names)

    @property
    def table_head(self) -> tuple[str, ...]:
        """The names of `ClassScores`."""
        return "accuracy", f1_of(self.names), "Matthews"

    def judge(self, labels: np.ndarray, predicted: np.ndarray) -> ClassScores:
        """The scores of the predictions."""
        return class_scores(count_pairs(labels, predicted, self.num_outputs))

    def constant(self, labels: np.ndarray) -> tuple[str, float]:
        """The most frequent class."""
        commonest = int(np.argmax(np.bincount(labels, minlength=self.num_outputs)))
        return f"'{shown_label(self.names[commonest])}'", commonest

    def answer(self, outputs: np.ndarray) -> dict[str, Any]:
        """The likeliest class, and the probability of each."""
        probabilities = scipy.special.softmax(outputs.astype(np.float64))
        by_name = dict(zip(self.names, probabilities.tolist(), strict=True))
        return {"label": self.names[int(outputs.argmax())], "probabilities": by_name}


class Classification(LabelledTask[Classes, ClassEvaluation]):
    """The task of classifying texts. labels.json has the classes' names, which a resumed run must have, too."""

    loss_unit: ClassVar[str] = "nats per example"

    @classmethod
    def make_objective(cls, config: ml_collections.ConfigDict, vocab_size: int, training: Sequence[Example]) -> Classes:
        """The objective for the classes that the training labels name."""
        return Classes(vocab_size, config.sequence_length, class_names(training))

    @classmethod
    def trained_objective(cls, config: ml_collections.ConfigDict, vocab_size: int, workdir: Workdir) -> Classes:
        """The objective for the classes in labels.json."""
        return Classes(vocab_size, config.sequence_length, load_class_names(workdir.local))

    @classmethod
    def load(
        cls, config: ml_collections.ConfigDict, workdir: Workdir, progress_bar: ProgressBar = no_progress
    ) -> "Classification":
        """Reads the data. Raises UserError also if the classes are not those that the run began with."""
        task = super().load(config, workdir, progress_bar)
        names = task.objective.names
        if (workdir / LABELS_FILE).exists() and (saved := load_class_names(workdir.local)) != names:
            old, new = (", ".join(map(shown_label, each)) for each in (saved, names))
            raise UserError(
                f"workdir {workdir} was trained on the labels {old}; {config.data.files} has {new}: "
                "use a new workdir or bring the data back"
            )
        return task

    def save(self, workdir: Workdir) -> None:
        """Writes the tokenizer and the classes' names if the workdir has none."""
        super().save(workdir)
        if not (workdir / LABELS_FILE).exists():
            save_class_names(workdir.local, self.objective.names)


def f1_of(names: Sequence[str]) -> str:
    """The name of `ClassScores.f1` for these classes."""
    return f"F1 of '{shown_label(names[1])}'" if len(names) == 2 else "macro F1"


def _predict(model: Transformer, batch: Batch) -> tuple[Float[Array, "b classes"], Float[Array, ""]]:
    """Logits, and the sum of the cross-entropies in nats."""
    logits = model.outputs(batch["inputs"], batch["segment_ids"], batch["positions"])
    nll = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return logits, jnp.sum(batch["weights"] * nll)
