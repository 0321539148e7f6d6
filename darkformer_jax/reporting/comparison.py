"""Compares DARK with Performer, the window alone and exact attention, seed by seed and at otherwise equal settings."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from darkformer_jax.reporting.rows import Mean, Row, best_of
from darkformer_jax.reporting.settings import LEARNING_RATES, is_comparable

COUNTERPARTS = {"performer": "Performer", "window_only": "the window alone"}  # kind -> name


@dataclass(frozen=True)
class Comparison:
    """A DARK row beside a counterpart and, if there is one, an exact row; without it, `gap` and `share` are None."""

    kind: str  # of `other`
    dark: Row
    other: Row
    exact: Row | None
    best: bool  # whether each row has its own best learning rate; else all have the same one

    @property
    def name(self) -> str:
        """The counterpart's name in a sentence."""
        return COUNTERPARTS[self.kind]

    @property
    def difference(self) -> Mean:
        """Held-out loss of DARK minus that of the counterpart."""
        return difference(self.dark, self.other)

    @property
    def gap(self) -> Mean | None:
        """Held-out loss of the counterpart minus that of exact attention."""
        return None if self.exact is None else difference(self.other, self.exact)

    @property
    def share(self) -> Mean | None:
        """The share of the gap that DARK closes; None also if the gap is not positive."""
        return None if self.exact is None else closed_share(*(r.by_seed() for r in (self.exact, self.other, self.dark)))

    def in_words(self) -> str:
        """Says whether DARK is better than the counterpart, and which share of the gap to exact attention it closes."""
        name, difference, gap, share = self.name, self.difference, self.gap, self.share
        seeds = f"{difference.num_seeds or 'no'} shared seed{'' if difference.num_seeds == 1 else 's'}"
        shown = f"{difference.text(sign='+')} in held-out loss, {seeds}"
        if difference.mean >= 0:
            text = f"DARK is not better than {name} ({shown})."
        elif difference.is_clear is None:
            text = f"DARK is below {name} ({shown}, no standard error: this may be chance)."
        elif not difference.is_clear:
            text = f"DARK is below {name} within the spread of the seeds ({shown}): not distinguishable."
        else:
            text = f"DARK is better than {name} ({shown})."
        if gap is None:
            return text
        if share is None:
            return f"{text} There is no gap to close: {name} is not worse than exact attention here."
        if gap.is_clear is False:  # a share of it would say nothing
            return f"{text} The gap of {gap.text()} from {name} to exact attention is within the spread of the seeds."
        return f"{text} It closes {share.percent(0)} of the gap of {gap.text()} between {name} and exact attention."


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """Compares rows with the same learning rates, then rows with the best of their learning rates."""
    found: dict[tuple[Row, Row, Row | None], Comparison] = {}
    nothing: list[Row | None] = [None]
    for kind, best in itertools.product(COUNTERPARTS, (False, True)):
        without = LEARNING_RATES if best else ()
        candidates = best_of(rows) if best else rows
        for dark in (row for row in candidates if row.role == "dark"):
            others, exacts = (
                [row for row in candidates if is_comparable(dark.settings, row.settings, counterpart, without)]
                for counterpart in (kind, "exact")
            )
            for other, exact in itertools.product(others, exacts or nothing):
                found.setdefault((dark, other, exact), Comparison(kind, dark, other, exact, best))
    return list(found.values())


def difference(a: Row, b: Row) -> Mean:
    """Held-out loss of `a` minus that of `b`: the mean over the seeds that both have, else between their means."""
    of_a, of_b = a.by_seed(), b.by_seed()
    shared = sorted(of_a.keys() & of_b.keys())
    if shared:
        return Mean.of([of_a[seed] - of_b[seed] for seed in shared])
    return Mean(a.mean().mean - b.mean().mean, _root_sum([a.mean().standard_error, b.mean().standard_error]), 0)


def closed_share(exact: dict[int, float], other: dict[int, float], dark: dict[int, float]) -> Mean | None:
    """The share s = mean(p - d) / mean(p - e), where e, p, d are the losses by seed of `exact`, `other` and `dark`.

    s = 1: DARK is as good as exact attention; s = 0: no better than `other`. The means are over the seeds that all
    three share; the standard error is the first-order expansion se(p_i - d_i - s (p_i - e_i)) / mean(p - e). If they
    share no seed, s is of their own means, whose standard errors count as independent. None if mean(p - e) <= 0.
    """
    rows = (exact, other, dark)
    shared = sorted(exact.keys() & other.keys() & dark.keys())
    e, p, d = (np.array([x[seed] for seed in shared] or [float(np.mean(list(x.values())))]) for x in rows)
    gap = float(np.mean(p - e))
    if gap <= 0:
        return None
    share = float(np.mean(p - d)) / gap
    if shared:
        error = Mean.of(list((p - d) - share * (p - e))).standard_error
    else:
        errors = [Mean.of(list(x.values())).standard_error for x in rows]
        weights = (share, 1 - share, 1.0)
        error = _root_sum([None if x is None else weight * x for x, weight in zip(errors, weights, strict=True)])
    return Mean(share, None if error is None else error / gap, len(shared))


def _root_sum(errors: Sequence[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return math.sqrt(sum(error**2 for error in known)) if len(known) == len(errors) else None
