"""Draws a run's loss curve, while it trains and at its end."""

import io
import time
from collections.abc import Callable
from pathlib import Path

import jax
from absl import logging

from darkformer_jax.data.files import write_atomically
from darkformer_jax.errors import UserError, one_line
from darkformer_jax.runs.metrics import METRICS_FILE, read_metrics
from darkformer_jax.runs.workdir import Workdir

LOSS_CURVE_FILE = "loss_curve.png"

_SHARE = 0.02  # of a run's time, at most, is spent on the picture, which takes longer the more lines there are


class LossCurve:
    """Renews loss_curve.png while a run trains. Only process 0 draws.

    Args:
      workdir: the run's directory.
      clock: monotonic seconds; tests pass their own.
    """

    def __init__(self, workdir: Workdir, clock: Callable[[], float] = time.monotonic) -> None:
        self._workdir, self._clock = workdir, clock
        self._not_before = -float("inf")
        self._warned = False

    def renew(self) -> None:
        """Draws the curve anew, unless it did so just now. A picture that fails ends no run: one warning says why."""
        began = self._clock()
        if jax.process_index() != 0 or began < self._not_before:
            return
        try:
            draw_loss_curve(self._workdir)
        except Exception as error:  # whatever matplotlib, its fonts and its directories may raise
            if not self._warned:
                logging.warning("%s is not renewed: %s; training goes on", LOSS_CURVE_FILE, one_line(error))
            self._warned = True
        ended = self._clock()
        self._not_before = ended + (ended - began) / _SHARE


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
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    try:
        write_atomically(path, picture.getvalue())  # somebody may be looking at it
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return path
