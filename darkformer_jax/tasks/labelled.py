"""What tasks on labelled texts share: examples, their tokenizer, their batches, and what is printed at the end."""

import dataclasses
import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from darkformer_jax.data.batches import Batch, ordered_batches, shuffled_batches
from darkformer_jax.data.labelled import Columns, Example, LabelledRows, split_examples
from darkformer_jax.data.tokenizers import Tokenizer, saved_or_new_tokenizer
from darkformer_jax.distributed.sharding import Part
from darkformer_jax.errors import UserError
from darkformer_jax.model.transformer import Network
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.task import Best, Evaluation, Objective
from darkformer_jax.tasks.tokenizer import check_same_tokenizer, tokenizer_of, vocab_size_of

E = TypeVar("E", bound=Evaluation)
O = TypeVar("O", bound="LabelledObjective[Any]")


class LabelledObjective(Objective, Protocol[E]):
    """An objective that also knows what labels mean.

    Attributes:
      table_head: names of the figures in a row of `LabelledTask.report`'s table.
    """

    @property
    def table_head(self) -> tuple[str, ...]: ...

    def labels(self, examples: Sequence[Example]) -> np.ndarray:
        """[n], of the batches' dtype. Raises UserError, with its place, for a label that means nothing here."""
        ...

    def evaluation(self, sums: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray]) -> E:
        """The figures of what `measure` returned, as in `tasks.task.Task.evaluation`."""
        ...

    def rivals(self, train: LabelledRows, heldout: LabelledRows) -> Mapping[str, Sequence[float]]:
        """Rows of the table, by name: what must be beaten on the held-out examples."""
        ...

    def table_row(self, evaluation: E) -> Sequence[float]:
        """The model's own row."""
        ...


@dataclasses.dataclass(frozen=True)
class LabelledTask(ABC, Generic[O, E]):
    """A task whose rows are texts with a label each; see `tasks.task.Task`.

    Attributes:
      config: of the run.
      objective: see above.
      train, heldout: both splits.
      tokenizer: of both.
    """

    config: ml_collections.ConfigDict
    objective: O
    train: LabelledRows
    heldout: LabelledRows
    tokenizer: Tokenizer

    best = Best("heldout_loss", smaller=True)
    constants = None

    @classmethod
    @abstractmethod
    def make_objective(cls, config: ml_collections.ConfigDict, vocab_size: int, training: Sequence[Example]) -> O:
        """Of a validated config, its tokenizer's number of ids and what it trains on."""

    @classmethod
    @abstractmethod
    def trained_objective(cls, config: ml_collections.ConfigDict, vocab_size: int, workdir: Workdir) -> O:
        """That of a trained model, without the data."""

    @classmethod
    def objective_of(cls, config: ml_collections.ConfigDict) -> O:
        """Reads the labels, because the model's size depends on them."""
        return cls.make_objective(config, vocab_size_of(config), _examples(config)[0])

    @classmethod
    def load(cls, config: ml_collections.ConfigDict, workdir: Workdir) -> Self:
        """Reads and tokenises both splits."""
        training, heldout = _examples(config)
        if len(training) < config.batch_size:
            raise UserError(
                f"{config.data.files} has {len(training)} training examples, fewer than "
                f"batch_size = {config.batch_size}; allowed: a smaller batch_size"
            )
        tokenizer = saved_or_new_tokenizer(
            tokenizer_of(config, workdir), workdir.tokenizer_dir, lambda: (example.text for example in training)
        )
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
        """Of both splits' tokens and labels, and of the tokenizer."""
        data = self.train.fingerprint + self.heldout.fingerprint
        return {"data": data, "tokenizer": self.tokenizer.fingerprint}

    def train_batches(self, start_step: int, part: Part) -> Iterator[Batch]:
        """As `LabelledRows.read` makes them, each epoch in another order."""
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
        """As `LabelledRows.read` makes them, in order."""
        return ordered_batches(
            self.heldout.read,
            len(self.heldout),
            batch_size=self.config.eval.batch_size,
            max_batches=max_batches,
            process_index=part.index,
            process_count=part.count,
        )

    def evaluation(self, sums: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray]) -> E:
        """The objective's."""
        evaluation: E = self.objective.evaluation(sums, rows)
        return evaluation

    def save(self, workdir: Workdir) -> None:
        """The tokenizer, where there is none yet."""
        if workdir.tokenizer_dir is None:
            self.tokenizer.save(str(workdir.local))

    def report(self, network: Network, params: dict, projections: dict, workdir: Workdir, last: E) -> None:
        """The model's figures on the held-out examples beside what must be beaten."""
        rows = {"this model": self.objective.table_row(last), **self.objective.rivals(self.train, self.heldout)}
        print("\n".join(table_lines(self.objective.table_head, rows)))
        print(f"other files: python -m darkformer_jax.evaluate --workdir={shlex.quote(str(workdir))} --text=<files>")

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
    """Of what `LabelledRows.read` returns."""
    shape = (num_rows, sequence_length)
    tokens = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("inputs", "segment_ids", "positions")}
    return tokens | {
        "labels": jax.ShapeDtypeStruct((num_rows,), label_dtype),
        "weights": jax.ShapeDtypeStruct((num_rows,), jnp.float32),
    }


def columns_of(config: ml_collections.ConfigDict) -> Columns:
    """Where the config's files have text and label."""
    return Columns(config.task.text_column, config.task.label_column)


def _examples(config: ml_collections.ConfigDict) -> tuple[list[Example], list[Example]]:
    d = config.data
    return split_examples(d.files, config.task.heldout_files, d.heldout_fraction, columns_of(config))


def table_lines(head: Sequence[str], rows: Mapping[str, Sequence[float]]) -> list[str]:
    """A table whose columns are as wide as their heads."""
    names = max(map(len, rows)) + 2
    widths = [max(len(name), 8) + 3 for name in head]
    lines = [" " * names + "".join(f"{name:>{width}}" for name, width in zip(head, widths, strict=True))]
    for name, figures in rows.items():
        cells = (f"{figure:{width}.4f}" for figure, width in zip(figures, widths, strict=True))
        lines.append(f"{name:{names}}" + "".join(cells))
    return lines
