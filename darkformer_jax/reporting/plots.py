"""Plots of rows, calibrations and spectra, a PNG each. Lines differ in colour (Okabe and Ito's) and in style."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from darkformer_jax.reporting.geometry import Calibration, Spectra
from darkformer_jax.reporting.rows import LOSS, Mean, Row
from darkformer_jax.reporting.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROWS_A_FIGURE = 7  # as many as there are colours that stand out from white

_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
_MARKERS = "osD^vPX"
_SMOOTHED = 20  # a training curve's mean runs over this fraction of its points, 1 / _SMOOTHED


def draw_curves(rows: Sequence[Row], labels: Sequence[str], diverged: Sequence[Run], path: Path) -> None:
    """Training loss (running mean) and held-out loss against the step: mean over seeds, band from least to largest.

    Of diverged runs, the training loss up to a cross.
    """
    figure = _figure(11, 4.8)
    training, heldout = figure.subplots(1, 2)
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        for axes, name, width in ((training, "loss", _SMOOTHED), (heldout, LOSS, 0)):
            steps, values = _aligned(row, name)
            if not len(steps):
                continue
            if width:
                steps, values = _running_mean(steps, values, max(1, len(steps) // width))
            look = _look(i) | ({"marker": _MARKERS[i]} if axes is heldout else {})
            axes.plot(steps, values.mean(axis=0), label=label, **look)
            axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=_COLOURS[i], alpha=0.15, linewidth=0)
    for run in diverged:
        curve = run.curve("loss")
        if curve:
            training.plot(list(curve), list(curve.values()), color="0.55", linewidth=0.8)
            training.plot(max(curve), curve[max(curve)], "x", color="#D55E00", markersize=9, markeredgewidth=2)
    for axes, title in ((training, "training, running mean"), (heldout, "held out")):
        axes.set(xlabel="step", ylabel="loss [nats a token]", title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.legend(*heldout.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    _save(figure, path)


class Series(NamedTuple):
    """Held-out loss of one mechanism, by the field that a plot is about."""

    label: str
    points: dict[float, Mean]
    level: Mean | None  # where the mechanism does not have the field
    diverged: list[float]  # values of the field at which a run diverged


def draw_against(series: Sequence[Series], name: str, base: int, path: Path) -> None:
    """Held-out loss against a field `name`, logarithmic to `base`: a line a series, crosses where runs diverged."""
    figure = _figure(8, 5)
    axes = figure.subplots()
    means = [mean.mean for one in series for mean in [*one.points.values(), *([one.level] if one.level else [])]]
    top, low = max(means, default=1.0), min(means, default=0.0)
    height = top + 0.15 * max(top - low, 0.01 * abs(top))
    for i, one in enumerate(series):
        look = _look(i % ROWS_A_FIGURE)
        marker = _MARKERS[(i + i // ROWS_A_FIGURE) % len(_MARKERS)]  # another pair with the colour in each round
        points = sorted(one.points.items())
        if one.level is not None:
            axes.axhline(one.level.mean, label=one.label, **look)
        else:
            values, errors = [mean.mean for _, mean in points], [mean.error or 0.0 for _, mean in points]
            axes.errorbar(
                [x for x, _ in points], values, yerr=errors, label=one.label, marker=marker, capsize=3, **look
            )
        crosses = sorted(set(one.diverged))
        axes.plot(crosses, [height] * len(crosses), "x", color=look["color"], markersize=10 - i % 3, markeredgewidth=2)
    if any(one.diverged for one in series):
        axes.axhline(height, color="0.7", linewidth=0.8, linestyle=":")
        axes.annotate(" diverged", (1, height), xycoords=("axes fraction", "data"), va="center", annotation_clip=False)
    axes.set_xscale("log", base=base)
    _tick_values(axes, {x for one in series for x in (*one.points, *one.diverged)})
    axes.set(xlabel=name, ylabel="held-out loss [nats a token]")
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    _save(figure, path)


def draw_errors_against_features(calibrations: Sequence[Calibration], path: Path) -> None:
    """Mean relative error of attention after calibration against m, a line a mechanism and window."""
    figure = _figure(8, 5)
    axes = figure.subplots()
    kinds = sorted({(c.mechanism, c.window) for c in calibrations})
    for i, kind in enumerate(kinds):
        own = sorted((c.num_features, float(_last(c).mean())) for c in calibrations if (c.mechanism, c.window) == kind)
        place = i % ROWS_A_FIGURE
        label = f"{kind[0]}, window {kind[1]}"
        axes.plot([m for m, _ in own], [error for _, error in own], label=label, **_look(place), marker=_MARKERS[place])
    axes.set_xscale("log", base=2)
    _tick_values(axes, {calibration.num_features for calibration in calibrations})
    axes.set(xlabel="m, random features a head", ylabel="relative error of attention")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    _save(figure, path)


def draw_error_map(calibration: Calibration, path: Path) -> None:
    """Relative error of attention by layer and head, a panel a stage, on one scale."""
    errors = calibration.errors
    largest = max(float(values.max()) for values in errors.values())
    rows, heads = next(iter(errors.values())).shape
    figure = _figure(max(1.6 + len(errors) * (1.2 + 0.24 * heads), 5.5), max(2.4, 1.4 + 0.2 * rows))
    panels = figure.subplots(1, len(errors), squeeze=False)[0]
    for axes, (stage, values) in zip(panels, errors.items(), strict=True):
        picture = axes.imshow(values, vmin=0, vmax=largest, cmap="cividis", aspect="auto", interpolation="nearest")
        axes.set(title=f"{stage.replace('_', ' ')}: {values.mean():.3f}", xlabel="head")
        shown = range(0, rows, -(-rows // 12))
        axes.set_yticks(shown, [str(calibration.layers[row]) for row in shown])
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel("layer")
    figure.colorbar(picture, ax=list(panels), label="relative error")
    _save(figure, path)


def draw_spectra(spectra: Spectra, path: Path) -> None:
    """Eigenvalues of Sigma by rank: the mean over heads (of the logarithm) of every layer, and where M = init * I."""
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    figure = _figure(8, 4.8)
    axes = figure.subplots()
    colours = matplotlib.colormaps["viridis"]
    scale = matplotlib.colors.Normalize(min(spectra.layers), max(max(spectra.layers), min(spectra.layers) + 1))
    ranks = np.arange(1, spectra.eigenvalues.shape[-1] + 1)
    tiny = np.finfo(np.float32).tiny
    for layer, values in zip(spectra.layers, spectra.eigenvalues, strict=True):
        mean = np.exp(np.log(np.maximum(values, tiny)).mean(axis=0))
        axes.plot(ranks, mean, color=colours(scale(layer)), linewidth=1.2)
    axes.axhline(spectra.initial, color="#D55E00", linestyle="--", label=f"initial: {spectra.initial:g}")
    axes.set_yscale("log")
    axes.set(xlabel="rank of the eigenvalue", ylabel="eigenvalue of Σ = MᵀM")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.colorbar(
        matplotlib.cm.ScalarMappable(scale, colours), ax=axes, label="layer", ticks=MaxNLocator(integer=True)
    )
    _save(figure, path)


def _tick_values(axes: "Axes", values: set[float]) -> None:
    """Ticks at the values that were run, as they were given, not at powers of ten."""
    axes.minorticks_off()
    axes.set_xticks(sorted(values), [f"{value:g}" for value in sorted(values)])


def _aligned(row: Row, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps at which every seed has the value, values [seeds, steps])."""
    curves = [run.curve(name) for run in row.runs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return np.array(steps), np.array([[curve[step] for step in steps] for curve in curves], np.float64)


def _running_mean(steps: np.ndarray, values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the last `width` points, from the point on that has so many."""
    kernel = np.full(width, 1 / width)
    return steps[width - 1 :], np.stack([np.convolve(line, kernel, mode="valid") for line in values])


def _last(calibration: Calibration) -> np.ndarray:
    return list(calibration.errors.values())[-1]


def _look(i: int) -> dict[str, Any]:
    return {"color": _COLOURS[i], "linestyle": _STYLES[i], "linewidth": 1.6, "markersize": 5}


def _figure(width: float, height: float) -> "Figure":
    # Imported here: half a second that reading and refusing need not spend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    return figure


def _save(figure: "Figure", path: Path) -> None:
    figure.savefig(path, dpi=110, facecolor="white")
