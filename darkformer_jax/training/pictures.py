"""What a run leaves for people: the loss curve, and what general compressors make of the same bytes."""

import gzip
import lzma
import os
from pathlib import Path

from darkformer_jax.errors import UserError
from darkformer_jax.runs.metrics import read_metrics
from darkformer_jax.runs.store import local_path


def loss_curve(workdir: str | os.PathLike[str]) -> Path:
    """Draws `loss` (training) and `heldout_loss` of metrics.jsonl against the step; returns loss_curve.png's path.

    Raises UserError if metrics.jsonl is absent, holds neither, or the picture cannot be written.
    """
    # Imported here: half a second that generation and evaluation need not spend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = local_path(workdir) / "loss_curve.png"
    lines = read_metrics(workdir)
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    axes = figure.add_subplot()
    for name, label, style in (("loss", "training", "-"), ("heldout_loss", "held out", "o-")):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=4)
    if not axes.lines:
        raise UserError(f"{local_path(workdir) / 'metrics.jsonl'} has no loss to draw")
    axes.set(xlabel="step", ylabel="loss [nats a token]", title=local_path(workdir).absolute().name)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def compressors(data: bytes) -> dict[str, float]:
    """Bits per byte of `data` under `gzip -9` and `xz -9`: what a language model's bits per byte should beat.

    About 0.1 s and 0.5 s a MB; xz holds up to 0.7 GB while it works. Raises ValueError if `data` is empty.
    """
    if not data:
        raise ValueError("nothing to compress")
    return {
        "gzip -9": 8 * len(gzip.compress(data, compresslevel=9)) / len(data),
        "xz -9": 8 * len(lzma.compress(data, preset=9)) / len(data),
    }
