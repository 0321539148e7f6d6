"""The figures of a model after a stage: bits per byte, and how well it repeats what it has read."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from darkformer_jax.data.progress import ProgressBar
from darkformer_jax.data.tokenizers import Tokenizer
from darkformer_jax.linearisation.settings import Settings
from darkformer_jax.linearisation.text import Text
from darkformer_jax.model.network import Network
from darkformer_jax.model.spec import ModelSpec
from darkformer_jax.runs.load import WorkdirModel, load_language_model
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.task import Batch, Sums
from darkformer_jax.tasks.text_scores import TextScorer, make_quarter_step

_TOKENS_AT_A_TIME = 4096


class Figures(NamedTuple):
    """The figures of one model on the held-out text.

    Attributes:
      loss, bits_per_byte: of the text, in windows of the longest context of the stages; nats per token, bits per byte.
      copy: nats per token of the second of two copies of a passage in a row.
      first_copy: of the first one.
      tokens: of the text that were predicted.
    """

    loss: float
    bits_per_byte: float
    copy: float
    first_copy: float
    tokens: int


def measure(workdir: Workdir, text: Text, settings: Settings, progress_bar: ProgressBar) -> Figures:
    """The figures of the newest checkpoint of a workdir, which computes in the settings' dtype.

    Raises UserError: no usable checkpoint, or a loss that is not finite.
    """
    model = load_language_model(workdir, dtype=settings.dtype)
    context, step = settings.longest, _step_of(model.network.spec)
    scorer = TextScorer(model, context, context, step)
    scorer.score(text.heldout, text.heldout.num_bytes, _rows_of(context), settings.test_tokens, progress_bar)
    figures = scorer.figures()
    first_copy, copy = _copying(model, text.copied, step)
    return Figures(figures["loss"], figures["bits_per_byte"], copy, first_copy, figures["tokens"])


@functools.lru_cache(maxsize=1)
def _step_of(spec: ModelSpec) -> Callable[[dict, dict, Batch], Sums]:
    """The program that scores a batch, which stages with the same layers share."""
    return make_quarter_step(Network.of(spec))


def _rows_of(length: int) -> int:
    """Rows of a batch: what is in memory does not grow with the length."""
    return max(1, _TOKENS_AT_A_TIME // length)


def _copying(
    model: WorkdirModel, passages: Int[np.ndarray, "passages n"], step: Callable[[dict, dict, Batch], Sums]
) -> tuple[float, float]:
    """Nats per token of the first and of the second copy."""
    size = _rows_of(2 * passages.shape[1])  # where two copies fill the context, it is the program of the text
    nll, tokens = np.zeros(4), np.zeros(4)
    for start in range(0, len(passages), size):
        batch = jax.device_put(copy_batch(passages[start : start + size], model.tokenizer, size))
        sums = step(model.params, model.projections, batch)
        nll += np.asarray(sums["nll"], np.float64)
        tokens += np.asarray(sums["weight"], np.float64)
    return float(nll[:2].sum() / tokens[:2].sum()), float(nll[2:].sum() / tokens[2:].sum())


def copy_batch(passages: Int[np.ndarray, "b n"], tokenizer: Tokenizer, size: int) -> dict[str, np.ndarray]:
    """Rows in which a passage x follows itself, [size, 2 n]: the first half of a row predicts the first copy.

    Of each copy, all tokens but the first are predicted: what follows the first copy is not to be known. Rows after the
    passages are padding.
    """
    twice = np.concatenate([passages, passages], axis=1)
    length = twice.shape[1]
    if tokenizer.adds_bos:  # place i predicts token i
        begin = np.full((len(twice), 1), tokenizer.bos_id, np.int32)
        inputs, targets = np.concatenate([begin, twice[:, :-1]], axis=1), twice
        unknown = (0, length // 2)
    else:  # place i predicts token i + 1, and the last one nothing
        inputs, targets = twice, np.roll(twice, -1, axis=1)
        unknown = (length // 2 - 1, length - 1)
    weights = np.ones(twice.shape, np.float32)
    weights[:, unknown] = 0
    places = np.broadcast_to(np.arange(length, dtype=np.int32), twice.shape)
    rows = {"inputs": inputs, "targets": targets, "positions": places, "weights": weights}
    rows["segment_ids"] = np.ones(twice.shape, np.int32)
    return {name: np.pad(array, ((0, size - len(array)), (0, 0))) for name, array in rows.items()}
