"""Plots rows, calibrations and spectra, for a light and a dark page. Lines differ in colour, style and marker."""

import functools
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from darkformer_jax.reporting import alt_texts
from darkformer_jax.reporting.calibrations import Calibration
from darkformer_jax.reporting.curves import Curve, Line, calibrated_lines, curves_of, lines_of, values
from darkformer_jax.reporting.findings import Findings
from darkformer_jax.reporting.reported_runs import DIVERGED, LOSS
from darkformer_jax.reporting.rows import best_of
from darkformer_jax.reporting.settings import LEARNING_RATE, LEARNING_RATES, M_FEATURES
from darkformer_jax.reporting.spectra import Spectra
from darkformer_jax.reporting.themes import LIGHT, Theme

PIXELS_PER_INCH = 192  # two per pixel of CSS

_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
_MARKERS = "osD^vPX"
_WIDTH = 5.6  # inches: letters stay legible where a phone makes it smaller
_HEIGHT = 3.6  # of a plot without its legend
_TITLE = 44  # characters of a workdir, the last ones
_FEW = 6  # layers that have a legend; more have a colour bar


class Picture(NamedTuple):
    """A file of the page."""

    name: str
    alt: str  # what it shows, for those who do not see it
    draw: Callable[[Theme], Figure]

    def png(self, theme: Theme) -> bytes:
        """The file's content in the colours of `theme`."""
        content = io.BytesIO()
        with matplotlib.rc_context(theme.settings):
            self.draw(theme).savefig(content, format="png", dpi=PIXELS_PER_INCH)
        return content.getvalue()


def pictures_of(found: Findings) -> list[Picture]:
    """Everything that the runs have, not drawn yet."""
    unit = found.loss_unit
    pictures = []
    best, diverged = best_of(found.rows), [run for run in found.runs if run.state == DIVERGED]
    for number, start in enumerate(range(0, len(best), len(LIGHT.colours)), start=1):
        some = best[start : start + len(LIGHT.colours)]
        for name, title in (("loss", "training"), (LOSS, "held out")):
            curves = curves_of(some, found.rows, name)
            failed = [curve for run in diverged if (curve := run.curve(name))] if name == "loss" else []
            alt = alt_texts.of_curves(title, curves, len(failed), unit)
            draw = functools.partial(_curves, title, curves, failed, unit)
            pictures.append(Picture(f"loss_curves_{number}_{title.replace(' ', '_')}.png", alt, draw))
    loss, m = f"held-out loss [{unit}]", "m, random features per head"
    for name, lines, xlabel, base, ylabel in (
        ("learning_rates", lines_of(found.rows, diverged, LEARNING_RATE, LEARNING_RATES), "learning rate", 10, loss),
        ("features", lines_of(found.rows, [], M_FEATURES, (M_FEATURES, *LEARNING_RATES)), m, 2, loss),
        ("calibration_features", calibrated_lines(found.calibrations), m, 2, "relative error of attention"),
    ):
        if len(values(lines)) > 1:
            draw = functools.partial(_against, lines, xlabel, base, ylabel)
            pictures.append(Picture(f"{name}.png", alt_texts.of_lines(lines, xlabel, ylabel), draw))
    for table in found.probes:
        lines, (xlabel, ylabel) = table.lines, table.axes
        if len(values(lines)) > 1:
            draw = functools.partial(_against, lines, xlabel, 2, ylabel)
            pictures.append(Picture(f"probe_{table.probe}.png", alt_texts.of_lines(lines, xlabel, ylabel), draw))
    for number, calibration in enumerate(found.calibrations, start=1):
        for stage in calibration.errors:
            alt, draw = alt_texts.of_errors(calibration, stage), functools.partial(_error_map, calibration, stage)
            pictures.append(Picture(f"attention_error_{number}_{stage}.png", alt, draw))
    for number, spectra in enumerate(found.spectra, start=1):
        draw = functools.partial(_spectra, spectra)
        pictures.append(Picture(f"spectra_{number}.png", alt_texts.of_spectra(spectra), draw))
    return pictures


def _curves(
    title: str, curves: Sequence[Curve], diverged: Sequence[dict[int, float]], loss_unit: str, theme: Theme
) -> Figure:
    """Loss against the step. A band reaches from the lowest to the highest seed; a diverged run ends in a cross."""
    figure, axes = _new(len(curves))
    for i, curve in enumerate(curves):
        look = _look(theme, i) | ({"marker": ""} if curve.is_smooth else {})
        axes.plot(curve.steps, curve.mean, label=curve.label, **look)
        band = {"color": look["color"], "alpha": 0.18, "linewidth": 0}
        axes.fill_between(curve.steps, curve.lowest, curve.highest, **band)
    for failed in diverged:
        axes.plot(list(failed), list(failed.values()), color=theme.soft, linewidth=0.8)
        axes.plot(max(failed), failed[max(failed)], "x", color=theme.warning, markersize=9, markeredgewidth=2)
    axes.set(xlabel="step", ylabel=f"loss [{loss_unit}]", title=title)
    axes.xaxis.set_major_locator(_whole_numbers())
    return _with_legend(figure, axes)


def _against(lines: Sequence[Line], xlabel: str, base: int, ylabel: str, theme: Theme) -> Figure:
    """Lines with error bars; the x axis is logarithmic to `base`, crosses above the lines mark diverged runs."""
    figure, axes = _new(len(lines))
    means = [mean.mean for line in lines for mean in (*(y for _, y in line.points), line.level) if mean]
    top, low = max(means, default=1.0), min(means, default=0.0)
    height = top + 0.15 * max(top - low, 0.01 * abs(top))
    for i, line in enumerate(lines):
        look = _look(theme, i)
        if line.level is not None:
            axes.axhline(line.level.mean, label=line.label, **look | {"marker": ""})
        else:
            errors = [np.nan if y.standard_error is None else y.standard_error for _, y in line.points]
            xs, ys = [x for x, _ in line.points], [y.mean for _, y in line.points]
            axes.errorbar(xs, ys, yerr=errors, label=line.label, capsize=3, **look)
        cross = {"color": look["color"], "markersize": 10 - i % 3, "markeredgewidth": 2}
        axes.plot(line.crosses, [height] * len(line.crosses), "x", **cross)
    if any(line.crosses for line in lines):
        axes.axhline(height, color=theme.soft, linewidth=0.8, linestyle=":")
        axes.annotate("diverged ", (0, height), xycoords=("axes fraction", "data"), va="bottom", xytext=(4, 2),
                      textcoords="offset points")  # fmt: skip
        axes.margins(y=0.12)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_xscale("log", base=base)
    axes.minorticks_off()
    axes.set_xticks(values(lines), [f"{x:g}" for x in values(lines)])  # not powers of the base
    return _with_legend(figure, axes)


def _error_map(calibration: Calibration, stage: str, theme: Theme) -> Figure:
    """Relative error of attention by layer and head after a stage, on the scale of all stages."""
    errors = calibration.errors[stage]
    highest = max(every.max() for every in calibration.errors.values())
    num_layers, heads = errors.shape
    figure = Figure(figsize=(max(3.4, 2 + 0.24 * heads), max(2.6, 1.6 + 0.2 * num_layers)), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(errors, aspect="auto", interpolation="nearest", vmin=0, vmax=highest, cmap="cividis")
    axes.set(title=f"{stage.replace('_', ' ')}: {errors.mean():.3f}", xlabel="head", ylabel="layer")
    shown = range(0, num_layers, -(-num_layers // 12))
    axes.set_yticks(shown, [str(calibration.layers[row]) for row in shown])
    axes.xaxis.set_major_locator(_whole_numbers())
    figure.colorbar(picture, ax=axes, label="relative error").outline.set_edgecolor(theme.rule)
    return figure


def _spectra(spectra: Spectra, theme: Theme) -> Figure:
    """Eigenvalues of Sigma by rank: one line per layer (geometric mean over heads); dashed: M = geometry_init * I."""
    few = len(spectra.layers) <= _FEW
    figure, axes = _new(len(spectra.layers) + 1 if few else 1)
    scale = Normalize(min(spectra.layers), max(spectra.layers))
    colours = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(*theme.viridis, 256)))
    for i, (layer, mean) in enumerate(zip(spectra.layers, spectra.means, strict=True)):
        look = _look(theme, i) | {"marker": ""} if few else {"color": colours(scale(layer)), "linewidth": 1.2}
        axes.plot(np.arange(1, len(mean) + 1), mean, label=f"layer {layer}" if few else None, **look)
    axes.axhline(
        spectra.initial, color=theme.soft, linestyle=(0, (4, 4)), linewidth=1.2, label=f"initial: {spectra.initial:g}"
    )
    axes.set(xlabel="rank of the eigenvalue", ylabel="eigenvalue of Σ = MᵀM", yscale="log")
    axes.set_title(f"{spectra.workdir[-_TITLE:]}, step {spectra.step:,}")
    _plain_ticks(axes, float(spectra.means.max() / spectra.means.min()))
    if not few:
        bar = figure.colorbar(ScalarMappable(scale, colours), ax=axes, label="layer", ticks=_whole_numbers())
        bar.outline.set_edgecolor(theme.rule)
    return _with_legend(figure, axes)


def _whole_numbers() -> MaxNLocator:
    return MaxNLocator("auto", integer=True, steps=(1, 2, 5, 10))


def _plain_ticks(axes: Axes, ratio: float) -> None:
    """0.5 instead of 5 x 10^-1 on a logarithmic y axis, and enough ticks for values of that ratio."""
    if ratio < 1000:
        axes.yaxis.set_major_locator(LogLocator(subs="auto" if ratio < 3 else (1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter("{x:g}")


def _new(num_labels: int) -> tuple[Figure, Axes]:
    """An empty plot with room for a legend below it."""
    figure = Figure(figsize=(_WIDTH, _HEIGHT + 0.22 * num_labels), layout="constrained")
    axes = figure.subplots()
    axes.grid()
    return figure, axes


def _look(theme: Theme, i: int) -> dict[str, Any]:
    place = i % len(theme.colours)
    marker = _MARKERS[(i + i // len(theme.colours)) % len(_MARKERS)]  # each round pairs it with another colour
    return {
        "color": theme.colours[place],
        "linestyle": _STYLES[place],
        "marker": marker,
        "linewidth": 1.6,
        "markersize": 5,
    }


def _with_legend(figure: Figure, axes: Axes) -> Figure:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", frameon=False)
    return figure
