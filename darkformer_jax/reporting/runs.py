"""Finds the workdirs of runs and reads what training left in them."""

import glob
import json
import math
import os
import sys
from dataclasses import dataclass
from typing import Any

import tqdm

from darkformer_jax.config.fields import flat_fields
from darkformer_jax.data.files import read_file, read_json_object, refuse_url
from darkformer_jax.errors import UserError
from darkformer_jax.reporting.settings import Settings, settings_of
from darkformer_jax.runs.metrics import METRICS_FILE
from darkformer_jax.runs.workdir import CONFIG_FILE, DATA_FILE, read_config

FIGURES = ("heldout_loss", "heldout_bits_per_byte", "heldout_accuracy")
FINISHED, DIVERGED, UNFINISHED, UNTRAINED = "finished", "diverged", "unfinished", "not trained"

_CHECKED = ("loss", "grad_norm", *FIGURES)  # null where it was not finite


@dataclass(frozen=True, eq=False)
class Run:
    """One workdir. Compared by identity."""

    workdir: str
    seed: int
    init_from: str
    settings: Settings
    data: dict[str, Any]  # the config's data.*, for messages
    lines: list[dict[str, Any]]  # of metrics.jsonl
    state: str  # FINISHED, DIVERGED, UNFINISHED or UNTRAINED
    reason: str  # of a state that is not FINISHED

    @property
    def final(self) -> dict[str, Any]:
        """The held-out figures after the last step; of finished runs only."""
        return _evaluations(self.lines, self.settings["num_steps"])[-1]

    def curve(self, name: str) -> dict[int, float]:
        """step -> value of the lines that have it."""
        return {line["step"]: line[name] for line in self.lines if line.get(name) is not None}


def find_workdirs(globs: str) -> list[str]:
    """Directories with a config.json that match comma-separated globs, each once, sorted within a glob.

    Raises UserError naming the glob that none matches, or the path without wildcards that is no workdir.
    """
    found: dict[str, str] = {}
    for pattern in filter(None, (part.strip() for part in globs.split(","))):
        refuse_url(pattern)
        matches = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        workdirs = [path for path in matches if os.path.isfile(os.path.join(path, CONFIG_FILE))]
        if not workdirs:
            raise UserError(f"--runs={pattern}: no run matches; a run is a directory with a {CONFIG_FILE}")
        for path in workdirs:
            found.setdefault(os.path.realpath(path), path.rstrip("/"))
    if not found:
        raise UserError(f"--runs={globs}: give at least one glob of workdirs")
    return list(found.values())


def read_runs(workdirs: list[str]) -> list[Run]:
    """Reads every workdir, with a progress bar.

    Raises UserError where a config or a line of metrics.jsonl cannot be read, or two runs were trained on other data:
    their losses, and bits per byte, are then not of the same text.
    """
    runs, fingerprints = [], {}
    for workdir in tqdm.tqdm(workdirs, unit="run", mininterval=0.1 if sys.stderr.isatty() else 30.0):
        runs.append(_read_run(workdir))
        if runs[-1].lines:
            fingerprints[_data_fingerprint(workdir)] = runs[-1]
            _require_same_data(list(fingerprints.values()))
    return runs


def _read_run(workdir: str) -> Run:
    config = read_config(workdir)
    settings = settings_of(config, workdir)
    flat = dict(flat_fields(config))
    path = os.path.join(workdir, METRICS_FILE)
    lines = _read_lines(path) if os.path.lexists(path) else []
    state, reason = _state(lines, settings["num_steps"])
    if state == FINISHED:
        final = _evaluations(lines, settings["num_steps"])[-1]
        for name in FIGURES:
            if name not in final:
                raise UserError(f"{path}: the last evaluation has no {name}; it has {', '.join(final)}")
    data = {name: value for name, value in flat.items() if name.startswith("data.")}
    seed = flat.get("seed")
    if not isinstance(seed, int):
        raise UserError(f"{workdir}/{CONFIG_FILE}: seed = {seed!r}: must be an integer")
    return Run(workdir, seed, flat["init_from"], settings, data, lines, state, reason)


def _evaluations(lines: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """The lines that hold an evaluation after `step`."""
    return [line for line in lines if line["step"] == step and FIGURES[0] in line]


def _state(lines: list[dict[str, Any]], num_steps: int) -> tuple[str, str]:
    if not lines:
        return UNTRAINED, f"not trained: no lines in {METRICS_FILE}"
    for line in lines:
        broken = [name for name in _CHECKED if name in line and line[name] is None]
        if broken:
            return DIVERGED, f"diverged: {broken[0]} was not finite at step {line['step']} of {num_steps}"
    if _evaluations(lines, num_steps):
        return FINISHED, ""
    return UNFINISHED, f"unfinished: step {max(line['step'] for line in lines)} of {num_steps}, no last evaluation"


def _read_lines(path: str) -> list[dict[str, Any]]:
    """Every line, checked. A last one without its newline is what a kill tore off: training drops it, too."""
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
        raise ValueError("no step that is an integer")
    for name in _CHECKED:
        value = line.get(name)
        if value is not None and type(value) not in (int, float):
            raise ValueError(f"{name} = {value!r} is not a number")
        if value is not None and not math.isfinite(value):
            line[name] = None
    return line


def _data_fingerprint(workdir: str) -> str:
    path = os.path.join(workdir, DATA_FILE)
    if not os.path.exists(path):
        raise UserError(f"{workdir} has {METRICS_FILE} but no {DATA_FILE}: which text it is of cannot be told")
    fingerprint = read_json_object(path).get("fingerprint")
    if not isinstance(fingerprint, str):
        raise UserError(f"{path} has no fingerprint")
    return fingerprint


def _require_same_data(runs: list[Run]) -> None:
    if len(runs) == 1:
        return
    a, b = runs[:2]
    names = sorted(name for name in a.data.keys() | b.data.keys() if a.data.get(name) != b.data.get(name))
    shown = "; ".join(f"{name}: {a.data.get(name)!r} and {b.data.get(name)!r}" for name in names)
    raise UserError(
        f"{a.workdir} and {b.workdir} have other training or held-out tokens ({shown or 'the files changed'}): their"
        " losses and bits per byte do not compare; report them apart"
    )
