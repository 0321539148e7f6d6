"""Runs that differ in nothing but the seed are one row; its figures are means with their standard errors."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from darkformer_jax.errors import UserError
from darkformer_jax.reporting.runs import DIVERGED, FINISHED, Run
from darkformer_jax.reporting.settings import LEARNING_RATES, MECHANISM, Settings, key_of, role

LOSS = "heldout_loss"

_ROLES = ("exact", "dark", "performer", "lfk", "", "control")
_IN_ORDER = (
    "model.attention.num_features",
    "model.attention.window",
    "model.attention.num_sinks",
    "num_steps",
    "optimizer.learning_rate",
    "optimizer.geometry_learning_rate",
)


class Mean(NamedTuple):
    """A mean over seeds and its standard error, sd / sqrt(n) with n - 1 in sd; None for one seed."""

    mean: float
    error: float | None

    @staticmethod
    def of(values: Sequence[float]) -> "Mean":
        error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
        return Mean(float(np.mean(values)), error)

    def text(self, digits: int = 4, scale: float = 1.0, sign: str = "") -> str:
        """`1.2345 ± 0.0012`."""
        spread = "" if self.error is None else f" ± {scale * self.error:.{digits}f}"
        return f"{scale * self.mean:{sign}.{digits}f}{spread}"

    def percent(self, digits: int) -> str:
        """`40.80%` or `(40.80 ± 0.12)%`."""
        text = self.text(digits, 100)
        return f"{text}%" if self.error is None else f"({text})%"


@dataclass(frozen=True, eq=False)
class Row:
    """Finished runs of one experiment, by seed, at least one. Compared by identity."""

    settings: Settings
    runs: tuple[Run, ...]
    num_diverged: int  # runs of the same experiment that are not among them

    def by_seed(self, figure: str = LOSS) -> dict[int, float]:
        """seed -> the figure after the last step."""
        return {run.seed: run.final[figure] for run in self.runs}

    def mean(self, figure: str = LOSS) -> Mean:
        """Over the seeds."""
        return Mean.of(list(self.by_seed(figure).values()))


def group(runs: Iterable[Run]) -> list[Row]:
    """The rows of the finished runs, in the order of the table: exact, DARK, Performer, others, controls.

    Raises UserError where two finished runs are the same experiment with the same seed: together they would feign
    another sample.
    """
    groups: dict[str, list[Run]] = {}
    diverged: dict[str, int] = {}
    for run in runs:
        key = key_of(run.settings)
        if run.state == FINISHED:
            groups.setdefault(key, []).append(run)
        elif run.state == DIVERGED:
            diverged[key] = diverged.get(key, 0) + 1
    rows = []
    for key, members in groups.items():
        members.sort(key=lambda run: run.seed)
        for a, b in itertools.pairwise(members):
            if a.seed == b.seed:
                raise UserError(
                    f"{a.workdir} and {b.workdir} are the same experiment with seed {a.seed}; leave one out"
                )
        rows.append(Row(members[0].settings, tuple(members), diverged.get(key, 0)))
    return sorted(rows, key=_place)


def best_of(rows: Iterable[Row], without: tuple[str, ...] = LEARNING_RATES) -> list[Row]:
    """Of rows that are equal but for `without`, the one with the lowest mean held-out loss; the order is kept."""
    best: dict[str, Row] = {}
    for row in rows:
        key = key_of(row.settings, without)
        if key not in best or row.mean().mean < best[key].mean().mean:
            best[key] = row
    return list(best.values())


def _place(row: Row) -> tuple:
    numbers = tuple(row.settings.get(name, -1) for name in _IN_ORDER)
    own = role(row.settings)
    return (_ROLES.index(own if own in _ROLES else ""), row.settings[MECHANISM], numbers)
