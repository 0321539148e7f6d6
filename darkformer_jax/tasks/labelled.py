"""What the tasks on labelled texts share: examples, tokenizer, batches, and the evaluation of a model."""

import dataclasses
import functools
import hashlib
import math
import shlex
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar, cast

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from darkformer_jax.data.batches import Batch, ordered_batches, shuffled_batches
from darkformer_jax.data.labelled import (
    Columns,
    Example,
    LabelledRows,
    Text,
    examples_fingerprint,
    read_examples,
    split_examples,
)
from darkformer_jax.data.progress import ProgressBar, no_progress
from darkformer_jax.data.seen_files import seen_file
from darkformer_jax.data.tokenizers import Tokenizer, saved_or_new_tokenizer
from darkformer_jax.distributed.sharding import Part
from darkformer_jax.errors import UserError
from darkformer_jax.model.network import Network
from darkformer_jax.runs.load import WorkdirModel, load_model
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.amounts import too_few_examples
from darkformer_jax.tasks.measured import measure_all
from darkformer_jax.tasks.scores import predict_by_bag_of_bytes
from darkformer_jax.tasks.table import table_lines
from darkformer_jax.tasks.task import Evaluation, Objective, ScoreRequest, Scores
from darkformer_jax.tasks.tokenizer import check_same_tokenizer, tokenizer_of, vocab_size_of


class LabelledEvaluation(Evaluation, Protocol):
    """An evaluation that is also a row of a table."""

    @property
    def row(self) -> Sequence[float]:
        """The figures under `LabelledObjective.table_head`."""
        ...

    def details(self) -> list[str]:
        """Lines that are printed below the table."""
        ...

    def as_result(self) -> dict[str, Any]:
        """The figures as JSON values."""
        ...


E = TypeVar("E", bound=LabelledEvaluation)
O = TypeVar("O", bound="LabelledObjective")


class LabelledObjective(Objective, Protocol):
    """An objective that also knows what labels mean.

    Attributes:
      table_head: names of the figures that `judge` returns.
    """

    @property
    def table_head(self) -> tuple[str, ...]: ...

    def labels(self, examples: Sequence[Example]) -> np.ndarray:
        """The labels [n], in the batches' dtype. Raises UserError for a label that this task cannot use; says where."""
        ...

    def evaluation(self, sums: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray]) -> LabelledEvaluation:
        """The figures for what `measure` returned, as in `tasks.task.Task.evaluation`."""
        ...

    def judge(self, labels: np.ndarray, predicted: np.ndarray) -> Sequence[float]:
        """The figures of any predictions [n] of labels [n]."""
        ...

    def constant(self, labels: np.ndarray) -> tuple[str, float]:
        """The best prediction that does not depend on the text: (in words, as a label)."""
        ...

    def answer(self, outputs: np.ndarray) -> dict[str, Any]:
        """What the model's outputs [C] for a text mean, as JSON values."""
        ...


@dataclasses.dataclass(frozen=True)
class LabelledTask(ABC, Generic[O, E]):
    """A task whose rows are texts with a label each; see `tasks.task.Task`.

    Attributes:
      config: the run's.
      objective: what the run learns.
      train, heldout: both splits.
      tokenizer: that of both splits.
    """

    config: ml_collections.ConfigDict
    objective: O
    train: LabelledRows
    heldout: LabelledRows
    tokenizer: Tokenizer

    best = "heldout_loss"
    loss_unit: ClassVar[str]
    constants = None

    @classmethod
    @abstractmethod
    def make_objective(cls, config: ml_collections.ConfigDict, vocab_size: int, training: Sequence[Example]) -> O:
        """The objective for a validated config, its tokenizer's number of ids and its training examples."""

    @classmethod
    @abstractmethod
    def trained_objective(cls, config: ml_collections.ConfigDict, vocab_size: int, workdir: Workdir) -> O:
        """The objective of a workdir's model, without the data."""

    @classmethod
    def objective_of(cls, config: ml_collections.ConfigDict, workdir: Workdir | None = None) -> O:
        """The objective of a config. Reads and checks all labels: the model's size depends on those of training."""
        splits = _examples(config)
        objective = cls.make_objective(config, vocab_size_of(config, workdir), splits[0])
        for examples in splits:
            objective.labels(examples)
        return objective

    @classmethod
    def objective_before_data(cls, config: ml_collections.ConfigDict, workdir: Workdir) -> O | None:
        """None: the labels are the classes."""
        return None

    @classmethod
    def load(cls, config: ml_collections.ConfigDict, workdir: Workdir, progress_bar: ProgressBar = no_progress) -> Self:
        """Reads and tokenises both splits."""
        training, heldout = _examples(config)
        texts = [example.text for example in training]
        tokenizer = saved_or_new_tokenizer(tokenizer_of(config, workdir), workdir.tokenizer_dir, texts, progress_bar)
        if config.init_from:
            check_same_tokenizer(Workdir(config.init_from), tokenizer.fingerprint, "init_from")
        objective = cls.make_objective(config, tokenizer.vocab_size, training)
        train, held = (
            LabelledRows(side, objective.labels(side), tokenizer, config.sequence_length)
            for side in (training, heldout)
        )
        return cls(config, objective, train, held, tokenizer)

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """SHA-256 of both splits' tokens and labels, and the tokenizer's fingerprint."""
        data = hashlib.sha256((self.train.fingerprint + self.heldout.fingerprint).encode()).hexdigest()
        return {"data": data, "tokenizer": self.tokenizer.fingerprint}

    @property
    def warnings(self) -> list[str]:
        """What are too few examples."""
        c = self.config
        return too_few_examples(len(self.train), len(self.heldout), c.num_steps * c.batch_size, c.num_steps)

    def train_batches(self, start_step: int, part: Part) -> Iterator[Batch]:
        """Batches of `LabelledRows.read`, each epoch in another order."""
        return shuffled_batches(
            self.train.read,
            len(self.train),
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            start_step=start_step,
            num_workers=self.config.data.num_workers,
            process_index=part.index,
            process_count=part.count,
        )

    def heldout_batches(self, max_batches: int, part: Part) -> Iterator[Batch]:
        """Batches of `LabelledRows.read`, in order."""
        return ordered_batches(
            self.heldout.read,
            len(self.heldout),
            batch_size=self.config.eval.batch_size,
            max_batches=max_batches,
            process_index=part.index,
            process_count=part.count,
        )

    def evaluation(self, sums: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray]) -> E:
        """The objective's evaluation."""
        return cast(E, self.objective.evaluation(sums, rows))

    def save(self, workdir: Workdir) -> None:
        """Writes the tokenizer if the workdir has none."""
        if workdir.tokenizer_dir is None:
            self.tokenizer.save(str(workdir.local))

    def report(self, network: Network, params: dict, projections: dict, workdir: Workdir, last: E) -> str:
        """Prints the held-out figures, and those of a bag of bytes and of the best constant for comparison."""
        bag = predict_by_bag_of_bytes(self.train.texts, self.train.labels, self.heldout.texts)
        name, constant = self.objective.constant(self.train.labels)
        rivals = {"bag of bytes": bag, f"always {name}": np.full_like(self.heldout.labels, constant)}
        print("\n".join(_table(self.objective, last, self.heldout.labels, rivals)))
        of_run = f"--workdir={shlex.quote(str(workdir))} --text=<files>"
        return (
            f"files with labels: python -m darkformer_jax.evaluate {of_run}\n"
            f"texts without: python -m darkformer_jax.predict {of_run}"
        )

    @classmethod
    def score(cls, workdir: Workdir, step: int | None, request: ScoreRequest, progress_bar: ProgressBar) -> Scores:
        """Scores labelled files, which must have the columns of the training files."""
        for name in ("context", "stride", "max_tokens"):
            if getattr(request, name) is not None:
                raise UserError(f"--{name}={getattr(request, name)}: only a language model has windows of its text")
        if request.text_field is not None:
            raise UserError(
                f"--text_field={request.text_field}: the model of {workdir} reads the columns it was trained on; "
                "allowed: no --text_field"
            )
        model, objective = cls._load_trained(workdir, step, request.dtype)
        examples = read_examples(request.files, columns_of(model.config))
        rows = LabelledRows(examples, objective.labels(examples), model.tokenizer, model.config.sequence_length)
        began = time.perf_counter()
        evaluation = _evaluate(model, objective, rows, request.batch_size, progress_bar)
        result = {
            "workdir": str(workdir),
            "step": model.step,
            "dtype": model.config.model.dtype,
            "text": request.files,
            "text_fingerprint": examples_fingerprint(examples),
            "examples": len(rows),
            "cut_share": rows.cut_share,
            **evaluation.as_result(),
            "seconds": time.perf_counter() - began,
        }
        head = (
            f"{workdir} step {model.step}: {len(rows):,} examples, {100 * rows.cut_share:.1f}% of them cut at "
            f"{model.config.sequence_length:,} tokens; {evaluation}; {result['seconds']:.0f} s"
        )
        name, constant = objective.constant(rows.labels)
        rivals = {f"always {name}": np.full_like(rows.labels, constant)}
        seen = seen_file(request.files, model.config.data.files, model.config.task.heldout_files)
        notes = [f"note: {seen[0]} is of the run's {seen[1]}: this is no test figure"] if seen else []
        return Scores(result, "\n".join([head, *notes, *_table(objective, evaluation, rows.labels, rivals)]))

    @classmethod
    def predict(
        cls,
        workdir: Workdir,
        step: int | None,
        read: Callable[[ml_collections.ConfigDict], Sequence[Text]],
        batch_size: int,
        progress_bar: ProgressBar,
    ) -> tuple[float, Iterator[tuple[Text, dict[str, Any]]]]:
        """(the share of the texts that are cut, each text with `LabelledObjective.answer`, in order).

        read: the run's config -> the texts.
        """
        model, objective = cls._load_trained(workdir, step)
        texts = read(model.config)
        rows = LabelledRows(texts, np.zeros(len(texts), np.float32), model.tokenizer, model.config.sequence_length)
        outputs = _outputs(model, rows, batch_size, progress_bar)
        return rows.cut_share, zip(texts, map(objective.answer, outputs), strict=True)

    @classmethod
    def _load_trained(cls, workdir: Workdir, step: int | None, dtype: str | None = None) -> tuple[WorkdirModel, O]:
        """A workdir's model, and what it learned."""
        model = load_model(workdir, step, dtype=dtype)
        objective = cls.trained_objective(model.config, model.tokenizer.vocab_size, workdir)
        if model.network.spec.num_outputs != objective.num_outputs:
            raise UserError(
                f"{workdir}: its checkpoint has {model.network.spec.num_outputs} outputs per text, its "
                f"{model.config.task.name} {objective.num_outputs}; allowed: a checkpoint of the same run"
            )
        return model, objective

    def __str__(self) -> str:
        lengths = self.train.num_tokens
        return (
            f"{len(self.train):,} training examples, {len(self.heldout):,} held out; tokens per example: median "
            f"{int(np.median(lengths)):,}, longest {lengths.max():,}; {100 * self.train.cut_share:.1f}% are cut at "
            f"{self.config.sequence_length:,}"
        )


def labelled_shapes(
    num_rows: int, sequence_length: int, label_dtype: jax.typing.DTypeLike
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what `LabelledRows.read` returns."""
    shape = (num_rows, sequence_length)
    tokens = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("inputs", "segment_ids", "positions")}
    return tokens | {
        "labels": jax.ShapeDtypeStruct((num_rows,), label_dtype),
        "weights": jax.ShapeDtypeStruct((num_rows,), jnp.float32),
    }


def columns_of(config: ml_collections.ConfigDict) -> Columns:
    """The columns with text and label in the config's files."""
    return Columns(config.task.text_column, config.task.label_column)


def read_splits(config: ml_collections.ConfigDict) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples of the config's files. Raises UserError."""
    d = config.data
    return split_examples(d.files, config.task.heldout_files, d.heldout_fraction, columns_of(config))


def _examples(config: ml_collections.ConfigDict) -> tuple[list[Example], list[Example]]:
    """`read_splits`. Raises UserError also for fewer than a batch of training examples."""
    training, heldout = read_splits(config)
    if len(training) < config.batch_size:
        raise UserError(
            f"{config.data.files} has {len(training)} training examples, fewer than batch_size = {config.batch_size}; "
            "allowed: a smaller batch_size"
        )
    return training, heldout


def _evaluate(
    model: WorkdirModel, objective: LabelledObjective, rows: LabelledRows, batch_size: int, progress_bar: ProgressBar
) -> LabelledEvaluation:
    measure = jax.jit(lambda *arrays: objective.measure(model.network.bind(*arrays[:2]), arrays[2]))
    with progress_bar(len(rows), "example") as bar:

        def batches() -> Iterator[Batch]:
            for batch in ordered_batches(rows.read, len(rows), batch_size=batch_size):
                yield batch
                bar.update(int(batch["weights"].sum()))

        measured = measure_all(functools.partial(measure, model.params, model.projections), batches())
    evaluation = objective.evaluation(*measured)
    if not math.isfinite(evaluation.loss):
        raise UserError(f"the model's loss is {evaluation.loss}: its weights are damaged, or a number overflowed")
    return evaluation


def _outputs(
    model: WorkdirModel, rows: LabelledRows, batch_size: int, progress_bar: ProgressBar
) -> Iterator[np.ndarray]:
    """The outputs [C] of each row, float32."""

    @jax.jit
    def outputs(params: dict, projections: dict, batch: dict[str, jax.Array]) -> jax.Array:
        bound = model.network.bind(params, projections)
        return bound.outputs(batch["inputs"], batch["segment_ids"], batch["positions"])

    with progress_bar(len(rows), "text") as bar:
        for batch in ordered_batches(rows.read, len(rows), batch_size=batch_size):
            num_real = int(batch["weights"].sum())
            values = np.asarray(outputs(model.params, model.projections, batch))[:num_real]
            if not np.isfinite(values).all():
                raise UserError("the model's outputs are not finite: its weights are damaged, or a number overflowed")
            yield from values
            bar.update(num_real)


def _table(
    objective: LabelledObjective,
    evaluation: LabelledEvaluation,
    labels: np.ndarray,
    rivals: Mapping[str, np.ndarray],
) -> list[str]:
    """Lines with a model's figures, those of its rivals' predictions, and its details."""
    rows = {"this model": evaluation.row} | {name: objective.judge(labels, rivals[name]) for name in rivals}
    cells = [[name, *(f"{figure:.4f}" for figure in figures)] for name, figures in rows.items()]
    return table_lines([["", *objective.table_head], *cells]) + evaluation.details()
