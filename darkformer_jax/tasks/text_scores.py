"""Loss, perplexity, bits per byte and accuracy of a language model on any text, by quarter of its window."""

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from darkformer_jax.data.progress import ProgressBar
from darkformer_jax.data.sources import Corpus, find_text_files, open_corpus
from darkformer_jax.data.text_files import TEXT_FIELD
from darkformer_jax.data.windows import ScoredDocument, Window, window_batch
from darkformer_jax.errors import UserError
from darkformer_jax.model.network import Network
from darkformer_jax.runs.load import WorkdirModel, load_language_model
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.next_token import predict, token_values
from darkformer_jax.tasks.table import table_lines
from darkformer_jax.tasks.task import Batch, ScoreRequest, Scores, Sums

QUARTERS = 4
_DEFAULT_CONTEXT = 2048


def score_text(workdir: Workdir, step: int | None, request: ScoreRequest, progress_bar: ProgressBar) -> Scores:
    """Scores every token of the files in `request` once; see `darkformer_jax.evaluate`.

    Raises:
      UserError: files that cannot be read, a window that does not fit, no usable checkpoint, or a loss that is not
        finite.
    """
    files = find_text_files(request.files)
    corpus = open_corpus("text", request.files, TEXT_FIELD if request.text_field is None else request.text_field)
    # A file that is not text must fail now, not after hours of scoring the files before it.
    num_bytes = sum(len(document.text.encode("utf-8")) for document in corpus.documents(lambda _: None))
    model = load_language_model(workdir, step, dtype=request.dtype)
    longest = model.config.sequence_length
    context = request.context or min(_DEFAULT_CONTEXT, longest)
    stride = request.stride or context
    _check_window(context, stride)
    if context > longest:
        print(f"note: --context={context} is more than the {longest} tokens this model was made for", file=sys.stderr)
    started = time.perf_counter()
    scorer = TextScorer(model, context, stride, make_quarter_step(model.network))
    scorer.score(corpus, num_bytes, request.batch_size, request.max_tokens, progress_bar)
    if not scorer.tokens.sum():
        raise UserError(f"--text={request.files}: no document has a token to score")
    result = {
        "workdir": str(workdir),
        "step": model.step,
        "dtype": model.config.model.dtype,
        "text": request.files,
        "files": len(files),
        "documents": scorer.num_documents,
        "bytes": scorer.num_bytes,
        "context": context,
        "stride": stride,
        **scorer.figures(),
        "quarters": [
            {"first_position": first, "last_position": last, **scorer.figures(quarter)}
            for quarter, (first, last) in enumerate(_quarter_positions(context))
        ],
        "seconds": time.perf_counter() - started,
    }
    return Scores(result, _table(result))


class _Row(NamedTuple):
    """A window, and its share of the work for the progress bar."""

    window: Window
    work: float


class TextScorer:
    """Adds up a model's sums over text by quarter of the window, each [4] float64.

    Args:
      model: a model with its tokenizer.
      context: tokens per window.
      stride: tokens from one window to the next.
      step: `make_quarter_step` of the model's network.
    """

    def __init__(
        self, model: WorkdirModel, context: int, stride: int, step: Callable[[dict, dict, Batch], Sums]
    ) -> None:
        self._model, self._context, self._stride, self._step = model, context, stride, step
        self._nll, self._correct, self.tokens = (np.zeros(QUARTERS) for _ in range(3))
        self.num_bytes = 0
        self.num_documents = 0

    def score(
        self, corpus: Corpus, num_bytes: int, batch_size: int, max_tokens: int | None, progress_bar: ProgressBar
    ) -> None:
        """Scores the corpus, which has `num_bytes`, or its first `max_tokens` tokens."""
        step, model = self._step, self._model
        pending: Sums | None = None
        with progress_bar(max_tokens or num_bytes, "token" if max_tokens else "B") as bar:
            rows = self._rows(corpus, max_tokens)
            while batch := list(itertools.islice(rows, batch_size)):
                arrays = window_batch([row.window for row in batch], batch_size, self._context)
                sums = step(model.params, model.projections, jax.device_put(arrays))
                if pending is not None:  # read the previous batch while the device computes this one
                    self._add(pending)
                    bar.set_postfix(loss=f"{self._nll.sum() / self.tokens.sum():.3f}", refresh=False)
                pending = sums
                bar.update(sum(row.work for row in batch))
            if pending is not None:
                self._add(pending)

    def figures(self, quarter: int | None = None) -> dict[str, Any]:
        """Tokens, loss, perplexity, bits per byte and accuracy of one quarter or of all; None if none was scored.

        Raises UserError if the loss is not finite.
        """
        chosen = slice(None) if quarter is None else slice(quarter, quarter + 1)
        tokens = int(self.tokens[chosen].sum())
        if not tokens:
            return {"tokens": 0} | dict.fromkeys(("loss", "perplexity", "bits_per_byte", "accuracy"))
        loss = float(self._nll[chosen].sum()) / tokens
        if not math.isfinite(loss):
            raise UserError(f"the model's loss is {loss}: its weights are damaged, or a number overflowed")
        tokens_per_byte = float(self.tokens.sum()) / max(self.num_bytes, 1)
        return {
            "tokens": tokens,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),  # a float holds no more
            "bits_per_byte": loss / math.log(2) * tokens_per_byte,
            "accuracy": float(self._correct[chosen].sum()) / tokens,
        }

    def _rows(self, corpus: Corpus, max_tokens: int | None) -> Iterator[_Row]:
        """The windows of all documents. Counts the documents and their bytes."""
        left = max_tokens
        for document in corpus.documents(lambda _: None):
            scored = ScoredDocument.of(document.text, self._model.tokenizer, left)
            self.num_bytes += scored.num_bytes
            self.num_documents += 1
            num_tokens = len(scored.targets)
            # In bytes of the text, or in tokens if their number is limited.
            work = num_tokens if left is not None else len(document.text.encode("utf-8"))
            for window in scored.windows(self._context, self._stride):
                yield _Row(window, work * window.num_scored / num_tokens)
            if left is not None:
                left -= num_tokens
                if not left:
                    return

    def _add(self, sums: Sums) -> None:
        """Adds the sums of a batch; waits for the device that computes them."""
        self._nll += np.asarray(sums["nll"], np.float64)
        self._correct += np.asarray(sums["correct"], np.float64)
        self.tokens += np.asarray(sums["weight"], np.float64)


def make_quarter_step(network: Network) -> Callable[[dict, dict, Batch], Sums]:
    """(params, projections, batch) -> `token_sums`, each summed within the quarters of the rows: [4].

    Quarter j of rows of L tokens has the places j * ceil(L / 4) .. (j + 1) * ceil(L / 4) - 1.
    """

    def quarter_step(params: dict, projections: dict, batch: Batch) -> Sums:
        figures = predict(network.bind(params, projections), batch)
        return jax.tree.map(_quarter_sums, token_values(figures, batch))

    return jax.jit(quarter_step)


def _quarter_sums(values: jax.Array) -> jax.Array:
    """[b, L] -> [4], summed over rows and the places of each quarter."""
    padded = jnp.pad(values, ((0, 0), (0, -values.shape[1] % QUARTERS)))
    return jnp.sum(padded.reshape(len(values), QUARTERS, -1), axis=(0, 2))


def _check_window(context: int, stride: int) -> None:
    if context < QUARTERS:
        raise UserError(f"--context={context}: must be at least {QUARTERS}, a token for each quarter")
    if stride > context:
        raise UserError(f"--stride={stride}: must be at most --context={context}, or tokens would be left out")


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
        if quarter["first_position"] <= quarter["last_position"]:  # the last quarter of 5 tokens is empty
            rows.append(_cells(f"{quarter['first_position']}-{quarter['last_position']}", quarter))
    return "\n".join([head, *table_lines(rows)])


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
