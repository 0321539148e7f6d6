"""DARK beside exact attention, Performer and the window alone, at otherwise equal settings, seed by seed."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from darkformer_jax.reporting.rows import Mean, Row, best_of
from darkformer_jax.reporting.settings import EXACT_KINDS, LEARNING_RATES, is_comparable, role

SIGNIFICANT = 2.0  # standard errors


class Difference(NamedTuple):
    """Held-out loss of one row minus that of another."""

    value: Mean
    num_shared: int  # seeds that both have; 0: the difference of the means


class Comparison(NamedTuple):
    """A DARK row and its counterparts. `gap` and `share` are None where there is no exact row."""

    dark: Row
    other: Row  # Performer, or the window alone
    exact: Row | None
    best: bool  # each at the best of its learning rates, else all at the same one
    difference: Difference  # dark - other
    gap: Difference | None  # other - exact
    share: Difference | None  # of that gap that DARK closes; None too where there is no gap


def comparisons(rows: Sequence[Row], kind: str) -> list[Comparison]:
    """DARK rows against those of `kind` at the same learning rate, then each at the best of its learning rates."""
    found: list[Comparison] = []
    nothing: list[Row | None] = [None]
    for best in (False, True):
        without = LEARNING_RATES if best else ()
        candidates = best_of(rows) if best else rows
        for dark in candidates:
            if role(dark.settings) != "dark":
                continue
            others = [row for row in candidates if is_comparable(dark.settings, row.settings, (kind,), without)]
            exacts = [row for row in candidates if is_comparable(dark.settings, row.settings, EXACT_KINDS, without)]
            for other in others:
                for exact in exacts or nothing:
                    if not any(c.dark is dark and c.other is other and c.exact is exact for c in found):
                        found.append(_compare(dark, other, exact, best))
    return found


def _compare(dark: Row, other: Row, exact: Row | None, best: bool) -> Comparison:
    difference = _difference(dark, other)
    if exact is None:
        return Comparison(dark, other, None, best, difference, None, None)
    gap = _difference(other, exact)
    share = closed_share(exact.by_seed(), other.by_seed(), dark.by_seed())
    return Comparison(dark, other, exact, best, difference, gap, share)


def _difference(a: Row, b: Row) -> Difference:
    of_a, of_b = a.by_seed(), b.by_seed()
    shared = sorted(of_a.keys() & of_b.keys())
    if shared:
        return Difference(Mean.of([of_a[seed] - of_b[seed] for seed in shared]), len(shared))
    return Difference(Mean(a.mean().mean - b.mean().mean, _root_sum([a.mean().error, b.mean().error])), 0)


def closed_share(exact: dict[int, float], other: dict[int, float], dark: dict[int, float]) -> Difference | None:
    """(other - dark) / (other - exact) of losses by seed: 1 = as good as exact, 0 = no better than `other`.

    Over the seeds that all three share: the ratio s of the mean differences, and its standard error by the first-order
    expansion, se(p_i - d_i - s (p_i - e_i)) / |mean(p - e)|. Where they share none: of the means, with the standard
    errors of the three taken as independent. None where `other` is not worse than exact.
    """
    shared = sorted(exact.keys() & other.keys() & dark.keys())
    if shared:
        e, p, d = (np.array([losses[seed] for seed in shared]) for losses in (exact, other, dark))
    else:
        e, p, d = (np.array([np.mean(list(losses.values()))]) for losses in (exact, other, dark))
    gap = float(np.mean(p - e))
    if gap <= 0:
        return None
    share = float(np.mean(p - d)) / gap
    if shared:
        error = Mean.of(list((p - d) - share * (p - e))).error
    else:
        errors = [Mean.of(list(losses.values())).error for losses in (exact, other, dark)]
        weights = (share, 1 - share, 1.0)
        error = _root_sum([None if x is None else weight * x for x, weight in zip(errors, weights, strict=True)])
    return Difference(Mean(share, None if error is None else error / gap), len(shared))


def _root_sum(errors: Sequence[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return math.sqrt(sum(error**2 for error in known)) if len(known) == len(errors) else None


def in_words(comparison: Comparison, name: str) -> str:
    """One sentence: whether DARK is better than `name`, and what share of the gap to exact attention it closes."""
    c = comparison
    difference, seeds = c.difference.value, _seeds(c.difference.num_shared)
    shown = f"{difference.text(sign='+')} in held-out loss, {seeds}"
    if difference.mean >= 0:
        verdict = f"DARK is not better than {name} ({shown})"
    elif difference.error is None:
        verdict = f"DARK is below {name} ({shown}: no standard error, so it may be chance)"
    elif -difference.mean < SIGNIFICANT * difference.error:
        verdict = f"DARK is below {name} by less than two standard errors ({shown}): not distinguishable"
    else:
        verdict = f"DARK is better than {name} ({shown})"
    if c.exact is None or c.gap is None:
        return verdict + "."
    gap = c.gap.value
    if c.share is None:
        return f"{verdict}. {name} is not worse than exact attention here: there is no gap to close."
    share = f"{gap.text()}, that it closes: {c.share.value.percent(0)}"
    text = f"{verdict}. Share of the gap from {name} to exact attention, {share}"
    if gap.error is not None and gap.mean < SIGNIFICANT * gap.error:
        text += " (the gap itself is less than two standard errors)"
    return text + "."


def _seeds(num_shared: int) -> str:
    if not num_shared:
        return "no seed shared"
    return f"{num_shared} shared seed{'s' if num_shared > 1 else ''}"
