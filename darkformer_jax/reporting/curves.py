"""What the plots draw and their alt texts say: curves over the steps, and lines over a field."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from darkformer_jax.reporting.calibrations import Calibration
from darkformer_jax.reporting.reported_runs import LOSS, ReportedRun
from darkformer_jax.reporting.rows import Mean, Row, best_of, grouped, label

_SMOOTHED = 20  # a training curve is the running mean over 1 / _SMOOTHED of its points


class Curve(NamedTuple):
    """A row's loss over the steps, over its seeds; each array is [steps], at least one."""

    label: str
    steps: np.ndarray
    mean: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    is_smooth: bool  # a running mean


class Line(NamedTuple):
    """The results of one mechanism against the field on the x axis."""

    label: str
    points: list[tuple[float, Mean]]  # (x, y)
    level: Mean | None  # y if the mechanism does not use the field
    crosses: list[float]  # the x at which a run diverged


def curves_of(rows: Sequence[Row], all_rows: Sequence[Row], name: str) -> list[Curve]:
    """The curves of `name` in metrics.jsonl, over the steps that all seeds have; rows without such steps have none.

    The training loss is smoothed. Labels tell the rows from all of `all_rows`.
    """
    curves = []
    for row in rows:
        of_seeds = [run.curve(name) for run in row.runs]
        steps = np.array(sorted(set.intersection(*map(set, of_seeds))))
        if not len(steps):
            continue
        losses = np.array([[curve[step] for step in steps] for curve in of_seeds])  # [seeds, steps]
        if name != LOSS:
            width = max(1, len(steps) // _SMOOTHED)
            losses = np.lib.stride_tricks.sliding_window_view(losses, width, axis=1).mean(axis=-1)
            steps = steps[width - 1 :]
        over_seeds = (losses.mean(axis=0), losses.min(axis=0), losses.max(axis=0))
        curves.append(Curve(label(row, all_rows), steps, *over_seeds, name != LOSS))
    return curves


def lines_of(rows: Sequence[Row], diverged: Sequence[ReportedRun], field: str, without: tuple[str, ...]) -> list[Line]:
    """One line for the rows that differ only in the fields `without`, with the best row at each value of `field`."""
    failed = [Row(run.settings, (run,), 1) for run in diverged]  # only their settings are used
    lines = []
    for members in grouped([*rows, *failed], without):
        finished = best_of([row for row in members if row in rows], tuple(set(without) - {field}))
        points = sorted((row.settings[field], row.mean()) for row in finished if field in row.settings)
        level = finished[0].mean() if finished and not points else None
        crosses = sorted({row.settings[field] for row in members if row in failed and field in row.settings})
        lines.append(Line(label(members[0], [*rows, *failed], without), points, level, crosses))
    return lines


def calibrated_lines(calibrations: Sequence[Calibration]) -> list[Line]:
    """The mean error after calibration against m, one line per mechanism and window."""
    lines: dict[str, Line] = {}
    for one in sorted(calibrations, key=lambda one: (one.mechanism, one.window, one.num_features)):
        name = f"{one.mechanism}, window {one.window}"
        error = Mean(list(one.mean_errors.values())[-1], None, 1)
        lines.setdefault(name, Line(name, [], None, [])).points.append((one.num_features, error))
    return list(lines.values())


def values(lines: Sequence[Line]) -> list[float]:
    """The values on the x axis."""
    return sorted({x for line in lines for x in (*(x for x, _ in line.points), *line.crosses)})
