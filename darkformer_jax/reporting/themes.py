"""The colours of a page and of its pictures, on a light and on a dark ground.

Lines have a contrast of at least 3 : 1 with the ground, text has 4.5 : 1 (WCAG 2.1, AA).
"""

from typing import Any, NamedTuple


class Theme(NamedTuple):
    """One set of colours, as `#rrggbb`."""

    ground: str
    ink: str
    soft: str  # less important text
    rule: str  # borders and grids
    warning: str  # crosses of runs that diverged, and where lines began
    colours: tuple[str, ...]  # of lines, told apart by people who confuse red and green, too
    viridis: tuple[float, float]  # the part of that map that the ground leaves visible

    @property
    def settings(self) -> dict[Any, Any]:
        """Matplotlib's settings for a picture."""
        text = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
        grounds = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
        return {
            **dict.fromkeys(text, self.ink),
            **dict.fromkeys(grounds, self.ground),
            "grid.color": self.rule,
            "legend.edgecolor": self.rule,
            "font.size": 11,
            "axes.titlesize": 11,
            "legend.fontsize": 10,
        }


# Okabe and Ito's palette, whose lighter colours are darker here.
LIGHT = Theme(
    ground="#ffffff",
    ink="#1b1f24",
    soft="#57606a",
    rule="#d0d7de",
    warning="#d55e00",
    colours=("#000000", "#0072b2", "#d55e00", "#008f68", "#b8508f", "#9c6f00", "#3a8fc4"),
    viridis=(0.0, 0.6),
)
# The same hues, lighter.
DARK = Theme(
    ground="#0d1117",
    ink="#e6edf3",
    soft="#9aa4af",
    rule="#30363d",
    warning="#ff9248",
    colours=("#e6edf3", "#4da3e0", "#ff9248", "#2fc79a", "#e59ac6", "#e9b93b", "#9ad4f5"),
    viridis=(0.35, 1.0),
)
