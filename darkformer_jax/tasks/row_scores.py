"""What a language model says of every token of a row."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from darkformer_jax.data.probe_rows import ProbeRow
from darkformer_jax.data.windows import Window, window_batch
from darkformer_jax.errors import UserError
from darkformer_jax.model.network import Network
from darkformer_jax.model.token_loss import Predictions, token_figures
from darkformer_jax.runs.load import WorkdirModel
from darkformer_jax.tasks.task import Batch

_LENGTHS = 128  # rows are padded to a multiple, so that few programs are compiled


class RowScores(NamedTuple):
    """The figures of a row of n tokens.

    Attributes:
      nll: -log p of each token after those before it, in nats. That of the first is NaN: nothing predicts it.
      correct: whether it had the largest logit.
      candidates: log p of each of the row's candidates after the last token.
    """

    nll: Float[np.ndarray, "n"]
    correct: Bool[np.ndarray, "n"]
    candidates: Float[np.ndarray, "candidates"]


Scorer = Callable[[Sequence[ProbeRow]], list[RowScores]]


def make_scorer(model: WorkdirModel, batch_size: int, on_read: Callable[[int], Any]) -> Scorer:
    """A function that scores rows, each from its first token on, in one forward pass per batch.

    It calls `on_read` with the number of tokens after every batch, and raises UserError if a figure is not finite.
    """
    step = make_token_step(model.network)

    def score(rows: Sequence[ProbeRow]) -> list[RowScores]:
        length = -(-max(len(row.tokens) - 1 for row in rows) // _LENGTHS) * _LENGTHS
        scored: list[RowScores] = []
        for begin in range(0, len(rows), batch_size):
            batch = rows[begin : begin + batch_size]
            outputs = step(model.params, model.projections, jax.device_put(_batch(batch, batch_size, length)))
            scored += _read(batch, outputs)
            on_read(sum(len(row.tokens) for row in batch))
        return scored

    return score


def make_token_step(network: Network) -> Callable[[dict, dict, Batch], tuple[Array, Array, Array]]:
    """A jitted (params, projections, batch) -> figures of every place of its rows.

    The batch is one of `data.windows.window_batch`, with "candidates" [b, k].

    Returns of the function:
      [b, n] -log p of each target, in nats.
      [b, n] whether the target has the largest logit.
      [b, k] log p of the candidates after the row's last input and target.
    """

    def token_step(params: dict, projections: dict, batch: Batch) -> tuple[Array, Array, Array]:
        model = network.bind(params, projections)
        hidden, _ = model.hidden(batch["inputs"], batch["segment_ids"], batch["positions"])

        figures = token_figures(Predictions(hidden, model.unembedding), batch["targets"])
        last = jnp.maximum(batch["segment_ids"].sum(axis=1) - 1, 0)
        states = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return figures.nll, figures.best == batch["targets"], _log_p(model.logits(states), batch["candidates"])

    return jax.jit(token_step)


def _log_p(logits: Float[Array, "... vocab"], ids: Int[Array, "... k"]) -> Float[Array, "... k"]:
    return jnp.take_along_axis(logits, ids, axis=-1) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _batch(rows: Sequence[ProbeRow], batch_size: int, length: int) -> dict[str, np.ndarray]:
    """A row with candidates is read to its last token, another to the last but one, which predicts the last."""
    windows = []
    for row in rows:
        targets = np.append(row.tokens[1:], 0) if row.candidates else row.tokens[1:]
        windows.append(Window(row.tokens[: len(targets)], targets, 0))
    batch = window_batch(windows, batch_size, length)
    batch["candidates"] = np.zeros((batch_size, max([1, *(len(row.candidates) for row in rows)])), np.int32)
    for place, row in enumerate(rows):
        batch["candidates"][place, : len(row.candidates)] = row.candidates
    return batch


def _read(rows: Sequence[ProbeRow], outputs: tuple[Array, Array, Array]) -> list[RowScores]:
    """The figures of a batch's rows; waits for the device that computes them."""
    nll, correct, candidates = (np.asarray(output) for output in outputs)
    scored = []
    for place, row in enumerate(rows):
        size = len(row.tokens) - 1
        own = RowScores(
            np.concatenate([[np.nan], nll[place, :size].astype(np.float64)]),
            np.concatenate([[False], correct[place, :size]]),
            candidates[place, : len(row.candidates)].astype(np.float64),
        )
        total = float(own.nll[1:].sum() + own.candidates.sum())
        if not math.isfinite(total):
            raise UserError(f"the model's loss is {total}: its weights are damaged, or a number overflowed")
        scored.append(own)
    return scored
