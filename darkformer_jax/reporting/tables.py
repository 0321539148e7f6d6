"""Cells and lines of text made of rows, comparisons and calibrations."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from darkformer_jax.reporting.comparison import Comparison
from darkformer_jax.reporting.geometry import Calibration
from darkformer_jax.reporting.page import Table
from darkformer_jax.reporting.rows import Row
from darkformer_jax.reporting.runs import FIGURES
from darkformer_jax.reporting.settings import LEARNING_RATE, MECHANISM, ORIGIN, TOKENS, role

# What every report says, in a column or once above the table; other fields have a column where rows differ in them.
_TOLD = {
    "model.attention.num_features": "m",
    "model.attention.window": "window",
    "model.attention.num_sinks": "sinks",
    "optimizer.learning_rate": "learning rate",
    "optimizer.geometry_learning_rate": "learning rate of M",
    "num_steps": "steps",
    TOKENS: "tokens",
    ORIGIN: "init_from",
}
_NONE = "–"  # of a field that the mechanism has not


def split_fields(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """(fields in which rows differ, those of _TOLD in which they do not), without the mechanism."""
    names = [*_TOLD, *sorted({name for row in rows for name in row.settings} - _TOLD.keys() - {MECHANISM})]
    differing = [name for name in names if len({_shown(row, name) for row in rows} - {_NONE}) > 1]
    common = [name for name in _TOLD if name not in differing]
    return differing, common


def common_settings(rows: Sequence[Row]) -> str:
    """`learning rate 0.003, 400 steps`: what all rows that have the field have in common."""
    _, common = split_fields(rows)
    values = {name: {_shown(row, name) for row in rows} - {_NONE} for name in common}
    return ", ".join(f"{_TOLD[name]} {value.pop()}" for name, value in values.items() if value)


def results_table(rows: Sequence[Row]) -> Table:
    """The main table: a line a row."""
    fields, _ = split_fields(rows)
    diverged = any(row.num_diverged for row in rows)
    head = ["mechanism", *(_TOLD.get(name, name) for name in fields), "seeds", *(["diverged"] if diverged else [])]
    lines = []
    for row in rows:
        loss, bits, accuracy = (row.mean(name) for name in FIGURES)
        lines.append(
            [
                mechanism_name(row),
                *(_shown(row, name) for name in fields),
                str(len(row.runs)),
                *([str(row.num_diverged)] if diverged else []),
                loss.text(),
                bits.text(),
                accuracy.percent(2),
            ]
        )
    return Table([*head, "held-out loss", "bits per byte", "accuracy"], lines)


def comparison_table(found: Sequence[Comparison], rows: Sequence[Row], name: str) -> Table:
    """DARK rows beside their counterparts."""
    head = ["DARK row", "learning rates", "exact", name, "DARK", f"DARK − {name}", "seeds", "share of gap closed"]
    lines = []
    for c in found:
        lines.append(
            [
                label(c.dark, rows, without=(LEARNING_RATE,)),
                "each at its best" if c.best else _shown(c.dark, LEARNING_RATE),
                _NONE if c.exact is None else c.exact.mean().text(),
                c.other.mean().text(),
                c.dark.mean().text(),
                c.difference.value.text(sign="+"),
                str(c.difference.num_shared),
                _share(c),
            ]
        )
    return Table(head, lines, first_number=2)


def _share(c: Comparison) -> str:
    if c.share is None:
        return _NONE if c.exact is None else "no gap"
    return c.share.value.percent(0)


def calibration_table(calibrations: Sequence[Calibration]) -> Table:
    """Mean relative errors over layers and heads."""
    stages = list(dict.fromkeys(stage for calibration in calibrations for stage in calibration.errors))
    lines = [
        [
            calibration.workdir,
            calibration.mechanism,
            str(calibration.num_features),
            str(calibration.window),
            *(
                f"{np.mean(calibration.errors[stage]):.4f}" if stage in calibration.errors else _NONE
                for stage in stages
            ),
        ]
        for calibration in calibrations
    ]
    head = ["workdir", "mechanism", "m", "window", *(stage.replace("_", " ") for stage in stages)]
    return Table(head, lines, first_number=2)


def mechanism_name(row: Row) -> str:
    """The kind of the layers, and what it is there for."""
    told = {"exact": " (exact)", "control": " (control)"}
    return row.settings[MECHANISM] + told.get(role(row.settings), "")


def label(row: Row, rows: Sequence[Row], without: tuple[str, ...] = ()) -> str:
    """The mechanism, and the fields by which the row can be told from `rows`."""
    fields, _ = split_fields(rows)
    names = [name for name in fields if name not in without and name != TOKENS and _shown(row, name) != _NONE]
    values = (f"{_TOLD.get(name, name.rpartition('.')[2])} {_shown(row, name)}" for name in names)
    return ", ".join([mechanism_name(row), *values])


def _shown(row: Row, name: str) -> str:
    if name == ORIGIN:
        starts = sorted({run.init_from for run in row.runs} - {""})
        return " and ".join(starts[:2]) + (f" and {len(starts) - 2} more" if len(starts) > 2 else "") or _NONE
    if name not in row.settings:
        return _NONE
    return _value(row.settings[name])


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) or "none"
