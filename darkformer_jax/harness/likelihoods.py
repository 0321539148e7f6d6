"""Log-likelihoods of continuations: of many (context, continuation) pairs of any lengths, in few compiled programs."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from darkformer_jax.data.progress import ProgressBar
from darkformer_jax.errors import UserError
from darkformer_jax.model.network import Network
from darkformer_jax.model.token_loss import Predictions, token_figures
from darkformer_jax.runs.load import WorkdirModel

_SHORTEST = 16  # tokens of the shortest compiled program
_PLACES = 64  # wider programs have a multiple of it, so that few are compiled


class Pair(NamedTuple):
    """Ids of a context, at least one, and of what continues it, at least one."""

    context: Sequence[int]
    continuation: Sequence[int]


class Likelihood(NamedTuple):
    """log p(continuation | context) in nats, and whether each of its tokens had the largest logit."""

    log_probability: float
    is_greedy: bool


@dataclasses.dataclass
class _Row:
    """Pairs that differ at most in their last token: one pass of the model answers them all.

    Attributes:
      inputs: their ids without the last one.
      num_scored: tokens of the longest continuation.
      members: (index of the pair, tokens of its continuation, its last token).
    """

    inputs: tuple[int, ...]
    num_scored: int = 0
    members: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)


class PairScorer:
    """Scores pairs with one model.

    Args:
      model: a language model.
      batch_size: rows at a time.
      max_length: the model reads at most so many tokens, the last ones of a pair, without its very last.
    """

    def __init__(self, model: WorkdirModel, batch_size: int, max_length: int) -> None:
        self._model, self._batch_size, self._max_length = model, batch_size, max_length
        self._step = make_pair_step(model.network)

    def score(self, pairs: Sequence[Pair], progress_bar: ProgressBar) -> list[Likelihood]:
        """The likelihood of every pair, in their order.

        Each row is a document of its own, from position 0 on. Rows are sorted by length, the longest first, and padded
        to one of few lengths.

        Raises UserError if one is not finite.
        """
        model, rows = self._model, _rows(pairs, self._max_length)
        most = _padded_size(max((len(row.members) for row in rows), default=1), 1)
        size = min(self._batch_size, len(rows))
        answers: dict[int, Likelihood] = {}
        pending: tuple[list[_Row], Any] | None = None
        with progress_bar(sum(len(row.inputs) for row in rows), "token", "likelihoods") as bar:

            def answer(batch: list[_Row], outputs: Any) -> None:
                answers.update(_answers(batch, outputs))
                bar.update(sum(len(row.inputs) for row in batch))

            for begin in range(0, len(rows), self._batch_size):
                batch = rows[begin : begin + self._batch_size]
                arrays, width = _batch(batch, size, most)
                outputs = self._step(model.params, model.projections, *jax.device_put(arrays), width=width)
                if pending is not None:  # read the previous batch while the device computes this one
                    answer(*pending)
                pending = (batch, outputs)
            if pending is not None:
                answer(*pending)
        return [answers[index] for index in range(len(pairs))]


def _rows(pairs: Iterable[Pair], max_length: int) -> list[_Row]:
    rows: dict[tuple[int, ...], _Row] = {}
    for index, (context, continuation) in enumerate(pairs):
        inputs = tuple([*context, *continuation][-(max_length + 1) : -1])
        row = rows.setdefault(inputs, _Row(inputs))
        row.num_scored = max(row.num_scored, len(continuation))
        row.members.append((index, len(continuation), continuation[-1]))
    return sorted(rows.values(), key=lambda row: -len(row.inputs))


def _padded_size(size: int, smallest: int = _SHORTEST) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: at most a third is padding, and programs are few."""
    power = max(smallest, 1 << (size - 1).bit_length())
    return 3 * power // 4 if power > smallest and size <= 3 * power // 4 else power


def _batch(rows: Sequence[_Row], size: int, most: int) -> tuple[tuple[np.ndarray, ...], int]:
    """The arrays of `make_pair_step` for `size` rows, of which the last may be padding; and its width.

    most: members per row.
    """
    tokens = np.zeros((size, _padded_size(len(rows[0].inputs))), np.int32)  # the first row is the longest
    lengths = np.ones(size, np.int32)
    lasts = np.zeros((size, most), np.int32)
    for place, row in enumerate(rows):
        tokens[place, : len(row.inputs)] = row.inputs
        lengths[place] = len(row.inputs)
        lasts[place, : len(row.members)] = [last for _, _, last in row.members]
    width = _padded_size(max(row.num_scored for row in rows))
    return (tokens, lengths, lasts), width if width <= _PLACES else -(-width // _PLACES) * _PLACES


def make_pair_step(network: Network) -> Callable[..., tuple[Array, Array, Array]]:
    """A jitted (params, projections, tokens, lengths, lasts, width) -> what the model says at the ends of rows.

    Args of the function:
      tokens: [b, n] ids, padded at the end.
      lengths: [b] real tokens per row, at least one.
      lasts: [b, k] ids that may follow a row.
      width: so many places at the end of each row are scored. Places before a row's beginning hold nothing of use.

    Returns of the function:
      [b, width] log p of the row's own token after each place, in nats. The row's end has no own token.
      [b, width] the likeliest id after each place.
      [b, k] log p of each of `lasts` after the row.
    """

    def pair_step(
        params: dict,
        projections: dict,
        tokens: Int[Array, "b n"],
        lengths: Int[Array, "b"],
        lasts: Int[Array, "b k"],
        width: int,
    ) -> tuple[Float[Array, "b width"], Int[Array, "b width"], Float[Array, "b k"]]:
        model = network.bind(params, projections)
        index = jnp.arange(tokens.shape[1])
        segment_ids = (index[None] < lengths[:, None]).astype(jnp.int32)
        hidden, _ = model.hidden(tokens, segment_ids, jnp.broadcast_to(index[None], tokens.shape))
        places = jnp.maximum(lengths[:, None] - width + jnp.arange(width)[None], 0)
        states = jnp.take_along_axis(hidden, places[..., None], axis=1)
        following = jnp.take_along_axis(tokens, jnp.minimum(places + 1, tokens.shape[1] - 1), axis=1)

        figures = token_figures(Predictions(states, model.unembedding), following)
        return -figures.nll, figures.best, _log_probabilities(model.logits(states[:, -1]), lasts)

    return jax.jit(pair_step, static_argnames="width")


def _log_probabilities(logits: Float[Array, "... vocab"], ids: Int[Array, "... k"]) -> Float[Array, "... k"]:
    return jnp.take_along_axis(logits, ids, axis=-1) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _answers(rows: Sequence[_Row], outputs: tuple[Array, Array, Array]) -> Iterator[tuple[int, Likelihood]]:
    """(index, likelihood) of a batch's pairs; waits for the device that computes them."""
    own, best, of_lasts = (np.asarray(output) for output in outputs)
    for place, row in enumerate(rows):
        for member, (index, length, last) in enumerate(row.members):
            before = slice(own.shape[1] - length, own.shape[1] - 1)  # the places of all but the last token
            log_probability = float(own[place, before].sum(dtype=np.float64) + of_lasts[place, member])
            if not math.isfinite(log_probability):
                raise UserError(
                    f"a log-likelihood is {log_probability}: the model's weights are damaged, or a number overflowed"
                )
            expected = [*row.inputs[len(row.inputs) - length + 1 :], last]
            yield index, Likelihood(log_probability, best[place, own.shape[1] - length :].tolist() == expected)
