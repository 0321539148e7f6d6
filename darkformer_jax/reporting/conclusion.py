"""The title of a page and what its runs show, in words that claim no more than the seeds allow."""

from collections.abc import Sequence

from darkformer_jax.config.base import LANGUAGE_MODEL
from darkformer_jax.reporting.comparison import Comparison, difference
from darkformer_jax.reporting.reported_runs import ReportedRun
from darkformer_jax.reporting.rows import Row, best_of, label
from darkformer_jax.reporting.settings import MECHANISM, TOKENS

_NAMED = 4  # more than so many things are counted


def title_of(rows: Sequence[Row], runs: Sequence[ReportedRun], is_calibrated: bool) -> str:
    """What is compared: `softmax, dark and performer compared as language models`."""
    trained = [run for run in runs if run.lines]
    if not trained:
        return "Calibrated attention" if is_calibrated else "Language models, probed"
    task = trained[0].settings["task.name"]
    kind = {LANGUAGE_MODEL: "language model", "classification": "classifier"}.get(task, f"{task} model")
    settings = [row.settings for row in rows] or [run.settings for run in trained]
    names = list(dict.fromkeys(one[MECHANISM].replace(",", " + ") for one in settings))
    shown = f"{len(names)} attention mechanisms" if len(names) > _NAMED else _listed(names)
    return f"{shown} compared as {kind}s" if len(settings) > 1 else f"{shown} as a {kind}"


def conclusion(rows: Sequence[Row], compared: Sequence[Comparison], unit: str) -> str:
    """Says which row is best and whether its lead is more than the spread of the seeds; then how DARK fares."""
    if not rows:
        return "No run has finished, so there is nothing to conclude about losses."
    best, *others = chosen = sorted(best_of(rows), key=lambda row: row.mean().mean)
    loss = f"{best.mean().text()} {unit} ({len(best.runs)} seed{'' if len(best.runs) == 1 else 's'})"
    if not others:
        return f"{label(best, chosen)} has a held-out loss of {loss}; there is nothing to compare it with."
    said = [f"{label(best, chosen)} has the lowest held-out loss: {loss}.", *_leads(best, others)]
    if len({row.settings[TOKENS] for row in chosen}) > 1:
        said.append("The rows were not trained on equally many tokens.")
    return " ".join([*said, *_of_dark(compared, rows)])


def _leads(best: Row, others: Sequence[Row]) -> list[str]:
    """How the others compare with the best, a sentence for each way; the differences are over shared seeds."""
    ways: dict[str, list[str]] = {}
    for row in others:
        lead = difference(row, best)
        if lead.mean <= 0:  # possible if the rows have different seeds
            text = "On the seeds that both have, it is not ahead of {}."
        elif lead.is_clear is None:
            text = "With too few seeds to show a spread, its lead over {} may be chance."
        elif lead.is_clear:
            text = "Its lead over {} is more than the spread of the seeds."
        else:
            text = "The spread of the seeds does not separate it from {}."
        ways.setdefault(text, []).append(f"{label(row, [best, *others])} ({lead.text(sign='+')})")
    return [text.format(_listed(behind)) for text, behind in ways.items()]


def _of_dark(compared: Sequence[Comparison], rows: Sequence[Row]) -> list[str]:
    """For each counterpart, its comparison with the best DARK row that has one."""
    best: dict[str, Comparison] = {}
    for one in compared:
        if one.kind not in best or one.dark.mean().mean < best[one.kind].dark.mean().mean:
            best[one.kind] = one
    several = sum(row.role == "dark" for row in rows) > 1
    return [f"{f'In the row {label(one.dark, rows)}: ' if several else ''}{one.in_words()}" for one in best.values()]


def _listed(names: Sequence[str]) -> str:
    """`a, b and c`; beyond a few, `a, b, c and 5 more`."""
    shown = [*names] if len(names) <= _NAMED else [*names[: _NAMED - 1], f"{len(names) - _NAMED + 1} more"]
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))
