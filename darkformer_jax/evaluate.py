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

Probes show what averages over text hide: what a language model still finds far back in its context.

    python -m darkformer_jax.evaluate --workdir=runs/smollm2 --text='books/*.txt' --probes=copy,lookup,positions

  copy           [x, text, x]: a passage of 128 tokens comes again. Nats per token of the second copy and of the first,
                 their difference, and the accuracy of the second. A copy's first 32 tokens are not scored.
  repeat         [x, x]: the same, where x is as long as the distance
  lookup         facts such as "The password of the Osprey team is 48213." stand in the text, and the end asks for all:
                 answers whose every token had the largest logit, and nats per token of the answers
  classes        16 examples of a rule with made-up labels (wolf: dax), text, and a question. An answer is right if the
                 right label's first token is likelier than those of the three others.
  positions      bits per token of plain text, at positions 0-255, 256-511, 512-1023, ... up to the context

The distance of a token is the number of places to its like before it; for classes, the text between the examples and
the question. It is 512, 1,024 and 4,096, as far as --context has room, which is the run's sequence_length, at most
16,384. Figures are means over --rows with their standard error. Models with one tokenizer read the same rows if --text,
--seed, --rows, --distances and --context are the same: give the last two where the runs' sequence_length differs, as
after calibrate. `report` puts models beside each other whose --json are <workdir>/probes*.json.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from absl import app

from darkformer_jax.cli.huge_pages import start_with_huge_pages
from darkformer_jax.cli.output import lost_output_is_no_crash
from darkformer_jax.cli.parser import Parser, one_line_errors, whole
from darkformer_jax.cli.progress import progress_bar
from darkformer_jax.config.base import DTYPES
from darkformer_jax.data.files import new_file, write_new
from darkformer_jax.data.text_files import TEXT_FIELD
from darkformer_jax.errors import UserError
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks import task_of
from darkformer_jax.tasks.probes import PROBES, ProbeRequest, ask_probes
from darkformer_jax.tasks.task import ScoreRequest, Scores

_ROWS = 16


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
    parser.add_argument("--probes", help=f"ask these instead, separated by commas: {', '.join(PROBES)}")
    parser.add_argument("--distances", help="of the probes, in tokens, separated by commas (default: see above)")
    parser.add_argument("--rows", type=whole, help="of each probe and distance (default: 16)")
    parser.add_argument("--seed", type=whole, help="of the probes' rows (default: 0)")
    parser.add_argument("--dtype", choices=DTYPES, help="what the model computes in (default: what its run did)")
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
    scores = _ask(workdir, args) if args.probes is not None else _score(workdir, args)
    print(scores.table)
    if args.json is not None:
        write_new("--json", args.json, json.dumps(scores.result, indent=2) + "\n")
    return scores.result


def _score(workdir: Workdir, args: argparse.Namespace) -> Scores:
    request = ScoreRequest(
        args.text, args.batch_size, args.context, args.stride, args.max_tokens, args.text_field, args.dtype
    )
    return task_of(workdir).score(workdir, args.step, request, progress_bar)


def _ask(workdir: Workdir, args: argparse.Namespace) -> Scores:
    request = ProbeRequest(
        args.probes,
        args.text,
        args.text_field,
        _ROWS if args.rows is None else args.rows,
        args.distances,
        args.context,
        args.batch_size,
        args.seed or 0,
        args.dtype,
    )
    return ask_probes(workdir, args.step, request, progress_bar)


def _check_flags(args: argparse.Namespace) -> None:
    others = ("distances", "rows", "seed") if args.probes is None else ("stride", "max_tokens")
    for name in others:
        if getattr(args, name) is not None:
            reason = "only --probes have it" if args.probes is None else "--probes have none"
            raise UserError(f"--{name}={getattr(args, name)}: {reason}; allowed: no --{name} here")
    if args.seed is not None and not 0 <= args.seed < 2**31:
        raise UserError(f"--seed={args.seed}: must be from 0 to {2**31 - 1}")
    for name in ("context", "stride", "batch_size", "max_tokens", "rows"):
        value = getattr(args, name)
        if value is not None and not 1 <= value < 2**31:
            raise UserError(f"--{name}={value}: must be from 1 to {2**31 - 1}")
    if args.json is not None:
        args.json = new_file("--json", args.json)


if __name__ == "__main__":
    with lost_output_is_no_crash():
        start_with_huge_pages()
        app.run(main, flags_parser=parse_flags)
