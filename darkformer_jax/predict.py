"""The classes or numbers that a trained classifier or regression gives to texts without labels.

    python -m darkformer_jax.predict --workdir=runs/spam --text='mails/*.txt' --out=predictions.jsonl
    python -m darkformer_jax.predict --workdir=runs/spam --text=new.csv
    python -m darkformer_jax.predict --workdir=runs/spam --input='You have won a prize'

A text is a .txt file, or the run's text column of a record in a .tsv, .csv, .jsonl or .parquet file; other columns are
ignored. Each gives one line of JSON, in order: its place (file:line), and of a classifier the likeliest label and the
probability of each, of a regression the number.
"""

import argparse
import json
import sys
from collections.abc import Sequence

import ml_collections
from absl import app

from darkformer_jax.cli.output import lost_output_is_no_crash
from darkformer_jax.cli.parser import Parser, is_utf8, one_line_errors, whole
from darkformer_jax.cli.progress import progress_bar
from darkformer_jax.data.files import new_file, write_new
from darkformer_jax.data.labelled import Text, read_texts
from darkformer_jax.errors import UserError
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks import task_of
from darkformer_jax.tasks.labelled import LabelledTask


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; a mistake is one line and exit status 2."""
    parser = Parser("predict", __doc__)
    parser.add_argument("--workdir", required=True, help="directory of the run whose model predicts")
    parser.add_argument("--step", type=whole, help="checkpoint to use (default: the newest)")
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument(
        "--text",
        help="comma-separated globs of .txt, .tsv, .csv, .jsonl (each may be .gz) and .parquet files, or directories",
    )
    texts.add_argument("--input", help="one text")
    parser.add_argument("--batch_size", type=whole, default=8, help="texts at a time (default: 8)")
    parser.add_argument("--out", help="write the lines to this file, which must not exist (default: print them)")
    return parser.parse_args(argv[1:])


def main(args: argparse.Namespace) -> None:
    """Prints the predictions. A UserError becomes one line and exit status 2."""
    with one_line_errors("the predictions are incomplete" if args.out is None else "nothing was written"):
        predict(args)


def predict(args: argparse.Namespace) -> None:
    """Predicts every text, and prints or writes a line of JSON for each."""
    if not 1 <= args.batch_size < 2**31:
        raise UserError(f"--batch_size={args.batch_size}: must be from 1 to {2**31 - 1}")
    out = None if args.out is None else new_file("--out", args.out)
    if args.input is not None:
        _check_input(args.input)
    workdir = Workdir(args.workdir)
    task = task_of(workdir)
    if not issubclass(task, LabelledTask):
        raise UserError(
            f"{workdir}: a language model has no labels; `generate` continues texts, `evaluate` scores them"
        )

    def read(config: ml_collections.ConfigDict) -> list[Text]:
        if args.input is not None:
            return [Text(args.input, "--input")]
        return read_texts(args.text, config.task.text_column)

    cut_share, predicted = task.predict(workdir, args.step, read, args.batch_size, progress_bar)
    if cut_share:
        print(
            f"note: {100 * cut_share:.1f}% of the texts are longer than the model reads; it sees their beginning",
            file=sys.stderr,
        )
    lines = (json.dumps({"place": _shown(text.place), **answer}, ensure_ascii=False) for text, answer in predicted)
    if out is None:
        for line in lines:
            print(line)
    else:
        write_new("--out", out, "".join(line + "\n" for line in lines))


def _check_input(text: str) -> None:
    if not text.strip():
        raise UserError("--input is empty; expected a text")
    if not is_utf8(text):
        raise UserError(f"--input={text!r}: not UTF-8 text")


def _shown(place: str) -> str:
    """A place, with marks for the bytes of a file's name that are no UTF-8."""
    return place.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


if __name__ == "__main__":
    with lost_output_is_no_crash():
        app.run(main, flags_parser=parse_flags)
