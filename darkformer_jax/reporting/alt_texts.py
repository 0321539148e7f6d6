"""What the pictures show, in sentences with the numbers, for people who do not see them."""

from collections.abc import Sequence

import numpy as np

from darkformer_jax.reporting.calibrations import Calibration
from darkformer_jax.reporting.curves import Curve, Line
from darkformer_jax.reporting.spectra import Spectra

_FEW = 4  # points that are all named, and layers


def of_curves(title: str, curves: Sequence[Curve], num_diverged: int, unit: str) -> str:
    """`Loss, held out, in nats per token. softmax: 5.1 at step 10, falling to 3.2 at step 60. ...`."""
    said = [f"Curves of the loss ({title}) in {unit} against the step."]
    for curve in curves:
        first, last = curve.mean[0], curve.mean[-1]
        end = f" and {last:.4g} at step {curve.steps[-1]:,}" if len(curve.steps) > 1 else ""
        lowest = int(np.argmin(curve.mean))
        if 0 < lowest < len(curve.steps) - 1 and f"{curve.mean[lowest]:.4g}" != f"{last:.4g}":
            end = f", lowest {curve.mean[lowest]:.4g} at step {curve.steps[lowest]:,},{end}"
        said.append(f"{curve.label}: {first:.4g} at step {curve.steps[0]:,}{end}.")
    if num_diverged:
        said.append(f"Diverged runs that end early: {num_diverged}.")
    return " ".join(said)


def of_lines(lines: Sequence[Line], xlabel: str, ylabel: str) -> str:
    """`Held-out loss against m. dark: 3.2 at 8, 3.1 at 16. softmax: 3 everywhere.`."""
    said = [f"Lines of the {ylabel} against the {xlabel}."]
    for line in lines:
        parts = [f"{line.level.mean:.4g} everywhere"] if line.level else _points(line)
        parts += [f"diverged at {' and '.join(f'{x:g}' for x in line.crosses)}"] if line.crosses else []
        said.append(f"{line.label}: {', '.join(parts)}.")
    return " ".join(said)


def _points(line: Line) -> list[str]:
    """All points if they are few, else the first, the lowest and the last."""
    lowest = min(line.points, key=lambda point: point[1].mean, default=None)
    chosen = line.points if len(line.points) <= _FEW else [line.points[0], lowest, line.points[-1]]
    texts = [
        f"{'lowest ' * (point is lowest and len(line.points) > 1)}{point[1].mean:.4g} at {point[0]:g}"
        for point in chosen
        if point is not None
    ]
    return list(dict.fromkeys(texts))


def of_errors(calibration: Calibration, stage: str) -> str:
    """`Relative errors after: 0.12 in the mean, from 0.1 (layer 0, head 1) to 0.2 (layer 1, head 0).`."""
    errors = calibration.errors[stage]

    def place(index: np.intp) -> str:
        layer, head = np.unravel_index(index, errors.shape)
        return f"{errors[layer, head]:.3g} (layer {calibration.layers[layer]}, head {head})"

    return (
        f"A map of the relative error by layer and head, {stage.replace('_', ' ')}: {errors.mean():.3g} in the mean, "
        f"from {place(errors.argmin())} to {place(errors.argmax())}."
    )


def of_spectra(spectra: Spectra) -> str:
    """`Lines of the eigenvalues ... Layer 0 falls from 1.2 to 0.9.`: the means over heads that the lines show."""
    said = [f"Lines of the eigenvalues of Σ in {spectra.workdir} by rank; all began at {spectra.initial:g}."]
    if len(spectra.layers) <= _FEW:
        ends = zip(spectra.layers, spectra.means, strict=True)
        said += [f"Layer {layer} falls from {mean[0]:.3g} to {mean[-1]:.3g}." for layer, mean in ends]
    else:
        largest, smallest = spectra.means[:, 0], spectra.means[:, -1]
        said.append(
            f"Of {len(spectra.layers)} layers, layer {spectra.layers[largest.argmax()]} has the largest, "
            f"{largest.max():.3g}, and layer {spectra.layers[smallest.argmin()]} the smallest, {smallest.min():.3g}."
        )
    return " ".join(said)
