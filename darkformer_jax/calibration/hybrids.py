"""The quality of models that are exact in some layers and replaced in the others. What they share is run once."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from darkformer_jax.calibration.sight import copy_distance
from darkformer_jax.data.progress import ProgressBar
from darkformer_jax.data.tokenizers import Tokenizer
from darkformer_jax.model.transformer import Block, Transformer

_TOKENS_AT_ONCE = 128  # of which there are logits at a time


class Quality(NamedTuple):
    """What a model makes of some passages.

    Attributes:
      loss: nats per token.
      copy: nats per token of the second half of passages that are repeated.
    """

    loss: float
    copy: float


class Hybrids:
    """Models that have, layer by layer, either the exact layer or the one that replaces it.

    Args:
      exact: the model before; its embeddings, final norm and head are those of all hybrids.
      replaced: the same model with every layer replaced that can be.
      passages: each is read as a document, and the first half of each as a document that is repeated.
      tokenizer: says whether a document has a first token of its own, which is not repeated.
    """

    def __init__(
        self, exact: Transformer, replaced: Transformer, passages: Int[np.ndarray, "n l"], tokenizer: Tokenizer
    ) -> None:
        self._models = (exact, replaced)
        self._whole: Any = nnx.split(exact)
        self._rows = [*map(plain_row, passages), *(repeated_row(row, int(tokenizer.adds_bos)) for row in passages)]
        self._num_passages = len(passages)

    def measure(self, replaced: Sequence[frozenset[int]], progress_bar: ProgressBar, label: str = "") -> list[Quality]:
        """The quality of the models in which these layers are replaced.

        Models that agree in their first layers share the hidden states behind them: the walk goes down one branch after
        another, and keeps the states of the branches that are still to come. The one with fewer models comes first: no
        more branches wait than the logarithm of the number of models.
        """
        num_layers = self._models[0].spec.num_layers
        found: dict[int, Quality] = {}
        with progress_bar(_num_runs(replaced, num_layers), "layer", label) as bar:
            x = [self._models[0].embed(jnp.asarray(row.tokens[None])) for row in self._rows]
            branches = [(0, x, list(range(len(replaced))))]
            while branches:
                layer, x, models = branches.pop()
                if layer == num_layers:
                    quality = self._quality(x)
                    found |= dict.fromkeys(models, quality)
                    continue
                groups = [[n for n in models if (layer in replaced[n]) == is_replaced] for is_replaced in (0, 1)]
                for is_replaced in sorted((0, 1), key=lambda side: -len(groups[side])):  # the last is taken up first
                    if groups[is_replaced]:
                        branches.append((layer + 1, self._run(x, layer, is_replaced), groups[is_replaced]))
                        bar.update()
        return [found[number] for number in range(len(replaced))]

    def _run(self, x: list[Array], layer: int, is_replaced: int) -> list[Array]:
        graphdef, arrays = nnx.split(self._models[is_replaced].layer(layer))
        return [_run_layer(graphdef, arrays, row) for row in x]

    def _quality(self, x: list[Array]) -> Quality:
        found = [float(nats(*self._whole, last, row)) for last, row in zip(x, self._rows, strict=True)]
        scored = [float(np.sum(row.weights)) for row in self._rows]
        n = self._num_passages
        return Quality(sum(found[:n]) / sum(scored[:n]), sum(found[n:]) / sum(scored[n:]))


class Row(NamedTuple):
    """Tokens of one document, the token after each, and 1 where it counts."""

    tokens: Int[np.ndarray, "l"]
    targets: Int[np.ndarray, "l"]
    weights: Float[np.ndarray, "l"]


def plain_row(passage: Int[np.ndarray, "l"]) -> Row:
    """A passage, of which every token counts that has one before it."""
    return _row(passage, first=1)


def repeated_row(passage: Int[np.ndarray, "l"], begin: int) -> Row:
    """The first half of a passage, and again without its `begin` first tokens. Only the second copy counts."""
    half = copy_distance(len(passage), begin)
    once = passage[begin : begin + half]
    return _row(np.concatenate([passage[:begin], once, once]), first=begin + half)


def _row(tokens: Int[np.ndarray, "l"], first: int) -> Row:
    """A row in which the tokens from `first` on are predicted."""
    places = np.arange(1, len(tokens) + 1)
    return Row(tokens, np.roll(tokens, -1), ((places >= first) & (places < len(tokens))).astype(np.float32))


def _num_runs(replaced: Sequence[frozenset[int]], num_layers: int) -> int:
    """How many times a layer is run: once for each way to begin."""
    return sum(len({layers & frozenset(range(depth)) for layers in replaced}) for depth in range(1, num_layers + 1))


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(graphdef: Any, arrays: nnx.State, x: Float[Array, "1 l d"]) -> Float[Array, "1 l d"]:
    block: Block = nnx.merge(graphdef, arrays)
    positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    after, _ = block(x, jnp.ones_like(positions), positions, None)
    return after


@functools.partial(jax.jit, static_argnums=0)
def nats(graphdef: Any, arrays: nnx.State, x: Float[Array, "1 l d"], row: Row) -> Float[Array, ""]:
    """The sum of -log p over the scored tokens, from the output of the last layer."""
    model: Transformer = nnx.merge(graphdef, arrays)

    def one_token(token: tuple[Array, Array, Array]) -> Array:
        hidden, target, weight = token
        return -weight * jax.nn.log_softmax(model.logits(hidden))[target]

    tokens = (model.final_norm(x)[0], row.targets, row.weights)
    return jnp.sum(jax.lax.map(one_token, tokens, batch_size=_TOKENS_AT_ONCE))
