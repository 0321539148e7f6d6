"""What stands on the page of a set of runs, in its order; pictures are drawn into a directory as they are named."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from darkformer_jax.reporting import plots
from darkformer_jax.reporting.comparison import Comparison, in_words
from darkformer_jax.reporting.geometry import Calibration, Spectra
from darkformer_jax.reporting.page import Block, Bullets, Paragraph, Picture, Section
from darkformer_jax.reporting.rows import Row, best_of
from darkformer_jax.reporting.runs import DIVERGED, FINISHED, Run
from darkformer_jax.reporting.settings import (
    GEOMETRY_RATE,
    LEARNING_RATE,
    LEARNING_RATES,
    M_FEATURES,
    key_of,
    role,
)
from darkformer_jax.reporting.tables import (
    calibration_table,
    common_settings,
    comparison_table,
    label,
    results_table,
)

NAMES = {"performer": "Performer", "window_only": "the window alone"}  # counterparts of DARK
_BEST = "Of rows that differ in learning rates alone, the one with the lowest held-out loss."


def results(runs: Sequence[Run], rows: Sequence[Row]) -> Section:
    """The table, what its rows have in common, and how its figures are made."""
    counts = {state: sum(run.state == state for run in runs) for state in (FINISHED, DIVERGED)}
    others = len(runs) - sum(counts.values())
    blocks: list[Block] = [
        Paragraph(
            f"{len(runs)} workdirs: {counts[FINISHED]} reached their last step, {counts[DIVERGED]} diverged, {others}"
            " did not get there."
        )
    ]
    if not rows:
        return Section("", [*blocks, Paragraph("No run has reached its last step: there is no table.")])
    blocks.append(Paragraph(f"All rows, where their mechanism has it: {common_settings(rows)}."))
    blocks.append(results_table(rows))
    tokens = sorted({f"{run.final['heldout_tokens']:,}" for row in rows for run in row.runs if _has_tokens(run)})
    split = f" ({' or '.join(tokens)} tokens)" if tokens else ""
    blocks.append(
        Paragraph(
            f"After the last step, on the whole held-out split{split}; loss in nats a token. Runs that differ in the"
            " seed alone are one row: mean ± standard error of the mean (standard deviation / √seeds); one seed has no"
            " ±. – = the mechanism does not use the field."
        )
    )
    if any(role(row.settings) == "control" for row in rows):
        blocks.append(Paragraph("Controls show what is reached without features of queries and keys."))
    return Section("", blocks)


def comparison(found: Sequence[Comparison], rows: Sequence[Row], kind: str) -> Section | None:
    """DARK against one counterpart, in numbers and in words."""
    if not found:
        return None
    name = NAMES[kind]
    sentences = [
        f"{label(c.dark, rows)}{' (each at its best learning rate)' if c.best else ''}: {in_words(c, name)}"
        for c in found
    ]
    blocks: list[Block] = [
        comparison_table(found, rows, name),
        Bullets(sentences),
        Paragraph(
            "At otherwise equal settings. Differences are of held-out loss, seed by seed over the seeds that both have;"
            f" the share is ({name} − DARK) / ({name} − exact) over the seeds that all three have, with its first-order"
            " standard error. A best learning rate is chosen by the same held-out loss."
        ),
    ]
    return Section(f"DARK and {name}", blocks)


def left_out(runs: Iterable[Run]) -> Section | None:
    """The runs that are not in the table, and why."""
    items = [f"{run.workdir}: {run.reason}" for run in runs if run.state != FINISHED]
    return Section("Not in the table", [Bullets(items)]) if items else None


def curves(rows: Sequence[Row], runs: Sequence[Run], directory: Path) -> Section | None:
    """Loss curves, a few rows a picture."""
    chosen = best_of(rows)
    diverged = [run for run in runs if run.state == DIVERGED]
    if not chosen:
        return None
    pictures = []
    size = plots.ROWS_A_FIGURE
    for number, start in enumerate(range(0, len(chosen), size), start=1):
        some = chosen[start : start + size]
        file = f"loss_curves_{number}.png"
        plots.draw_curves(some, [label(row, rows) for row in some], diverged, directory / file)
        caption = "Loss against the step; bands go from the least to the largest seed. "
        caption += _BEST if len(chosen) < len(rows) else ""
        crosses = " Grey lines that end in a cross: runs that diverged." if diverged else ""
        whole = " The last held-out point is of the whole split, earlier ones of eval.batches batches of it."
        pictures.append(Picture(file, (caption + whole + crosses).replace("  ", " ")))
    return Section("Loss curves", pictures)


def learning_rates(rows: Sequence[Row], runs: Sequence[Run], directory: Path) -> Section | None:
    """Held-out loss against the learning rate, with what diverged; None where there is one learning rate."""
    series = _series(rows, runs, LEARNING_RATE, LEARNING_RATES)
    if len({rate for one in series for rate in (*one.points, *one.diverged)}) < 2:
        return None
    plots.draw_against(series, "learning rate", 10, directory / "learning_rates.png")
    caption = "Held-out loss after the last step against the peak learning rate; bars are standard errors over seeds."
    if any(one.diverged for one in series):
        caption += " Crosses: learning rates at which a run diverged."
    if any(GEOMETRY_RATE in row.settings for row in rows):
        caption += " At each learning rate the best of M's own."
    return Section("Learning rates", [Picture("learning_rates.png", caption)])


def features(rows: Sequence[Row], calibrations: Sequence[Calibration], directory: Path) -> Section | None:
    """Loss, and error of calibration, against m; None where all have the same."""
    pictures: list[Block] = []
    series = _series(rows, [], M_FEATURES, (M_FEATURES, *LEARNING_RATES))
    if len({m for one in series for m in one.points}) > 1:
        plots.draw_against(series, "m, random features a head", 2, directory / "features.png")
        caption = "Held-out loss after the last step against m, each at the best of its learning rates; bars are"
        caption += " standard errors over seeds, horizontal lines mechanisms without features."
        pictures.append(Picture("features.png", caption))
    if len({calibration.num_features for calibration in calibrations}) > 1:
        plots.draw_errors_against_features(calibrations, directory / "calibration_features.png")
        caption = "Relative error of attention after calibration against m, mean over layers and heads."
        pictures.append(Picture("calibration_features.png", caption))
    return Section("Number of features", pictures) if pictures else None


def calibration(calibrations: Sequence[Calibration], directory: Path) -> Section | None:
    """Errors of attention by layer and head."""
    if not calibrations:
        return None
    blocks: list[Block] = [
        Paragraph("Relative error |out − exact| / |exact| on passages that were not trained on; mean over heads."),
        calibration_table(calibrations),
    ]
    for number, one in enumerate(calibrations, start=1):
        file = f"attention_error_{number}.png"
        plots.draw_error_map(one, directory / file)
        caption = (
            f"{one.workdir} ({one.mechanism}, m {one.num_features}): error by layer and head; titles say the mean."
        )
        blocks.append(Picture(file, caption))
    return Section("Calibration: error of attention", blocks)


def spectra(found: Sequence[Spectra], missing: Sequence[str], directory: Path) -> Section | None:
    """Spectra of Sigma; `missing`: why those of some runs are not there."""
    if not found and not missing:
        return None
    blocks: list[Block] = []
    for number, one in enumerate(found, start=1):
        file = f"spectra_{number}.png"
        plots.draw_spectra(one, directory / file)
        caption = f"{one.workdir}, step {one.step}: eigenvalues of Σ = MᵀM by layer, geometric mean over heads. Dashed:"
        caption += " geometry_init², all of them where M starts without calibration."
        blocks.append(Picture(file, caption))
    blocks += [Paragraph("The first seed of every DARK row. " + _BEST)] if found else []
    blocks += [Bullets([f"not shown: {reason}" for reason in missing])] if missing else []
    return Section("The learned geometry", blocks)


def _series(rows: Sequence[Row], runs: Sequence[Run], field: str, without: tuple[str, ...]) -> list[plots.Series]:
    """A series for all that is equal but for `without`; of several rows at one value of `field`, the best."""
    # Rows of their own, of which nothing but the settings is used.
    diverged = [Row(run.settings, (run,), 1) for run in runs if run.state == DIVERGED]
    everything = [*rows, *diverged]
    groups: dict[str, list[Row]] = {}
    for row in everything:
        groups.setdefault(key_of(row.settings, without), []).append(row)
    series = []
    for members in groups.values():
        finished = best_of([row for row in members if row in rows], tuple(set(without) - {field}))
        points = {row.settings[field]: row.mean() for row in finished if field in row.settings}
        level = finished[0].mean() if finished and not points else None
        crosses = [row.settings[field] for row in members if row in diverged and field in row.settings]
        series.append(plots.Series(label(members[0], everything, without), points, level, crosses))
    return series


def _has_tokens(run: Run) -> bool:
    return isinstance(run.final.get("heldout_tokens"), int)
