"""Loss, perplexity, bits per byte and next-token accuracy of a workdir's model on any text files.

    python -m darkformer_jax.evaluate --workdir=runs/smollm2 --text='books/*.txt' --context=2048
    python -m darkformer_jax.evaluate --workdir=runs/smollm2 --text=a.txt,b.jsonl.gz --stride=512 --json=smollm2.json

A document is a .txt or .md file (several if it is longer than 4 MiB), or the --text_field of a .jsonl line or of a
.parquet row. It is read in windows of `context` tokens that advance by `stride`. Every token is scored once, from the
tokens before it in its window. If the model's family has a BOS token, every window begins with it, and it predicts the
document's first token. Otherwise the first token is not scored. The end of a document is not scored. With the default,
stride = context, the windows are separate. A smaller stride gives every token at least context - stride tokens to look
at, for context / stride times the work.

  loss           mean of -log p(token), nats
  perplexity     exp(loss)
  bits/byte      sum of -log2 p(token) / UTF-8 bytes of the scored tokens' text (whole files if all their tokens are
                 scored). It is comparable across tokenizers. A quarter's figure is its bits per token times the tokens
                 per byte of the whole text, so that quarters differ only by place.
  accuracy       share of tokens that had the largest logit

A classifier or a regression is scored on labelled files (.tsv, .csv, .jsonl, .parquet) with the run's columns:

    python -m darkformer_jax.evaluate --workdir=runs/spam --text=more.jsonl

It prints accuracy, F1, Matthews and the confusion of the classes, or squared error, Pearson and Spearman. Beside them
stand the figures of the best constant answer.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from absl import app

from darkformer_jax.cli.output import lost_output_is_no_crash
from darkformer_jax.cli.parser import Parser, one_line_errors, whole
from darkformer_jax.cli.progress import progress_bar
from darkformer_jax.data.files import new_file, write_new
from darkformer_jax.data.text_files import TEXT_FIELD
from darkformer_jax.errors import UserError
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks import task_of
from darkformer_jax.tasks.task import ScoreRequest


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; a mistake is one line and exit status 2."""
    parser = Parser("evaluate", __doc__)
    parser.add_argument("--workdir", required=True, help="directory of the run or of the imported model")
    parser.add_argument("--step", type=whole, help="checkpoint to use (default: the newest)")
    parser.add_argument(
        "--text",
        required=True,
        help="comma-separated globs of .txt, .md and .jsonl files, plain or .gz, and .parquet files, or directories; "
        "for a classifier or a regression, of labelled files (.tsv, .csv, .jsonl, .parquet)",
    )
    parser.add_argument(
        "--text_field",
        help=f"field or column of .jsonl and .parquet that a language model reads (default: {TEXT_FIELD})",
    )
    parser.add_argument(
        "--context",
        type=whole,
        help="tokens per window (default: 2048, or the run's sequence_length if that is less)",
    )
    parser.add_argument("--stride", type=whole, help="tokens from one window to the next (default: context)")
    parser.add_argument("--batch_size", type=whole, default=4, help="windows or examples at a time (default: 4)")
    parser.add_argument("--max_tokens", type=whole, help="score so many tokens, from the first file on (default: all)")
    parser.add_argument("--json", help="also write the result to this file, which must not exist")
    return parser.parse_args(argv[1:])


def main(args: argparse.Namespace) -> None:
    """Prints the table. A UserError becomes one line and exit status 2."""
    with one_line_errors("nothing was written"):
        evaluate(args)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Scores the text, prints a table, writes the JSON file if one was asked for, and returns its content."""
    _check_flags(args)
    workdir = Workdir(args.workdir)
    request = ScoreRequest(args.text, args.batch_size, args.context, args.stride, args.max_tokens, args.text_field)
    scores = task_of(workdir).score(workdir, args.step, request, progress_bar)
    print(scores.table)
    if args.json is not None:
        write_new("--json", args.json, json.dumps(scores.result, indent=2) + "\n")
    return scores.result


def _check_flags(args: argparse.Namespace) -> None:
    for name in ("context", "stride", "batch_size", "max_tokens"):
        value = getattr(args, name)
        if value is not None and not 1 <= value < 2**31:
            raise UserError(f"--{name}={value}: must be from 1 to {2**31 - 1}")
    if args.json is not None:
        args.json = new_file("--json", args.json)


if __name__ == "__main__":
    with lost_output_is_no_crash():
        app.run(main, flags_parser=parse_flags)
