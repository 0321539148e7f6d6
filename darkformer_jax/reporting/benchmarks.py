"""The table of a benchmark: the metric on validation and test, best and last, beside what others published.

A set of runs belongs to a benchmark if its files have the names that `prepare_data` gives them: Long Range Arena's
basic_train.tsv, a directory fashion_mnist, cifar10, pathfinder or lra_pathfinder32 with train.tsv, train.jsonl with the
columns of IMDb's reviews or of pairs of papers, a directory of a task of GLUE with train.jsonl.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from darkformer_jax.config.specs import model_spec
from darkformer_jax.config.validation import from_json
from darkformer_jax.data import aan, images, imdb, listops, text_sets
from darkformer_jax.data.files import read_json_object
from darkformer_jax.data.glue import GLUE_TASKS
from darkformer_jax.data.pathfinder_images import HARD
from darkformer_jax.errors import UserError
from darkformer_jax.model.flops import train_step_flops
from darkformer_jax.reporting.facts import largest_memory, median_speed, shown_median
from darkformer_jax.reporting.published import PUBLISHED, Published
from darkformer_jax.reporting.reported_runs import LOSS, ReportedRun
from darkformer_jax.reporting.rows import Mean, Row
from darkformer_jax.reporting.tested import tested_figures
from darkformer_jax.runs.checkpoints import best_step
from darkformer_jax.runs.metrics import METRICS_FILE
from darkformer_jax.runs.workdir import Workdir

_STATISTICS_FILE = "statistics.json"  # of prepare_data, beside the data
_ABSENT = "–"


class Benchmark(NamedTuple):
    """What is measured.

    Attributes:
      title: its name for people.
      metric: the official one, as it is called there.
      figure: its name in metrics.jsonl.
    """

    title: str
    metric: str
    figure: str


_FIGURES = {  # by the metric of GLUE
    "accuracy": "heldout_accuracy",
    "F1": "heldout_f1",
    "Matthews": "heldout_matthews",
    "Spearman": "heldout_spearman",
}
BENCHMARKS = {
    "listops": Benchmark("ListOps of Long Range Arena", "accuracy", "heldout_accuracy"),
    "cifar10": Benchmark("CIFAR-10 as sequences of pixels, of Long Range Arena", "accuracy", "heldout_accuracy"),
    "pathfinder": Benchmark("Pathfinder, generated here", "accuracy", "heldout_accuracy"),
    "lra_pathfinder32": Benchmark("Pathfinder of Long Range Arena", "accuracy", "heldout_accuracy"),
    "lra_pathfinder128": Benchmark("Path-X of Long Range Arena", "accuracy", "heldout_accuracy"),
    "text": Benchmark("Text (IMDb's reviews as bytes) of Long Range Arena", "accuracy", "heldout_accuracy"),
    "retrieval": Benchmark(
        "Retrieval of Long Range Arena: a pair of papers as one text of bytes, by others as two",
        *("accuracy", "heldout_accuracy"),
    ),
    "fashion_mnist": Benchmark("Fashion-MNIST as sequences of pixels", "accuracy", "heldout_accuracy"),
} | {
    name: Benchmark(f"{task.directory} of GLUE", task.metric, _FIGURES[task.metric])
    for name, task in GLUE_TASKS.items()
}


# Training examples of what others trained on; Text, Retrieval and Pathfinder are split in another way here.
_RELEASED = {"listops": 96_000, "cifar10": 45_000} | {name: task.train_size for name, task in GLUE_TASKS.items()}
_PIXELS = (*images.READERS, "pathfinder", "lra_pathfinder32", "lra_pathfinder128")
_OF_COLUMNS = {  # (file, its columns)
    ("basic_train.tsv", (listops.TEXT_COLUMN, listops.LABEL_COLUMN)): "listops",
    ("train.jsonl", (imdb.TEXT_COLUMN, text_sets.LABEL_COLUMN)): "text",
    ("train.jsonl", (aan.TEXT_COLUMN, text_sets.LABEL_COLUMN)): "retrieval",
}


@dataclass(frozen=True)
class BenchmarkRow:
    """A row of the page's table and its figures, all in percent of the metric: means over the seeds.

    Attributes:
      best: validation at the checkpoint with the lowest validation loss: see `_best_line`.
      last: validation after the last step.
      test_best, test_last: of the same checkpoints; None unless all seeds were tested.
      flops: forward, for one sequence of full length.
    """

    row: Row
    best: Mean
    last: Mean
    test_best: Mean | None
    test_last: Mean | None
    flops: float
    parameters: str
    speed: str
    memory: str


@dataclass(frozen=True)
class BenchmarkTable:
    """What a benchmark's section of the page shows.

    Attributes:
      name: the key in BENCHMARKS.
      majority: the share in percent of the most frequent training class, in "validation" and "test", as far as known.
      lengths, steps: of the rows, each once: tokens per sequence, and training steps.
      is_sampled: whether a run was evaluated on a part of the validation split (eval.batches) before its last step.
      without_checkpoints: how many runs have no measured checkpoint left, so that metrics.jsonl alone tells the best.
      examples: of the training split, if prepare_data's statistics are still beside it.
      levels: of Pathfinder, as far as the runs' statistics say.
    """

    name: str
    rows: list[BenchmarkRow]
    majority: dict[str, float]
    lengths: list[int]
    steps: list[int]
    is_sampled: bool
    without_checkpoints: int
    examples: int | None
    levels: list[str]

    @property
    def benchmark(self) -> Benchmark:
        """What is measured."""
        return BENCHMARKS[self.name]

    @property
    def published(self) -> tuple[Published, ...]:
        """What others published; () = nothing that this library knows of. Of Pathfinder that is the hard level."""
        return () if self.is_easier else PUBLISHED.get(self.name, ())

    @property
    def is_easier(self) -> bool:
        """Whether a run is known to be of an easier level than the published figures."""
        return any(level != HARD for level in self.levels)

    @property
    def released(self) -> int | None:
        """Training examples of what was published under the benchmark's name; None = not known here."""
        return _RELEASED.get(self.name)

    @property
    def has_test(self) -> bool:
        """Whether a row has a test figure."""
        return any(row.test_best or row.test_last for row in self.rows)


def benchmark_of(files: str, task: Mapping[str, Any]) -> str | None:
    """The benchmark in whose files a run was trained; None = none that is known here.

    Args:
      files: its data.files.
      task: the section `task` of its config.
    """
    directory, file = os.path.split(os.path.normpath(files))
    columns = (task["text_column"], task["label_column"])
    name = os.path.basename(directory)
    if task["name"] == "language_model":
        return None
    if known := _OF_COLUMNS.get((file, columns)):
        return known
    if (file, columns) == ("train.tsv", (images.TEXT_COLUMN, images.LABEL_COLUMN)):
        return name if name in _PIXELS else None
    return name if file == "train.jsonl" and name in GLUE_TASKS else None


def benchmark_table(rows: Sequence[Row]) -> BenchmarkTable | None:
    """The table of finished rows; None if there are none, or they are of no benchmark or of several.

    Raises UserError for a test*.json that `tested_figures` refuses.
    """
    configs = {run.workdir: Workdir(run.workdir).read_config() for row in rows for run in row.runs}
    names = {benchmark_of(config["data"]["files"], config["task"]) for config in configs.values()}
    name = names.pop() if len(names) == 1 else None
    if name is None or not all(BENCHMARKS[name].figure in row.figures for row in rows):
        return None
    figure = BENCHMARKS[name].figure
    runs = [run for row in rows for run in row.runs]
    name_in_tests = figure.removeprefix("heldout_")
    tests = tested_figures(configs, name_in_tests)
    kept = {run.workdir: best_step(Workdir(run.workdir), LOSS) for run in runs}
    first = next(iter(configs.values()))
    return BenchmarkTable(
        name,
        [_benchmark_row(row, figure, tests, kept, configs[row.runs[0].workdir]) for row in rows],
        _majority(first["data"]["files"], first["task"]["heldout_files"]) if figure == "heldout_accuracy" else {},
        sorted({config["sequence_length"] for config in configs.values()}),
        sorted({config["num_steps"] for config in configs.values()}),
        any(config["eval"]["batches"] for config in configs.values()),
        list(kept.values()).count(None),
        _training_examples(first["data"]["files"]),
        sorted({level for config in configs.values() if (level := _level(config["data"]["files"])) is not None}),
    )


def _benchmark_row(
    row: Row,
    figure: str,
    tests: Mapping[str, Mapping[int, float]],
    kept: Mapping[str, int | None],
    config: Mapping[str, Any],
) -> BenchmarkRow:
    best_lines = [_best_line(run, figure, kept[run.workdir]) for run in row.runs]
    last_steps = [run.final["step"] for run in row.runs]
    return BenchmarkRow(
        row,
        best=Mean.of([100 * line[figure] for line in best_lines]),
        last=Mean.of([100 * run.final[figure] for run in row.runs]),
        test_best=_test_mean(row, [line["step"] for line in best_lines], tests),
        test_last=_test_mean(row, last_steps, tests),
        flops=_forward_flops(config),
        parameters=row.runs[0].facts.shown["parameters"],
        speed=shown_median([median_speed(run.lines) for run in row.runs], "{:,.0f}"),
        memory=shown_median([largest_memory(run.lines) for run in row.runs], "{:,.2f} GiB", 2**30),
    )


def _best_line(run: ReportedRun, figure: str, kept: int | None) -> dict[str, Any]:
    """The evaluation of the checkpoint that the run keeps as best, `kept`; if None, the one with the lowest loss.

    That of step 0, before training, is not one of them: a run does not save it. Raises UserError if metrics.jsonl lacks
    the evaluation.
    """
    known = [line for line in run.lines if line["step"] and line.get(LOSS) is not None and line.get(figure) is not None]
    lines = {line["step"]: line for line in known}
    if kept is None:
        return min(lines.values(), key=lambda line: (line[LOSS], -line["step"]))
    if kept not in lines:
        raise UserError(f"{run.workdir} has a best checkpoint, step {kept}, whose evaluation {METRICS_FILE} lacks")
    return lines[kept]


def _test_mean(row: Row, steps: Sequence[int], tests: Mapping[str, Mapping[int, float]]) -> Mean | None:
    found = [tests[run.workdir].get(step) for run, step in zip(row.runs, steps, strict=True)]
    known = [value for value in found if value is not None]
    return Mean.of([100 * value for value in known]) if len(known) == len(found) else None


def _forward_flops(config: Mapping[str, Any]) -> float:
    """For one sequence of full length. The vocabulary does not matter: a head on whole texts has no logits of it."""
    read = from_json(config)
    spec = model_spec(read, read.model.vocab_size or 1, num_outputs=1)
    return train_step_flops(spec, read.sequence_length, read.sequence_length) / 3


def _training_examples(files: str) -> int | None:
    train = _statistics(files).get("train")
    counts = [train.get(name) for name in ("examples", "images", "expressions")] if isinstance(train, dict) else []
    return next((count for count in counts if isinstance(count, int)), None)


def _level(files: str) -> str | None:
    """None: these are no published images of Pathfinder, or statistics that do not say it."""
    source = _statistics(files).get("source")
    level = source.get("level") if isinstance(source, dict) else None
    return level if isinstance(level, str) else None


def _statistics(files: str) -> dict[str, Any]:
    """What prepare_data left beside the data; empty if it is not there any more."""
    path = _statistics_path(files)
    return read_json_object(path) if os.path.isfile(path) else {}


def _statistics_path(files: str) -> str:
    return os.path.join(os.path.dirname(files), _STATISTICS_FILE)


def _majority(files: str, heldout_files: str) -> dict[str, float]:
    """By the statistics. A split without that class, as a tiny one may be, has 0."""
    splits = _statistics(files)
    if not splits:
        return {}
    try:
        shares = splits["train"]["shares"]
        commonest = max(shares, key=shares.__getitem__)
        validation = os.path.basename(heldout_files).split(".")[0].removeprefix("basic_")
        found = {"validation": splits.get(validation, {}), "test": splits.get("test", {})}
        return {name: 100 * split["shares"].get(commonest, 0.0) for name, split in found.items() if "shares" in split}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{_statistics_path(files)} is not what prepare_data writes: {error!r}") from error


def shown(mean: Mean | None) -> str:
    """`36.40 ± 0.52`."""
    return _ABSENT if mean is None else mean.text(2)


def as_json(table: BenchmarkTable) -> dict[str, Any]:
    """The table's part of results.json; `row` is an index of its rows."""
    return {
        "name": table.name,
        "metric": table.benchmark.metric,
        "rows": [
            {
                "row": number,
                **{name: _json_of(getattr(row, name)) for name in ("best", "last", "test_best", "test_last")},
                "forward_flops_per_sequence": row.flops,
            }
            for number, row in enumerate(table.rows)
        ],
        "majority_class": table.majority,
        "training_examples": table.examples,
        "levels": table.levels,
        "published_not_ours": [
            {"model": one.model, "figure": one.figure, "source": one.source.name} for one in table.published
        ],
    }


def _json_of(mean: Mean | None) -> dict[str, Any] | None:
    return None if mean is None else {"mean": mean.mean, "standard_error": mean.standard_error}
