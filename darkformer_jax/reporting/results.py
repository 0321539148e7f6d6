"""results.json: what the page says, for programs."""

from collections.abc import Mapping, Sequence
from typing import Any

from darkformer_jax.reporting.comparison import Comparison, Difference
from darkformer_jax.reporting.geometry import Calibration, Spectra
from darkformer_jax.reporting.rows import Mean, Row
from darkformer_jax.reporting.runs import FIGURES, FINISHED, Run


def as_json(
    globs: str,
    runs: Sequence[Run],
    rows: Sequence[Row],
    found: Mapping[str, Sequence[Comparison]],
    calibrations: Sequence[Calibration],
    spectra: Sequence[Spectra],
) -> dict[str, Any]:
    """JSON values. Comparisons name rows by their place in `rows`; `share` is None where there is no gap to close."""
    return {
        "runs": globs,
        "rows": [_row(row) for row in rows],
        "comparisons": [_comparison(c, kind, rows) for kind, some in found.items() for c in some],
        "left_out": [
            {"workdir": run.workdir, "state": run.state, "reason": run.reason} for run in runs if run.state != FINISHED
        ],
        "calibrations": [
            {
                **{name: value for name, value in one._asdict().items() if name not in ("errors", "layers")},
                "mean_errors": {stage: float(values.mean()) for stage, values in one.errors.items()},
            }
            for one in calibrations
        ],
        "spectra": [
            {
                "workdir": one.workdir,
                "step": one.step,
                "initial": one.initial,
                "layers": one.layers,
                "largest": one.eigenvalues.max(axis=(1, 2)).tolist(),
                "smallest": one.eigenvalues.min(axis=(1, 2)).tolist(),
            }
            for one in spectra
        ],
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "settings": row.settings,
        "runs": [
            {"workdir": run.workdir, "seed": run.seed, **{name: run.final[name] for name in FIGURES}}
            for run in row.runs
        ],
        "diverged": row.num_diverged,
        **{name: _mean(row.mean(name)) for name in FIGURES},
    }


def _comparison(c: Comparison, kind: str, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "with": kind,
        "dark": rows.index(c.dark),
        "other": rows.index(c.other),
        "exact": None if c.exact is None else rows.index(c.exact),
        "each_at_best_learning_rate": c.best,
        "difference": _difference(c.difference),
        "gap": _difference(c.gap),
        "share": _difference(c.share),
    }


def _mean(mean: Mean) -> dict[str, float | None]:
    return {"mean": mean.mean, "standard_error": mean.error}


def _difference(difference: Difference | None) -> dict[str, Any] | None:
    return None if difference is None else {**_mean(difference.value), "shared_seeds": difference.num_shared}
