"""The figures of a model after a stage: bits per byte, and how well it repeats what it has read."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from darkformer_jax.data.progress import ProgressBar
from darkformer_jax.data.tokenizers import Tokenizer
from darkformer_jax.linearisation.settings import Settings
from darkformer_jax.linearisation.text import Text
from darkformer_jax.runs.load import load_language_model
from darkformer_jax.runs.workdir import Workdir
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
    """The figures of the newest checkpoint of a workdir.

    Raises UserError: no usable checkpoint, or a loss that is not finite.
    """
    model = load_language_model(workdir)
    context = settings.longest
    step = make_quarter_step(model.network)
    scorer = TextScorer(model, context, context, step)
    batch = max(1, _TOKENS_AT_A_TIME // context)
    scorer.score(text.heldout, text.heldout.num_bytes, batch, settings.test_tokens, progress_bar)
    figures = scorer.figures()
    quarters = np.zeros(4)
    for row in text.copied:
        arrays = jax.device_put(copy_batch(row[None], model.tokenizer))
        quarters += np.asarray(step(model.params, model.projections, arrays)["nll"], np.float64)
    first, second = quarters[:2].sum(), quarters[2:].sum()
    predicted = text.copied.shape[0] * (text.copied.shape[1] - 1)
    copied = {"first_copy": float(first / predicted), "copy": float(second / predicted)}
    return Figures(figures["loss"], figures["bits_per_byte"], tokens=figures["tokens"], **copied)


def copy_batch(passages: Int[np.ndarray, "b n"], tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Rows in which a passage x follows itself, [b, 2 n]: the first half of a row predicts the first copy.

    Of each copy, all tokens but the first are predicted: what follows the first copy is not to be known.
    """
    twice = np.concatenate([passages, passages], axis=1)
    rows, length = twice.shape
    begin = np.full((rows, 1), tokenizer.bos_id, np.int32)
    if tokenizer.adds_bos:  # place i predicts token i
        inputs, targets = np.concatenate([begin, twice[:, :-1]], axis=1), twice
        unknown = (0, length // 2)
    else:  # place i predicts token i + 1, and the last one nothing
        inputs, targets = twice, np.roll(twice, -1, axis=1)
        unknown = (length // 2 - 1, length - 1)
    weights = np.ones(twice.shape, np.float32)
    weights[:, unknown] = 0
    places = np.broadcast_to(np.arange(length, dtype=np.int32), twice.shape)
    return {
        "inputs": inputs,
        "targets": targets,
        "segment_ids": np.ones(twice.shape, np.int32),
        "positions": places,
        "weights": weights,
    }
