"""Quality against cache: what a model is worth with 0, 2, 4, ... exact layers, as a table and as a picture."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from darkformer_jax.calibration.cache_budget import CacheSizes, show_bytes
from darkformer_jax.calibration.hybrids import Quality
from darkformer_jax.data.files import write_file
from darkformer_jax.tasks.table import table_lines

CURVE_FILE = "exact_layers.png"

_MEASURED = 8  # exact layers, at least, where the model has as many


class Point(NamedTuple):
    """One model of the curve.

    Attributes:
      layers: those that are exact, in the order in which they were chosen.
      loss, copy: see `Quality`; on passages that nothing was chosen or fitted on.
      cache_bytes: of one sequence, all layers' caches and states.
    """

    layers: list[int]
    loss: float
    copy: float
    cache_bytes: int


def counts_of(chosen: int, candidates: int) -> list[int]:
    """The numbers of exact layers to measure: 0, 2, 4, ... beyond the chosen one, which is among them, and all."""
    last = min(max(_MEASURED, chosen + 2), candidates)
    return sorted({*range(0, last + 1, 2), chosen, candidates})


def points_of(ranked: Sequence[int], counts: Sequence[int], found: Sequence[Quality], sizes: CacheSizes) -> list[Point]:
    """The curve of the models whose first layers, in the ranking, are exact."""
    chosen = [list(ranked[:count]) for count in counts]
    return [Point(layers, *quality, sizes.total(layers)) for layers, quality in zip(chosen, found, strict=True)]


def curve_lines(points: Sequence[Point], chosen: int, context: int) -> list[str]:
    """The curve as a table; its last point is the exact model. A star marks the chosen one."""
    exact = points[-1]
    rows = [["exact layers", "loss", "over exact", "copy", f"cache at {context:,}", "of exact"]]
    for point in points:
        star = "*" if len(point.layers) == chosen else ""
        name = "all" if point is exact else f"{len(point.layers)}{star}"
        over = f"{100 * (point.loss / exact.loss - 1):.2f}%"
        share = f"{100 * point.cache_bytes / exact.cache_bytes:.1f}%"
        rows.append([name, f"{point.loss:.4f}", over, f"{point.copy:.3f}", show_bytes(point.cache_bytes), share])
    layers = ",".join(map(str, sorted(next(p.layers for p in points if len(p.layers) == chosen))))
    legend = "loss: nats per token of test passages; copy: nats per token of the second half of passages repeated"
    return [*table_lines(rows), f"* chosen: layers {layers} stay exact. {legend}."]


def draw_curve(points: Sequence[Point], chosen: int, context: int, path: Path) -> None:
    """Draws loss and copying against the cache; the dashed lines are the exact model's. Raises UserError."""
    # Imported here, because the import takes half a second that other verbs need not spend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    *some, exact = points
    megabytes = [point.cache_bytes / 1e6 for point in some]
    panels = zip(figure.subplots(1, 2), ("loss", "copy"), ("loss", "copying a repeated passage"), strict=True)
    for axes, name, title in panels:
        values = [getattr(point, name) for point in some]
        axes.plot(megabytes, values, "o-", linewidth=1.2, markersize=4)
        for point, x, y in zip(some, megabytes, values, strict=True):
            number = len(point.layers)
            weight = "bold" if number == chosen else "normal"
            axes.annotate(f"{number}", (x, y), (4, 4), textcoords="offset points", fontweight=weight)
        axes.axhline(getattr(exact, name), linestyle="--", color="grey", linewidth=1)
        label = f"cache at {context:,} tokens [MB]; exact: {exact.cache_bytes / 1e6:,.0f}"
        axes.set(xlabel=label, ylabel=f"{name} [nats per token]", title=title)
        axes.grid(alpha=0.3)
    figure.suptitle("by the number of exact layers; the chosen one is bold, dashed: all layers exact")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    write_file(str(path), picture.getvalue())
