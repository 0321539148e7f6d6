"""Draws a run's loss curve."""

from pathlib import Path

from darkformer_jax.errors import UserError
from darkformer_jax.runs.metrics import METRICS_FILE, read_metrics
from darkformer_jax.runs.workdir import Workdir

LOSS_CURVE_FILE = "loss_curve.png"


def draw_loss_curve(workdir: Workdir) -> Path:
    """Draws `loss` (training) and `heldout_loss` of metrics.jsonl against the step; returns loss_curve.png's path.

    Raises UserError if metrics.jsonl is absent, holds neither, or the picture cannot be written.
    """
    # Imported here, because the import takes half a second that generation and evaluation need not spend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = workdir / LOSS_CURVE_FILE
    lines = read_metrics(workdir)
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    axes = figure.add_subplot()
    for name, label, style in (("loss", "training", "-"), ("heldout_loss", "held out", "o-")):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=4)
    if not axes.lines:
        raise UserError(f"{workdir / METRICS_FILE} has no loss to draw")
    axes.set(xlabel="step", ylabel="loss", title=workdir.local.absolute().name)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return path
