"""Rows of the table. Runs that differ only in the seed share a row; its figures are means with standard errors."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from scipy import stats

from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from darkformer_jax.reporting.reported_runs import ACCURACY, DIVERGED, FIGURES, FINISHED, LOSS, ReportedRun
from darkformer_jax.reporting.settings import (
    HEADINGS,
    LEARNING_RATES,
    MECHANISM,
    ORIGIN,
    TOKENS,
    Settings,
    key_of,
    role,
)

_ABSENT = "–"  # shown for a field that the mechanism does not use
_NO_ORIGIN = "random weights"  # shown for a run without init_from
_CONFIDENCE = 0.95


class Mean(NamedTuple):
    """A mean over n seeds, and its standard error sd / sqrt(n), where sd has n - 1 in its denominator."""

    mean: float
    standard_error: float | None  # None if n = 1
    num_seeds: int  # n; 0 for a comparison of rows that share no seed

    @staticmethod
    def of(values: Sequence[float]) -> "Mean":
        error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
        return Mean(float(np.mean(values)), error, len(values))

    @property
    def is_clear(self) -> bool | None:
        """Whether the 95% confidence interval by Student's t leaves out zero; None = one seed has no interval.

        Rows that share no seed get the quantile of two seeds, the fewest that they can have: the widest interval.
        """
        if self.standard_error is None:
            return None
        quantile = stats.t.ppf((1 + _CONFIDENCE) / 2, max(self.num_seeds, 2) - 1)
        return bool(abs(self.mean) > quantile * self.standard_error)

    def text(self, digits: int = 4, scale: float = 1.0, sign: str = "") -> str:
        """`1.2345 ± 0.0012`."""
        spread = "" if self.standard_error is None else f" ± {scale * self.standard_error:.{digits}f}"
        return f"{scale * self.mean:{sign}.{digits}f}{spread}"

    def percent(self, digits: int) -> str:
        """`40.80%` or `(40.80 ± 0.12)%`."""
        text = self.text(digits, 100)
        return f"{text}%" if self.standard_error is None else f"({text})%"


@dataclass(frozen=True, eq=False)
class Row:
    """The finished runs of one experiment, at least one. Two rows are equal only if they are the same object."""

    settings: Settings
    runs: tuple[ReportedRun, ...]  # by seed
    num_diverged: int  # runs of the same experiment, not among `runs`

    def by_seed(self, figure: str = LOSS) -> dict[int, float]:
        """seed -> the held-out figure after the last step."""
        return {run.seed: run.final[figure] for run in self.runs}

    def mean(self, figure: str = LOSS) -> Mean:
        """The mean of the held-out figure over the seeds."""
        return Mean.of(list(self.by_seed(figure).values()))

    @property
    def figures(self) -> list[str]:
        """The names of the held-out figures that all its runs have."""
        return [name for name in self.runs[0].figures if all(name in run.final for run in self.runs)]

    def figure_cells(self, names: Iterable[str]) -> list[str]:
        """The means of held-out figures as text, in the order of `names`."""
        means = {name: self.mean(name) for name in self.figures}
        shown = {name: mean.percent(2) if name == ACCURACY else mean.text() for name, mean in means.items()}
        return [shown.get(name, _ABSENT) for name in names]

    @property
    def role(self) -> str:
        """The role of the mechanism in a comparison: see `settings.role`."""
        return role(self.settings)

    @property
    def mechanism(self) -> str:
        """The kinds of the layers, and whether they are exact or a control."""
        return self.settings[MECHANISM] + (f" ({self.role})" if self.role in ("exact", "control") else "")

    def cells(self, fields: Iterable[str]) -> list[str]:
        """The settings as text, in the order of `fields`."""
        return [self.shown(field) for field in fields]

    def shown(self, field: str) -> str:
        """The setting `field` as text."""
        if field == ORIGIN:
            starts = sorted({run.init_from for run in self.runs} - {""})
            return " and ".join(starts[:2]) + (f" and {len(starts) - 2} more" if len(starts) > 2 else "") or _NO_ORIGIN
        value = self.settings.get(field, _ABSENT)
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, int):
            return f"{value:,}"
        return f"{value:g}" if isinstance(value, float) else str(value) or "none"


_T = TypeVar("_T", ReportedRun, Row)


def grouped(items: Iterable[_T], without: tuple[str, ...] = ()) -> list[list[_T]]:
    """Groups runs or rows whose settings differ at most in the fields `without`; keeps their order."""
    groups: dict[str, list[_T]] = {}
    for item in items:
        groups.setdefault(key_of(item.settings, without), []).append(item)
    return list(groups.values())


def as_rows(runs: Iterable[ReportedRun]) -> list[Row]:
    """Groups the finished runs into rows, in the order of the table: exact, DARK, other estimators, mixtures, controls.

    Raises UserError if two finished runs are the same experiment with the same seed: they are not two samples.
    """
    rows = []
    for members in grouped(runs):
        finished = tuple(sorted((run for run in members if run.state == FINISHED), key=lambda run: run.seed))
        for a, b in itertools.pairwise(finished):
            if a.seed == b.seed:
                raise UserError(
                    f"{a.workdir} and {b.workdir} are the same experiment with seed {a.seed}; leave one out"
                )
        if finished:
            rows.append(Row(finished[0].settings, finished, sum(run.state == DIVERGED for run in members)))
    return sorted(rows, key=_place)


def _roles() -> list[str]:
    """The table's order of `settings.role`: estimators in the order of MIXERS, but those with an M first."""
    estimators = [kind for kind, mixer in MIXERS.items() if mixer.role == "estimator"]
    return ["exact", *sorted(estimators, key=lambda kind: "geometry_init" not in MIXERS[kind].uses), "", "control"]


def _place(row: Row) -> tuple:
    numbers = tuple(row.settings.get(name, -1) for name in HEADINGS if name != ORIGIN)
    return (_roles().index(row.role), row.settings[MECHANISM], numbers)


def best_of(rows: Iterable[Row], without: tuple[str, ...] = LEARNING_RATES) -> list[Row]:
    """Keeps one of the rows that differ only in the fields `without`: the one with the lowest mean held-out loss."""
    return [min(members, key=lambda row: row.mean().mean) for members in grouped(rows, without)]


def columns(rows: Sequence[Row]) -> dict[str, str]:
    """field -> heading, for the fields in which the rows differ, without the mechanism."""
    fields = [*HEADINGS, *sorted({name for row in rows for name in row.settings} - HEADINGS.keys() - {MECHANISM})]
    return {name: HEADINGS.get(name, name) for name in fields if len(_values(rows, name)) > 1}


def figure_columns(rows: Sequence[Row]) -> dict[str, str]:
    """name -> heading, of the held-out figures of the rows."""
    names = dict.fromkeys(name for row in rows for name in row.figures)
    return {name: FIGURES.get(name, name.removeprefix("heldout_").replace("_", " ")) for name in names}


def common_settings(rows: Sequence[Row]) -> str:
    """The settings that are equal in all rows that use the field: `learning rate 0.003, steps 400`.

    That all began from random weights, as most pages' rows do, is not said.
    """
    values = ((text, _values(rows, name)) for name, text in HEADINGS.items())
    return ", ".join(f"{text} {shown.pop()}" for text, shown in values if len(shown) == 1 and shown != {_NO_ORIGIN})


def label(row: Row, rows: Sequence[Row], without: tuple[str, ...] = ()) -> str:
    """The mechanism and the settings in which `rows` differ, without the fields `without`."""
    fields = [name for name in columns(rows) if name not in (TOKENS, *without) and row.shown(name) != _ABSENT]
    values = (f"{HEADINGS.get(name, name.rpartition('.')[2])} {row.shown(name)}" for name in fields)
    return ", ".join([row.mechanism, *values])


def _values(rows: Sequence[Row], name: str) -> set[str]:
    return {row.shown(name) for row in rows} - {_ABSENT}
