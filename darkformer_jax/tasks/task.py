"""The seam between the training loop and what is learned: the loop knows no tokens, and a task knows no loop.

A `Task` is what a run learns, with its data. Its `Objective` is the part that holds no data: the functions that the
training step and the evaluation trace. A dry run and `compile` have an objective alone.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import jax
import ml_collections
import numpy as np
from jaxtyping import Array, Float

from darkformer_jax.data.progress import ProgressBar
from darkformer_jax.distributed.sharding import Part
from darkformer_jax.model.network import Network
from darkformer_jax.model.transformer import Transformer
from darkformer_jax.runs.workdir import Workdir

Batch = dict[str, Array]  # [rows, ...] each; on the host, numpy's
Sums = dict[str, Array]  # additive over batches; "weight" is what means are divided by


class Objective(Protocol):
    """What a model learns from a batch: pure functions, and the shapes that they take.

    Attributes:
      vocab_size: ids of the tokenizer. The model's table has as many rows or more.
      num_outputs: numbers that the model gives per sequence; 0 = it gives logits of the next token.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def num_outputs(self) -> int: ...

    def batch_shapes(self, num_rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Name -> shape and dtype of a batch of `num_rows` rows, over all processes.

        The first axis counts rows, the second one, of those arrays that have it, the places of a sequence.
        """
        ...

    def loss(self, model: Transformer, batch: Batch, constants: Any) -> tuple[Float[Array, ""], Sums]:
        """The sum to minimise over a batch, and sums to report, "weight" among them.

        The training step adds both over micro-batches and divides by the total of "weight".

        Args:
          model: bound to its parameters, inside a jitted function.
          batch: as in `batch_shapes`.
          constants: the task's.
        """
        ...

    def metrics(self, sums: Sums, weight: Float[Array, ""]) -> dict[str, Array]:
        """What metrics.jsonl says of a training step, "loss" among it: of the added sums, and their weight >= 1."""
        ...

    def measure(self, model: Transformer, batch: Batch) -> tuple[Sums, dict[str, Array]]:
        """Sums over a held-out batch, and values of each row ([rows] each) for figures that are not made of sums.

        Rows of padding have the weight 0; who needs a row's weight returns it as one of the values.
        """
        ...

    def describe(self) -> Mapping[str, str]:
        """Rows of what --dry_run prints."""
        ...


class Evaluation(Protocol):
    """What a model makes of held-out data. As a string, one line for people.

    Attributes:
      loss: a run whose loss is not finite is stopped.
      size: how much was measured: "12,345 tokens".
    """

    @property
    def loss(self) -> float: ...

    @property
    def size(self) -> str: ...

    def as_metrics(self) -> dict[str, float]:
        """Names for metrics.jsonl."""
        ...


class ScoreRequest(NamedTuple):
    """What a finished model is to be scored on; None = as the task does it by itself."""

    files: str  # comma-separated globs, or directories
    batch_size: int
    context: int | None  # tokens of a window
    stride: int | None  # tokens from one window to the next
    max_tokens: int | None


class Scores(NamedTuple):
    """How good a model is on some files."""

    result: dict[str, Any]  # JSON values
    table: str  # the same for people


E = TypeVar("E", bound=Evaluation)


class Task(Protocol[E]):
    """What a run learns, with its data.

    Attributes:
      objective: of the data that was loaded.
      best: the one of `Evaluation.as_metrics` whose smallest value is the best checkpoint's.
      constants: arrays that the objective reads beside the batch, a teacher's, say; None where there are none. They
        are read when they are first asked for, and kept.
      fingerprints: of what must be the same in all processes; `data` is compared with the workdir's data.json.
    """

    @property
    def objective(self) -> Objective: ...

    @property
    def best(self) -> str: ...

    @property
    def constants(self) -> Any: ...

    @property
    def fingerprints(self) -> Mapping[str, str]: ...

    @classmethod
    def objective_of(cls, config: ml_collections.ConfigDict) -> Objective:
        """The objective of a validated config, without its data.

        A language model's reads a tokenizer at most; a labelled task's reads its files, whose labels are the classes.
        """
        ...

    @classmethod
    def load(cls, config: ml_collections.ConfigDict, workdir: Workdir) -> Self:
        """Reads the data, for a run in `workdir`, and writes nothing.

        Raises:
          UserError: anything in the config, the files and the workdir that does not fit together.
        """
        ...

    def train_batches(self, start_step: int, part: Part) -> Iterator[dict[str, np.ndarray]]:
        """Endless: a process's rows of the batches of the steps after `start_step`, each a function of its step."""
        ...

    def heldout_batches(self, max_batches: int, part: Part) -> Iterator[dict[str, np.ndarray]]:
        """A process's rows of at most `max_batches` batches from all over the held-out data; 0 = all of it."""
        ...

    def evaluation(self, sums: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray]) -> E:
        """The figures of what `Objective.measure` returned: `sums` added, and `rows` of all batches end to end."""
        ...

    def save(self, workdir: Workdir) -> None:
        """Writes what belongs to the model beside its weights, a tokenizer, say. Process 0 calls it."""
        ...

    def report(self, network: Network, params: dict, projections: dict, workdir: Workdir, last: E) -> str:
        """Prints what a finished run has to show; returns the line that says what to do with the model next.

        last: the evaluation on all held-out data.
        """
        ...

    @classmethod
    def score(cls, workdir: Workdir, step: int | None, request: ScoreRequest, progress_bar: ProgressBar) -> Scores:
        """Scores the model of a workdir (step None: its newest) on files: what `evaluate` prints.

        Raises:
          UserError: the files, the model and the request do not fit together.
        """
        ...

    def __str__(self) -> str:
        """How much data there is, for the line that a run begins with."""
        ...
