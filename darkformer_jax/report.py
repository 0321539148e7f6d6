"""Compares many runs on one self-contained page of tables and plots.

    python -m darkformer_jax.report --runs='runs/ft-*' --out=docs/results/finetune

The page begins with a conclusion: which row is best, and whether its lead is more than the spread of the seeds.
Runs that differ only in the seed share a row: the mean and standard error of the held-out figures after the last step.
A language model's are loss, bits per byte and accuracy; a classifier's and a regression's are those that training
printed. Runs on ListOps, images or a task of GLUE also have the benchmark's table: validation, and test where
`evaluate --json=<workdir>/test.json` measured it, for the best and the last checkpoint. What others published stands
below it, with the sources. Language models that `evaluate --probes --json=<workdir>/probes.json` asked what they find
far back in their context stand beside each other, imports and calibrated ones too. If DARK, exact attention, and
Performer or the window alone ran with otherwise equal settings, the page says which share of the gap to exact attention
DARK closes. Runs that did not finish are listed with the reason. The plots show loss curves, the loss against the
learning rate and against m, what probes found by distance, calibration errors by layer and head, and the spectra of
Sigma = M^T M, as far as the runs have them. Then follow speed, time, hardware, version and samples of each run. All
runs must have the same data and task. The page and its pictures are light or dark as the
reader's system is.

--out gets report.html (with its pictures inside), report.md, its pictures (light ones), and results.json.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app

from darkformer_jax.cli.output import lost_output_is_no_crash
from darkformer_jax.cli.parser import Parser, one_line_errors
from darkformer_jax.cli.progress import progress_bar
from darkformer_jax.data.files import whole_directory
from darkformer_jax.data.progress import with_progress
from darkformer_jax.reporting.findings import as_json, collect
from darkformer_jax.reporting.page import Image, as_html, as_markdown
from darkformer_jax.reporting.themes import DARK, LIGHT


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; a mistake is one line and exit status 2."""
    parser = Parser("report", __doc__)
    parser.add_argument("--runs", required=True, help="comma-separated globs of workdirs")
    parser.add_argument("--out", required=True, help="directory to write; must be empty or not exist")
    return parser.parse_args(argv[1:])


def main(args: argparse.Namespace) -> None:
    """Writes the page. A UserError becomes one line and exit status 2."""
    with one_line_errors("nothing was written"):
        report(args)


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Reads the runs, writes --out, prints its path, and returns the content of results.json."""
    with whole_directory(args.out) as directory:
        found = collect(args.runs, progress_bar)
        from darkformer_jax.reporting.plots import pictures_of  # here, because an error need not wait for matplotlib

        images = {}
        pictures = pictures_of(found)
        for picture in with_progress(pictures, "picture", progress_bar):
            images[picture.name] = Image(picture.png(LIGHT), picture.png(DARK))
            (directory / picture.name).write_bytes(images[picture.name].light)
        markdown = as_markdown(found, {picture.name: picture.alt for picture in pictures})
        (directory / "report.md").write_text(markdown, encoding="utf-8")
        (directory / "report.html").write_text(as_html(found.title, markdown, images), encoding="utf-8")
        result = as_json(found)
        (directory / "results.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    finished = sum(len(row.runs) for row in found.rows)
    print(f"{finished} of {len(found.runs)} workdirs in {len(found.rows)} rows: {Path(args.out) / 'report.html'}")
    return result


if __name__ == "__main__":
    with lost_output_is_no_crash():
        app.run(main, flags_parser=parse_flags)
