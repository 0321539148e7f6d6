"""Tables, plots and one self-contained page of many runs: what they reached, beside each other.

    python -m darkformer_jax.report --runs='runs/ft-*' --out=docs/results/finetune

Runs that differ in the seed alone are one row: held-out loss, bits per byte and accuracy after the last step, mean and
standard error over seeds. Where DARK, Performer or the window alone, and exact attention were run at otherwise equal
settings: the share of the gap to exact attention that DARK closes. Runs that did not reach their last step are listed
with the reason. Loss curves, loss against the learning rate and against m, errors of calibration by layer and head,
and the spectra of Sigma = M^T M are drawn where the runs have them. All runs must be of the same data.

--out gets report.html (its pictures inside), report.md, the pictures, and results.json.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tqdm
from absl import app

from darkformer_jax.cli.parser import Parser, one_line_errors
from darkformer_jax.data.files import whole_directory
from darkformer_jax.errors import UserError
from darkformer_jax.reporting import sections
from darkformer_jax.reporting.comparison import comparisons
from darkformer_jax.reporting.geometry import Spectra, find_calibrations, read_spectra
from darkformer_jax.reporting.page import Page, as_html, as_markdown
from darkformer_jax.reporting.results import as_json
from darkformer_jax.reporting.rows import Row, best_of, group
from darkformer_jax.reporting.runs import UNTRAINED, find_workdirs, read_runs
from darkformer_jax.reporting.settings import MECHANISM


def _parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("report", __doc__)
    parser.add_argument("--runs", required=True, help="comma-separated globs of workdirs")
    parser.add_argument("--out", required=True, help="directory to write; must be empty or not exist")
    return parser.parse_args(argv[1:])


def main(args: argparse.Namespace) -> None:
    """Writes the page; on a UserError one line and exit status 2."""
    with one_line_errors("nothing was written"):
        report(args)


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Reads the runs, writes --out, says where, and returns what results.json holds."""
    with whole_directory(args.out) as directory:
        runs = read_runs(find_workdirs(args.runs))
        rows = group(runs)
        calibrations = find_calibrations(run.workdir for run in runs)
        if not calibrations and all(run.state == UNTRAINED for run in runs):
            raise UserError(f"--runs={args.runs}: none of the {len(runs)} workdirs has been trained or calibrated")
        found = {kind: comparisons(rows, kind) for kind in sections.NAMES}
        spectra, missing = _spectra(rows)
        parts = [
            sections.results(runs, rows),
            *(sections.comparison(found[kind], rows, kind) for kind in found),
            sections.left_out(runs),
            sections.curves(rows, runs, directory),
            sections.learning_rates(rows, runs, directory),
            sections.features(rows, calibrations, directory),
            sections.calibration(calibrations, directory),
            sections.spectra(spectra, missing, directory),
        ]
        page = Page(f"Runs {args.runs}", [part for part in parts if part is not None])
        result = as_json(args.runs, runs, rows, found, calibrations, spectra)
        (directory / "report.md").write_text(as_markdown(page), encoding="utf-8")
        html = as_html(page, lambda file: (directory / file).read_bytes())
        (directory / "report.html").write_text(html, encoding="utf-8")
        (directory / "results.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    finished = sum(len(row.runs) for row in rows)
    print(f"{finished} of {len(runs)} workdirs in {len(rows)} rows: {Path(args.out) / 'report.html'}")
    return result


def _spectra(rows: Sequence[Row]) -> tuple[list[Spectra], list[str]]:
    """(of the first seed of each DARK row at the best learning rates, why others are missing)."""
    workdirs = [row.runs[0].workdir for row in best_of(rows) if "dark" in row.settings[MECHANISM].split(",")]
    found, missing = [], []
    for workdir in tqdm.tqdm(workdirs, unit="checkpoint", mininterval=0.1 if sys.stderr.isatty() else 30.0):
        try:
            found.append(read_spectra(workdir))
        except UserError as error:  # the figures do not need the checkpoint, which may have been removed
            missing.append(f"{workdir}: {error}")
    return found, missing


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
