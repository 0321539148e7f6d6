"""Finds the workdirs of runs and reads what training left in them."""

import json
import math
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from darkformer_jax.config.fields import flat_fields
from darkformer_jax.data.files import read_file, read_json_object
from darkformer_jax.data.matching import entries, matching
from darkformer_jax.errors import UserError
from darkformer_jax.reporting.facts import Facts, read_facts
from darkformer_jax.reporting.settings import Settings, settings_of
from darkformer_jax.runs.metrics import METRICS_FILE
from darkformer_jax.runs.workdir import CONFIG_FILE, DATA_FILE, Workdir
from darkformer_jax.tasks import task_of

LOSS = "heldout_loss"
ACCURACY = "heldout_accuracy"
# The figures of the tasks, by their names in metrics.jsonl, in the order of a table's columns. A task may have others.
FIGURES = {
    LOSS: "held-out loss",
    "heldout_bits_per_byte": "bits per byte",
    ACCURACY: "accuracy",
    "heldout_f1": "F1",
    "heldout_matthews": "Matthews",
    "heldout_pearson": "Pearson",
    "heldout_spearman": "Spearman",
}
FINISHED, DIVERGED, UNFINISHED, UNTRAINED = "finished", "diverged", "unfinished", "not trained"


@dataclass(frozen=True, eq=False)
class ReportedRun:
    """What a run left in its workdir. Two are equal only if they are the same object."""

    workdir: str
    seed: int
    init_from: str
    settings: Settings
    loss_unit: str
    lines: list[dict[str, Any]]  # the lines of metrics.jsonl
    state: str  # FINISHED, DIVERGED, UNFINISHED or UNTRAINED
    reason: str  # why the state is not FINISHED; else ""
    final: dict[str, Any]  # the line of the evaluation after the last step; {} if there is none
    facts: Facts

    def curve(self, name: str) -> dict[int, float]:
        """step -> value, for the lines that have one."""
        return {line["step"]: line[name] for line in self.lines if line.get(name) is not None}

    @property
    def figures(self) -> tuple[str, ...]:
        """The names of the held-out figures after the last step."""
        return _figures(self.final)


def find_workdirs(globs: str) -> list[str]:
    """The directories with a config.json that match the comma-separated globs, each once, sorted within a glob.

    Raises UserError, which names the glob, if one has no match.
    """
    found: dict[str, str] = {}
    for pattern in entries(globs):
        workdirs = [path for path in matching(pattern) if os.path.isfile(os.path.join(path, CONFIG_FILE))]
        if not workdirs:
            raise UserError(f"--runs={pattern}: no run matches; a run is a directory with a {CONFIG_FILE}")
        for path in workdirs:
            found.setdefault(os.path.realpath(path), path.rstrip("/"))
    if not found:
        raise UserError(f"--runs={globs}: give at least one glob of workdirs")
    return list(found.values())


def read_runs(workdirs: Iterable[str]) -> list[ReportedRun]:
    """Reads every workdir.

    Raises UserError if a config or a line of metrics.jsonl cannot be read, or if runs were trained on different data or
    for different tasks: their losses do not compare. The error has a --runs for each group that does.
    """
    runs = [_read_run(workdir) for workdir in workdirs]
    groups: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        if run.lines:
            groups.setdefault((_data_fingerprint(run.workdir), run.settings["task.name"]), []).append(run.workdir)
    if len(groups) > 1:
        raise _no_comparison(groups)
    return runs


def _read_run(workdir: str) -> ReportedRun:
    config = Workdir(workdir).read_config()
    settings = settings_of(config, workdir)
    path = os.path.join(workdir, METRICS_FILE)
    lines = _read_lines(path) if os.path.lexists(path) else []
    evaluations = [line for line in lines if line["step"] == settings["num_steps"] and LOSS in line]
    final = evaluations[-1] if evaluations else {}
    state, reason = _state(lines, settings["num_steps"], bool(final))
    seed = config.get("seed")
    if not isinstance(seed, int):
        raise UserError(f"{workdir}/{CONFIG_FILE}: seed = {seed!r}: must be an integer")
    loss_unit = task_of(Workdir(workdir)).loss_unit
    facts = read_facts(workdir, config, lines)
    return ReportedRun(workdir, seed, config["init_from"], settings, loss_unit, lines, state, reason, final, facts)


def _state(lines: list[dict[str, Any]], num_steps: int, is_evaluated: bool) -> tuple[str, str]:
    if not lines:
        return UNTRAINED, f"not trained: no lines in {METRICS_FILE}"
    for line in lines:
        for name in _checked_names(line):
            if line[name] is None:
                return DIVERGED, f"diverged: {name} was not finite at step {line['step']} of {num_steps}"
    if is_evaluated:
        return FINISHED, ""
    return UNFINISHED, f"unfinished: step {max(line['step'] for line in lines)} of {num_steps}, no last evaluation"


def _read_lines(path: str) -> list[dict[str, Any]]:
    """Reads and checks every line. Skips a last line without a newline: a kill tore it, and training drops it too."""
    *complete, _torn = read_file(path).split(b"\n")
    lines = []
    for number, text in enumerate(complete, start=1):
        try:
            lines.append(_checked(json.loads(text)))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is not a line of metrics: {error}") from error
    return lines


def _checked(line: Any) -> dict[str, Any]:
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        raise ValueError("there is no integer step")
    for name in _checked_names(line):
        if type(line[name]) not in (int, float, type(None)):
            raise ValueError(f"{name} = {line[name]!r} is not a number")
        if line[name] is not None and not math.isfinite(line[name]):
            line[name] = None
    return line


def _checked_names(line: dict[str, Any]) -> list[str]:
    """The names of the numbers that are null in metrics.jsonl if they were not finite."""
    return [*(name for name in ("loss", "grad_norm") if name in line), *_figures(line)]


def _figures(line: dict[str, Any]) -> tuple[str, ...]:
    """The names of the held-out figures in a line of metrics.jsonl. How much was held out is not one of them."""
    own = [name for name in line if name.startswith("heldout_") and name != "heldout_tokens"]
    return tuple(name for name in dict.fromkeys([*FIGURES, *own]) if name in own)


def _data_fingerprint(workdir: str) -> str:
    path = os.path.join(workdir, DATA_FILE)
    if not os.path.exists(path):
        raise UserError(f"{workdir} has {METRICS_FILE} but no {DATA_FILE}: the text of the run is not known")
    fingerprint = read_json_object(path).get("fingerprint")
    if not isinstance(fingerprint, str):
        raise UserError(f"{path} has no fingerprint")
    return fingerprint


def _no_comparison(groups: dict[tuple[str, str], list[str]]) -> UserError:
    """The first two groups of runs have different data or tasks."""
    (_, task), (_, other_task) = list(groups)[:2]
    a, b = (workdirs[0] for workdirs in list(groups.values())[:2])
    if task != other_task:
        reason = f"different tasks ({task} and {other_task}): their losses"
    else:
        reason = f"different training or held-out tokens ({_changed_data(a, b)}): their losses and bits per byte"
    separately = " or ".join(shlex.quote(f"--runs={','.join(workdirs)}") for workdirs in groups.values())
    return UserError(f"{a} and {b} have {reason} do not compare; report them separately: {separately}")


def _changed_data(a: str, b: str) -> str:
    mine, theirs = (dict(flat_fields(Workdir(workdir).read_config())) for workdir in (a, b))
    fields = sorted(name for name in mine.keys() | theirs.keys() if name.startswith("data."))
    changed = [name for name in fields if mine.get(name) != theirs.get(name)]
    return "; ".join(f"{name}: {mine.get(name)!r} and {theirs.get(name)!r}" for name in changed) or "the files changed"
