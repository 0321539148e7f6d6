"""Loss, perplexity, bits per byte and next-token accuracy of a workdir's model on any text files.

    python -m darkformer_jax.evaluate --workdir=runs/smollm2 --text='books/*.txt' --context=2048
    python -m darkformer_jax.evaluate --workdir=runs/smollm2 --text=a.txt,b.jsonl.gz --stride=512 --json=smollm2.json

Each document (a .txt or .md file, a line of a .jsonl file; a file longer than 4 MiB is several) is read in windows of
`context` tokens that advance by `stride`. Every token of a document is scored once, from the tokens before it in its
window; the document's first one from the tokenizer's BOS, with which then every window begins, or not at all where the
model's family has no BOS. The end of a document is not scored. With the default stride = context the windows are
separate; a smaller one gives every token at least context - stride tokens to look at, for context / stride times the
work.

  loss           mean of -log p(token), nats
  perplexity     exp(loss)
  bits/byte      sum of -log2 p(token) over the UTF-8 bytes of the scored tokens' text: of whole files when all their
                 tokens are scored. It does not depend on the tokenizer. Within a quarter of the window: the quarter's
                 bits a token times the tokens a byte of the whole text, so that quarters differ by place alone.
  accuracy       share of tokens that had the largest logit
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from absl import app

from darkformer_jax.cli.parser import Parser, one_line_errors
from darkformer_jax.data.files import refuse_url
from darkformer_jax.data.sources import Corpus, find_text_files, open_corpus
from darkformer_jax.data.tokenizers import Tokenizer
from darkformer_jax.data.windows import ScoredDocument, Window, window_batch
from darkformer_jax.errors import UserError
from darkformer_jax.runs.load import WorkdirModel, load_model
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.training.evaluation import QUARTERS, make_quarter_step

_DEFAULT_CONTEXT = 2048
_SECONDS_BETWEEN_LINES = 30.0  # of progress, where the output is no terminal


class Totals:
    """What has been scored so far, by quarter of the window: [4] float64 each."""

    def __init__(self) -> None:
        self.nll, self.correct, self.tokens = (np.zeros(QUARTERS) for _ in range(3))
        self.num_bytes = 0
        self.num_documents = 0

    def add(self, sums: dict[str, Any]) -> None:
        """Adds the sums of a batch; waits for the device that computes them."""
        self.nll += np.asarray(sums["nll"], np.float64)
        self.correct += np.asarray(sums["correct"], np.float64)
        self.tokens += np.asarray(sums["weight"], np.float64)

    def figures(self, quarter: int | None = None) -> dict[str, Any]:
        """Tokens, loss, perplexity, bits per byte and accuracy, of one quarter or of all; None where none is scored.

        Raises UserError where the loss is not finite.
        """
        chosen = slice(None) if quarter is None else slice(quarter, quarter + 1)
        tokens = int(self.tokens[chosen].sum())
        if not tokens:
            return {"tokens": 0} | dict.fromkeys(("loss", "perplexity", "bits_per_byte", "accuracy"))
        loss = float(self.nll[chosen].sum()) / tokens
        if not math.isfinite(loss):
            raise UserError(f"the model's loss is {loss}: its weights or its numbers are broken")
        tokens_per_byte = self.tokens.sum() / max(self.num_bytes, 1)
        return {
            "tokens": tokens,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),  # what a float holds
            "bits_per_byte": loss / math.log(2) * tokens_per_byte,
            "accuracy": float(self.correct[chosen].sum()) / tokens,
        }


class _Row(NamedTuple):
    """A window, and how much of the whole it is, for the progress bar."""

    window: Window
    work: float


def _parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("evaluate", __doc__)
    parser.add_argument("--workdir", required=True, help="directory of the run or of the imported model")
    parser.add_argument("--step", type=int, help="checkpoint to use (default: the newest)")
    parser.add_argument(
        "--text",
        required=True,
        help="comma-separated globs of .txt, .md and .jsonl files, plain or .gz, or directories searched recursively",
    )
    parser.add_argument(
        "--context",
        type=int,
        help=f"tokens a window (default: {_DEFAULT_CONTEXT}, or the run's sequence_length where that is less)",
    )
    parser.add_argument("--stride", type=int, help="tokens from one window to the next (default: context)")
    parser.add_argument("--batch_size", type=int, default=4, help="windows at a time (default: 4)")
    parser.add_argument("--max_tokens", type=int, help="score so many tokens, from the first file on (default: all)")
    parser.add_argument("--json", help="also write the result to this file, which must not exist")
    return parser.parse_args(argv[1:])


def main(args: argparse.Namespace) -> None:
    """Prints the table; on a UserError one line and exit status 2."""
    with one_line_errors("nothing was written"):
        evaluate(args)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Scores the text, prints a table, writes the JSON file if one was asked for, and returns what it holds."""
    _check_flags(args)
    files = find_text_files(args.text)
    corpus = open_corpus("text", args.text)
    # A file that is no text must show now, not after hours of scoring the ones before it.
    num_bytes = sum(len(document.text.encode("utf-8")) for document in corpus.documents(lambda _: None))
    model = load_model(Workdir(args.workdir), args.step)
    context = args.context or min(_DEFAULT_CONTEXT, model.config.sequence_length)
    stride = args.stride or context
    _check_window(context, stride)
    if context > model.config.sequence_length:
        longest = model.config.sequence_length
        print(f"note: --context={context} is more than the {longest} tokens this model was made for", file=sys.stderr)
    started = time.perf_counter()
    totals = _score(model, corpus, num_bytes, context, stride, args.batch_size, args.max_tokens)
    if not totals.tokens.sum():
        raise UserError(f"--text={args.text}: no document has a token to score")
    result = {
        "workdir": args.workdir,
        "step": model.step,
        "text": args.text,
        "files": len(files),
        "documents": totals.num_documents,
        "bytes": totals.num_bytes,
        "context": context,
        "stride": stride,
        **totals.figures(),
        "quarters": [
            {"first_position": first, "last_position": last, **totals.figures(quarter)}
            for quarter, (first, last) in enumerate(_quarter_positions(context))
        ],
        "seconds": time.perf_counter() - started,
    }
    print(_table(result))
    if args.json is not None:
        _write_json(args.json, result)
    return result


def _check_flags(args: argparse.Namespace) -> None:
    for name in ("context", "stride", "batch_size", "max_tokens"):
        value = getattr(args, name)
        if value is not None and not 1 <= value < 2**31:
            raise UserError(f"--{name}={value}: must be from 1 to {2**31 - 1}")
    if args.json is not None:
        if not args.json:
            raise UserError("--json=: give the name of a file")
        refuse_url(args.json)
        if os.path.lexists(args.json):
            raise UserError(f"--json={args.json}: the file exists, and results are not overwritten")
        if not os.path.isdir(os.path.dirname(args.json) or "."):
            raise UserError(f"--json={args.json}: its directory does not exist")


def _check_window(context: int, stride: int) -> None:
    if context < QUARTERS:
        raise UserError(f"--context={context}: must be at least {QUARTERS}, a token for each quarter")
    if stride > context:
        raise UserError(f"--stride={stride}: must be at most --context={context}, or tokens would be left out")


def _score(
    model: WorkdirModel,
    corpus: Corpus,
    num_bytes: int,
    context: int,
    stride: int,
    batch_size: int,
    max_tokens: int | None,
) -> Totals:
    step = make_quarter_step(model.network)
    totals = Totals()
    pending: dict[str, Any] | None = None
    unit = {"unit": "token"} if max_tokens else {"unit": "B"}
    interval = 0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES
    with tqdm.tqdm(total=max_tokens or num_bytes, unit_scale=True, mininterval=interval, **unit) as bar:
        rows = _rows(corpus, model.tokenizer, totals, context, stride, max_tokens)
        for batch in _groups(rows, batch_size):
            arrays = window_batch([row.window for row in batch], batch_size, context)
            sums = step(model.params, model.projections, jax.device_put(arrays))
            if pending is not None:  # of the batch before: the device is never waited for
                totals.add(pending)
                bar.set_postfix(loss=f"{totals.nll.sum() / totals.tokens.sum():.3f}", refresh=False)
            pending = sums
            bar.update(sum(row.work for row in batch))
        if pending is not None:
            totals.add(pending)
    return totals


def _rows(
    corpus: Corpus, tokenizer: Tokenizer, totals: Totals, context: int, stride: int, max_tokens: int | None
) -> Iterator[_Row]:
    """The windows of all documents; their bytes are added to `totals` as they come."""
    left = max_tokens
    for document in corpus.documents(lambda _: None):
        scored = ScoredDocument.of(document.text, tokenizer, left)
        totals.num_bytes += scored.num_bytes
        totals.num_documents += 1
        num_tokens = len(scored.targets)
        # Bytes of the text, or tokens where it is them that are limited.
        work = num_tokens if left is not None else len(document.text.encode("utf-8"))
        for window in scored.windows(context, stride):
            yield _Row(window, work * window.num_scored / num_tokens)
        if left is not None:
            left -= num_tokens
            if not left:
                return


def _groups(rows: Iterator[_Row], size: int) -> Iterator[list[_Row]]:
    group: list[_Row] = []
    for row in rows:
        group.append(row)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _quarter_positions(context: int) -> list[tuple[int, int]]:
    """The first and the last place of each quarter that `make_quarter_step` sums over."""
    size = -(-context // QUARTERS)
    return [(start, min(start + size, context) - 1) for start in range(0, QUARTERS * size, size)]


def _table(result: dict[str, Any]) -> str:
    head = (
        f"{result['workdir']} step {result['step']}: {result['documents']:,} documents, {result['bytes']:,} bytes;"
        f" windows of {result['context']:,} tokens, stride {result['stride']:,}; {result['seconds']:.0f} s"
    )
    rows = [("position", "tokens", "loss", "perplexity", "bits/byte", "accuracy"), _cells("all", result)]
    for quarter in result["quarters"]:
        if quarter["first_position"] <= quarter["last_position"]:  # the last one of 5 tokens has none
            rows.append(_cells(f"{quarter['first_position']}-{quarter['last_position']}", quarter))
    return "\n".join([head, *(f"{row[0]:12s}" + "".join(f"{cell:>13s}" for cell in row[1:]) for row in rows)])


def _cells(name: str, figures: dict[str, Any]) -> tuple[str, ...]:
    if not figures["tokens"]:
        return (name, "0", "-", "-", "-", "-")
    return (
        name,
        f"{figures['tokens']:,}",
        f"{figures['loss']:.4f}",
        f"{figures['perplexity']:,.2f}",
        f"{figures['bits_per_byte']:.4f}",
        f"{100 * figures['accuracy']:.2f}%",
    )


def _write_json(path: str, result: dict[str, Any]) -> None:
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        if not isinstance(error, FileExistsError):
            Path(path).unlink(missing_ok=True)
        raise UserError(f"--json={path} cannot be written: {error.strerror or error}") from error


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
