"""Plots rows, calibrations and spectra. Lines differ in colour (Okabe and Ito's palette), style and marker."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from darkformer_jax.reporting.calibrations import Calibration
from darkformer_jax.reporting.findings import Findings
from darkformer_jax.reporting.reported_runs import DIVERGED, LOSS, ReportedRun
from darkformer_jax.reporting.rows import Mean, Row, best_of, grouped, label
from darkformer_jax.reporting.settings import LEARNING_RATE, LEARNING_RATES, M_FEATURES
from darkformer_jax.reporting.spectra import Spectra

_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # visible on white
_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
_MARKERS = "osD^vPX"
_SMOOTHED = 20  # a training curve is the running mean over 1 / _SMOOTHED of its points


class _Line(NamedTuple):
    """The results of one mechanism against the field on the x axis."""

    label: str
    points: list[tuple[float, Mean]]  # (x, y)
    level: Mean | None  # y if the mechanism does not use the field
    crosses: list[float]  # the x at which a run diverged


def draw(found: Findings) -> Iterator[tuple[str, Figure]]:
    """Draws everything that the runs have; yields (file name, figure)."""
    best, diverged = best_of(found.rows), [run for run in found.runs if run.state == DIVERGED]
    unit = found.loss_unit
    for number, start in enumerate(range(0, len(best), len(_COLOURS)), start=1):
        some = best[start : start + len(_COLOURS)]
        yield f"loss_curves_{number}.png", _curves(some, [label(row, found.rows) for row in some], diverged, unit)
    loss, m = f"held-out loss [{unit}]", "m, random features per head"
    if _values(lines := _lines(found.rows, diverged, LEARNING_RATE, LEARNING_RATES))[1:]:
        yield "learning_rates.png", _against(lines, "learning rate", 10, loss)
    if _values(lines := _lines(found.rows, [], M_FEATURES, (M_FEATURES, *LEARNING_RATES)))[1:]:
        yield "features.png", _against(lines, m, 2, loss)
    if _values(lines := _calibrated_lines(found.calibrations))[1:]:
        yield "calibration_features.png", _against(lines, m, 2, "relative error of attention")
    for number, calibration in enumerate(found.calibrations, start=1):
        yield f"attention_error_{number}.png", _error_map(calibration)
    for number, spectra in enumerate(found.spectra, start=1):
        yield f"spectra_{number}.png", _spectra(spectra)


def _lines(rows: Sequence[Row], diverged: Sequence[ReportedRun], field: str, without: tuple[str, ...]) -> list[_Line]:
    """One line for the rows that differ only in the fields `without`, with the best row at each value of `field`."""
    failed = [Row(run.settings, (run,), 1) for run in diverged]  # only their settings are used
    lines = []
    for members in grouped([*rows, *failed], without):
        finished = best_of([row for row in members if row in rows], tuple(set(without) - {field}))
        points = sorted((row.settings[field], row.mean()) for row in finished if field in row.settings)
        level = finished[0].mean() if finished and not points else None
        crosses = sorted({row.settings[field] for row in members if row in failed and field in row.settings})
        lines.append(_Line(label(members[0], [*rows, *failed], without), points, level, crosses))
    return lines


def _calibrated_lines(calibrations: Sequence[Calibration]) -> list[_Line]:
    """The mean error after calibration against m, one line per mechanism and window."""
    lines: dict[str, _Line] = {}
    for one in sorted(calibrations, key=lambda one: (one.mechanism, one.window, one.num_features)):
        name = f"{one.mechanism}, window {one.window}"
        error = Mean(list(one.mean_errors.values())[-1], None, 1)
        lines.setdefault(name, _Line(name, [], None, [])).points.append((one.num_features, error))
    return list(lines.values())


def _values(lines: Sequence[_Line]) -> list[float]:
    """The values on the x axis."""
    return sorted({x for line in lines for x in (*(x for x, _ in line.points), *line.crosses)})


def _curves(rows: Sequence[Row], labels: Sequence[str], diverged: Sequence[ReportedRun], loss_unit: str) -> Figure:
    """Training loss (running mean) and held-out loss against the step.

    A line is the mean over seeds, its band reaches from the lowest to the highest seed. The training loss of a diverged
    run ends in a cross.
    """
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    training, heldout = figure.subplots(1, 2)
    for i, (row, text) in enumerate(zip(rows, labels, strict=True)):
        for axes, name, look in ((training, "loss", _look(i) | {"marker": ""}), (heldout, LOSS, _look(i))):
            curves = [run.curve(name) for run in row.runs]
            steps = np.array(sorted(set.intersection(*map(set, curves))))
            if not len(steps):
                continue
            values = np.array([[curve[step] for step in steps] for curve in curves])  # [seeds, steps]
            if axes is training:
                width = max(1, len(steps) // _SMOOTHED)
                windows = np.lib.stride_tricks.sliding_window_view(values, width, axis=1)
                steps, values = steps[width - 1 :], windows.mean(axis=-1)
            axes.plot(steps, values.mean(axis=0), label=text, **look)
            band = {"color": look["color"], "alpha": 0.15, "linewidth": 0}
            axes.fill_between(steps, values.min(axis=0), values.max(axis=0), **band)
    for curve in filter(None, (run.curve("loss") for run in diverged)):
        training.plot(list(curve), list(curve.values()), color="0.55", linewidth=0.8)
        training.plot(max(curve), curve[max(curve)], "x", color="#D55E00", markersize=9, markeredgewidth=2)
    for axes, title in ((training, "training, running mean"), (heldout, "held out")):
        axes.set(xlabel="step", ylabel=f"loss [{loss_unit}]", title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    return _with_legend(figure, heldout)


def _against(lines: Sequence[_Line], xlabel: str, base: int, ylabel: str) -> Figure:
    """Lines with error bars; the x axis is logarithmic to `base`, crosses above the lines mark diverged runs."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    means = [mean.mean for line in lines for mean in (*(y for _, y in line.points), line.level) if mean]
    top, low = max(means, default=1.0), min(means, default=0.0)
    height = top + 0.15 * max(top - low, 0.01 * abs(top))
    for i, line in enumerate(lines):
        look = _look(i)
        if line.level is not None:
            axes.axhline(line.level.mean, label=line.label, **look | {"marker": ""})
        else:
            errors = [np.nan if y.standard_error is None else y.standard_error for _, y in line.points]
            xs, ys = [x for x, _ in line.points], [y.mean for _, y in line.points]
            axes.errorbar(xs, ys, yerr=errors, label=line.label, capsize=3, **look)
        cross = {"color": look["color"], "markersize": 10 - i % 3, "markeredgewidth": 2}
        axes.plot(line.crosses, [height] * len(line.crosses), "x", **cross)
    if any(line.crosses for line in lines):
        axes.axhline(height, color="0.7", linewidth=0.8, linestyle=":")
        axes.annotate(" diverged", (1, height), xycoords=("axes fraction", "data"), va="center", annotation_clip=False)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_xscale("log", base=base)
    axes.minorticks_off()
    axes.set_xticks(_values(lines), [f"{x:g}" for x in _values(lines)])  # not powers of the base
    axes.grid(alpha=0.3)
    return _with_legend(figure, axes)


def _error_map(calibration: Calibration) -> Figure:
    """Relative error of attention by layer and head: one panel per stage, on one scale."""
    errors = calibration.errors
    rows, heads = next(iter(errors.values())).shape
    scale = {"vmin": 0, "vmax": max(values.max() for values in errors.values()), "cmap": "cividis"}
    size = (max(1.6 + len(errors) * (1.2 + 0.24 * heads), 5.5), max(2.4, 1.4 + 0.2 * rows))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(errors), squeeze=False)[0]
    for axes, (stage, values) in zip(panels, errors.items(), strict=True):
        picture = axes.imshow(values, aspect="auto", interpolation="nearest", **scale)
        axes.set(title=f"{stage.replace('_', ' ')}: {values.mean():.3f}", xlabel="head")
        shown = range(0, rows, -(-rows // 12))
        axes.set_yticks(shown, [str(calibration.layers[row]) for row in shown])
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel("layer")
    figure.colorbar(picture, ax=list(panels), label="relative error")
    return figure


def _spectra(spectra: Spectra) -> Figure:
    """Eigenvalues of Sigma by rank: one line per layer (geometric mean over heads); dashed: M = geometry_init * I."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    scale = matplotlib.colors.Normalize(min(spectra.layers), max(max(spectra.layers), min(spectra.layers) + 1))
    colours = matplotlib.cm.ScalarMappable(scale, "viridis")
    means = np.exp(np.log(np.maximum(spectra.eigenvalues, np.finfo(np.float32).tiny)).mean(axis=1))  # [layers, ranks]
    for layer, mean in zip(spectra.layers, means, strict=True):
        axes.plot(np.arange(1, len(mean) + 1), mean, color=colours.cmap(scale(layer)), linewidth=1.2)
    axes.axhline(spectra.initial, color="#D55E00", linestyle="--", label=f"initial: {spectra.initial:g}")
    axes.set(xlabel="rank of the eigenvalue", ylabel="eigenvalue of Σ = MᵀM", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.colorbar(colours, ax=axes, label="layer", ticks=MaxNLocator(integer=True))
    return figure


def _look(i: int) -> dict[str, Any]:
    place = i % len(_COLOURS)
    marker = _MARKERS[(i + i // len(_COLOURS)) % len(_MARKERS)]  # each round pairs it with another colour
    return {"color": _COLOURS[place], "linestyle": _STYLES[place], "marker": marker, "linewidth": 1.6, "markersize": 5}


def _with_legend(figure: Figure, axes: Axes) -> Figure:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    return figure
