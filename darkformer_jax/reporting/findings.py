"""Everything that is reported about a set of runs, and results.json, which holds it all."""

from dataclasses import dataclass
from typing import Any

from darkformer_jax.config.pattern import pattern_kinds
from darkformer_jax.data.progress import ProgressBar, no_progress, with_progress
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from darkformer_jax.reporting.benchmarks import BenchmarkTable, benchmark_table
from darkformer_jax.reporting.benchmarks import as_json as benchmark_as_json
from darkformer_jax.reporting.calibrations import Calibration, find_calibrations
from darkformer_jax.reporting.comparison import Comparison, comparisons
from darkformer_jax.reporting.conclusion import conclusion, title_of
from darkformer_jax.reporting.probed import ProbeTable, find_probes
from darkformer_jax.reporting.probed import as_json as probes_as_json
from darkformer_jax.reporting.reported_runs import FINISHED, UNTRAINED, ReportedRun, find_workdirs, read_runs
from darkformer_jax.reporting.rows import Row, as_rows, best_of
from darkformer_jax.reporting.settings import MECHANISM
from darkformer_jax.reporting.spectra import Spectra, read_spectra

_OF_CALIBRATIONS = ("workdir", "mechanism", "num_features", "window", "mean_errors")
_OF_SPECTRA = ("workdir", "step", "initial", "layers", "largest", "smallest")


@dataclass(frozen=True)
class Findings:
    """The content of results.json, the pictures and the page."""

    globs: str
    runs: list[ReportedRun]
    rows: list[Row]
    loss_unit: str  # "" if no run was trained
    comparisons: list[Comparison]
    calibrations: list[Calibration]
    spectra: list[Spectra]  # of the first seed of each row with an M at its best learning rates
    missing_spectra: list[str]  # "workdir: reason" for each such row without spectra
    benchmark: BenchmarkTable | None  # None = the runs are of none that is known
    probes: list[ProbeTable]

    @property
    def title(self) -> str:
        """What is compared, in words."""
        return title_of(self.rows, self.runs, bool(self.calibrations))

    @property
    def conclusion(self) -> str:
        """What the rows show, in words."""
        return conclusion(self.rows, self.comparisons, self.loss_unit)


def collect(globs: str, progress_bar: ProgressBar = no_progress) -> Findings:
    """Reads the workdirs that match the comma-separated globs.

    Raises UserError if a workdir cannot be read, if two do not compare, or if none was trained, calibrated or probed.
    """
    runs = read_runs(with_progress(find_workdirs(globs), "run", progress_bar))
    rows = as_rows(runs)
    calibrations = find_calibrations(run.workdir for run in runs)
    probes = find_probes(run.workdir for run in runs)
    if not calibrations and not probes and all(run.state == UNTRAINED for run in runs):
        raise UserError(f"--runs={globs}: none of the {len(runs)} workdirs has been trained, calibrated or probed")
    spectra, missing = [], []
    with_geometry = [row.runs[0].workdir for row in best_of(rows) if _has_geometry(row)]
    for workdir in with_progress(with_geometry, "checkpoint", progress_bar):
        try:
            spectra.append(read_spectra(workdir))
        except UserError as error:  # the checkpoint may have been removed; no other figure needs it
            missing.append(f"{workdir}: {error}")
    loss_unit = next((run.loss_unit for run in runs if run.lines), "")
    benchmark = benchmark_table(rows)
    return Findings(globs, runs, rows, loss_unit, comparisons(rows), calibrations, spectra, missing, benchmark, probes)


def _has_geometry(row: Row) -> bool:
    return any("geometry_init" in MIXERS[kind].uses for kind in pattern_kinds(row.settings[MECHANISM], ""))


def as_json(found: Findings) -> dict[str, Any]:
    """The content of results.json. Comparisons give the index of rows; `share` is None if there is no gap."""
    return {
        "runs": found.globs,
        "conclusion": found.conclusion,
        "rows": [_row(row) for row in found.rows],
        "comparisons": [_comparison(one, found.rows) for one in found.comparisons],
        "left_out": [_picked(run, "workdir", "state", "reason") for run in found.runs if run.state != FINISHED],
        "calibrations": [_picked(one, *_OF_CALIBRATIONS) for one in found.calibrations],
        "spectra": [_picked(one, *_OF_SPECTRA) for one in found.spectra],
    } | (
        ({"benchmark": benchmark_as_json(found.benchmark)} if found.benchmark else {})
        | ({"probes": probes_as_json(found.probes)} if found.probes else {})
    )


def _run(run: ReportedRun, figures: list[str]) -> dict[str, Any]:
    return _picked(run, "workdir", "seed") | {name: run.final[name] for name in figures} | {"facts": run.facts.shown}


def _row(row: Row) -> dict[str, Any]:
    runs = [_run(run, row.figures) for run in row.runs]
    means = {name: _picked(row.mean(name), "mean", "standard_error") for name in row.figures}
    return {"settings": row.settings, "runs": runs, "diverged": row.num_diverged, **means}


def _comparison(one: Comparison, rows: list[Row]) -> dict[str, Any]:
    places = {name: row and rows.index(row) for name, row in _picked(one, "dark", "other", "exact").items()}
    means = {
        name: mean and _picked(mean, "mean", "standard_error") | {"shared_seeds": mean.num_seeds}
        for name, mean in _picked(one, "difference", "gap", "share").items()
    }
    return {"with": one.kind, **places, "each_at_best_learning_rate": one.best, **means}


def _picked(thing: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(thing, name) for name in names}
