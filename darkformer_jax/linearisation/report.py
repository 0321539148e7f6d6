"""What a linearisation has to show: the figures of the exact model and after each stage, as table, picture and JSON."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from darkformer_jax.calibration.sight import copies_are_shown
from darkformer_jax.data.files import read_json_object, write_atomically, write_json
from darkformer_jax.linearisation.figures import Figures
from darkformer_jax.linearisation.settings import Settings
from darkformer_jax.linearisation.text import Text
from darkformer_jax.tasks.table import table_lines

REPORT_FILE, PICTURE_FILE = "report.json", "report.png"
EXACT = "exact"

Rows = dict[str, Figures]  # of the exact model and of each stage that is done, in their order


def read_rows(out: Path, about: Mapping[str, Any]) -> Rows:
    """The figures that earlier commands measured with the same `about`; see `write_rows`."""
    path = out / REPORT_FILE
    saved = read_json_object(str(path)) if path.is_file() else {}
    if not saved or any(saved.get(name) != value for name, value in about.items()):
        return {}
    return {name: Figures(**figures) for name, figures in saved["models"].items()}


def write_rows(out: Path, rows: Rows, about: Mapping[str, Any]) -> None:
    """Writes report.json. about: what holds for all rows."""
    models = {name: figures._asdict() for name, figures in rows.items()}
    write_json(out / REPORT_FILE, {**about, "models": models})


def describe(rows: Rows, text: Text, settings: Settings) -> str:
    """The table for people."""
    exact, (count, size) = rows[EXACT], text.copied.shape
    head = (
        f"{exact.tokens:,} held-out tokens in windows of {settings.longest:,}; copy: {count} passages of {size:,} "
        "held-out tokens, each followed by itself; nats per token of the second"
    )
    if copies_are_shown(settings.window, size):
        head += f" (the first lies in the window of {settings.window:,}, so no feature is asked)"
    cells = [("after", "bits/byte", "over exact", "copy")]
    for name, figures in rows.items():
        over = "" if name == EXACT else f"{100 * (figures.bits_per_byte / exact.bits_per_byte - 1):.2f}%"
        cells.append((name, f"{figures.bits_per_byte:.4f}", over, f"{figures.copy:.3f}"))
    return "\n".join([head, *table_lines(cells)])


def draw(out: Path, rows: Rows) -> Path:
    """Draws both figures by stage, and the exact model's as a line; returns the picture's path."""
    # Imported here, because the import takes half a second that --help need not spend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    stages = [name for name in rows if name != EXACT]
    panels = (("bits_per_byte", "bits per byte, held out"), ("copy", "copy [nats per token]"))
    for place, (name, label) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, place)
        axes.plot(stages, [getattr(rows[stage], name) for stage in stages], "o-", label="after the stage")
        axes.axhline(getattr(rows[EXACT], name), linestyle="--", color="black", label=EXACT)
        axes.set(ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    write_atomically(out / PICTURE_FILE, picture.getvalue())
    return out / PICTURE_FILE
