"""The interface between the training loop and a task: the loop knows no tokens, and a task knows no loop.

A `Task` is what a run learns, with its data. Its `Objective` is the part that holds no data: the functions that the
training step and the evaluation trace. A dry run and `compile` need only an objective.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self, TypeVar

import jax
import ml_collections
import numpy as np
from jaxtyping import Array, Float

from darkformer_jax.data.progress import ProgressBar, no_progress
from darkformer_jax.distributed.sharding import Part
from darkformer_jax.model.network import Network
from darkformer_jax.model.transformer import Transformer
from darkformer_jax.runs.workdir import Workdir

Batch = dict[str, Array]  # each [rows, ...]; numpy arrays on the host
Sums = dict[str, Array]  # additive over batches; means are sums / "weight"


class Objective(Protocol):
    """What a model learns from a batch: pure functions, and the shapes that they take.

    Attributes:
      vocab_size: number of the tokenizer's ids. The model's table has as many rows or more.
      num_outputs: the model's outputs per sequence; 0 = logits of the next token.
      weight_name: the one of `metrics` that says how much a batch holds; all others are means over it.
    """

    weight_name: ClassVar[str]

    @property
    def vocab_size(self) -> int: ...

    @property
    def num_outputs(self) -> int: ...

    def batch_shapes(self, num_rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Name -> shape and dtype of a batch of `num_rows` rows, over all processes.

        The first axis is over rows. The second, if an array has one, is over the places of a sequence.
        """
        ...

    def loss(self, model: Transformer, batch: Batch, constants: Any) -> tuple[Float[Array, ""], Sums]:
        """(the sum to minimise over a batch, sums to report with "weight" among them).

        The training step adds both over micro-batches and divides by the total of "weight".

        Args:
          model: bound to its parameters, inside a jitted function.
          batch: as in `batch_shapes`.
          constants: those of the task.
        """
        ...

    def metrics(self, sums: Sums, weight: Float[Array, ""]) -> dict[str, Array]:
        """A batch's figures, from its added sums and their weight >= 1: means, "loss" among them, and `weight_name`."""
        ...

    def measure(self, model: Transformer, batch: Batch) -> tuple[Sums, dict[str, Array]]:
        """(sums over a held-out batch, values of each row ([rows] each) for figures that cannot be made from sums).

        Rows of padding have weight 0. An objective that needs a row's weight returns it as one of the values.
        """
        ...

    def describe(self) -> Mapping[str, str]:
        """Rows that --dry_run prints."""
        ...


class Evaluation(Protocol):
    """The figures of a model on held-out data. As a string, one line for people.

    Attributes:
      loss: a run stops if it is not finite.
      size: how much was measured, such as "12,345 tokens".
    """

    @property
    def loss(self) -> float: ...

    @property
    def size(self) -> str: ...

    def as_metrics(self) -> dict[str, float]:
        """The figures by their names in metrics.jsonl."""
        ...


class ScoreRequest(NamedTuple):
    """What to score a finished model on; None = the task's default."""

    files: str  # comma-separated globs, or directories
    batch_size: int
    context: int | None  # tokens per window
    stride: int | None  # tokens from one window to the next
    max_tokens: int | None
    text_field: str | None  # of a JSON object
    dtype: str | None = None  # what the model computes in


class Scores(NamedTuple):
    """The figures of a model on some files."""

    result: dict[str, Any]  # JSON values
    table: str  # the same for people


E = TypeVar("E", bound=Evaluation)


class Task(Protocol[E]):
    """What a run learns, with its data.

    Attributes:
      objective: the objective for the loaded data.
      best: the metric of `Evaluation.as_metrics` whose smallest value marks the best checkpoint.
      constants: further arrays that the objective reads, such as a teacher's; None = there are none. They are read at
        the first use, and kept.
      loss_unit: of losses, in words.
      warnings: lines about data that is too little for the run.
      fingerprints: hashes of what must be the same in all processes; data.json in the workdir must match `data`.
    """

    loss_unit: ClassVar[str]

    @property
    def objective(self) -> Objective: ...

    @property
    def best(self) -> str: ...

    @property
    def constants(self) -> Any: ...

    @property
    def warnings(self) -> Sequence[str]: ...

    @property
    def fingerprints(self) -> Mapping[str, str]: ...

    @classmethod
    def objective_of(cls, config: ml_collections.ConfigDict, workdir: Workdir | None = None) -> Objective:
        """The objective of a validated config, without its data.

        A language model's reads a tokenizer at most; a labelled task's reads its files, whose labels are the classes.

        workdir: of the run, which may have a tokenizer of its own; None = it has none.
        """
        ...

    @classmethod
    def objective_before_data(cls, config: ml_collections.ConfigDict, workdir: Workdir) -> Objective | None:
        """What `objective_of` returns, if it is known before the data is read and cheap; else None."""
        ...

    @classmethod
    def load(cls, config: ml_collections.ConfigDict, workdir: Workdir, progress_bar: ProgressBar = no_progress) -> Self:
        """Reads the data for a run in `workdir`, and writes nothing. The bars show a tokenizer's training.

        Raises:
          UserError: the config, the files and the workdir do not fit together.
        """
        ...

    def train_batches(self, start_step: int, part: Part) -> Iterator[dict[str, np.ndarray]]:
        """A process's rows of the batches after `start_step`, without end. Each batch is a function of its step."""
        ...

    def heldout_batches(self, max_batches: int, part: Part) -> Iterator[dict[str, np.ndarray]]:
        """A process's rows of at most `max_batches` batches, spread over the held-out data; 0 = all of it."""
        ...

    def evaluation(self, sums: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray]) -> E:
        """The figures for what `Objective.measure` returned: added `sums`, and `rows` of all batches concatenated."""
        ...

    def save(self, workdir: Workdir) -> None:
        """Writes what a model needs besides its weights, such as a tokenizer. Only process 0 calls it."""
        ...

    def report(self, network: Network, params: dict, projections: dict, workdir: Workdir, last: E) -> str:
        """Prints what a finished run has to show; returns the line that says what to do with the model next.

        last: the evaluation on all held-out data.
        """
        ...

    @classmethod
    def score(cls, workdir: Workdir, step: int | None, request: ScoreRequest, progress_bar: ProgressBar) -> Scores:
        """Scores the model of a workdir (step None: its newest) on files, for `evaluate` to print.

        Raises:
          UserError: the files, the model and the request do not fit together.
        """
        ...

    def __str__(self) -> str:
        """How much data there is, for the first line of a run."""
        ...
