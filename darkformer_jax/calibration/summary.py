"""What a calibration found, in lines for people."""

from typing import Any

import numpy as np

from darkformer_jax.calibration.fitting import Calibrated, FitOptions
from darkformer_jax.calibration.head_choice import head_lines
from darkformer_jax.calibration.quality_curve import curve_lines
from darkformer_jax.calibration.sight import copies_are_shown

_SMALL_ERROR = 0.05  # of attention; below it, a window leaves nothing for features to do


def summary(o: FitOptions, out: str, found: Calibrated) -> str:
    """The errors of attention, layers whose features are idle, what was chosen, and what the model loses."""
    rows = found.layers
    names = [name for name in ("window_only", "before", "after") if rows and name in rows[0]]
    means = {name: np.mean([row[name] for row in rows]) for name in names}
    shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in means.items())
    lines = [f"{out}: relative error of attention over {len(rows)} layers: {shown}"]
    idle = [str(row["layer"]) for row in rows if _features_are_idle(row)]
    if idle and o.mechanism != "window_only":
        lines.append(
            f"layers {','.join(idle)}: features give nothing that the window does not; see --geometry=balanced"
        )
    if found.choice is not None:
        lines += curve_lines(found.choice.points, found.choice.number, found.choice.context)
    if found.heads is not None:
        lines += head_lines(found.heads)
    lines += found.worth.lines()
    if copies_are_shown(o.window, found.copy_distance):
        back = f"{found.copy_distance} tokens back"
        lines.append(f"copy: the first copy lies in the window, {back}, so no feature is asked")
    return "\n".join(lines)


def _features_are_idle(row: dict[str, Any]) -> bool:
    """Whether a layer's error is that of its window alone, or larger, where the window leaves one."""
    window = np.mean(row.get("window_only", 0.0))
    return bool(window > _SMALL_ERROR and np.mean(row["after"]) > 0.99 * window)
