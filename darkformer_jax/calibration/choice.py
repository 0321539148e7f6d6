"""Chooses the layers that stay exact by what each one costs, and measures the models that come of it."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from darkformer_jax.calibration.cache_budget import CacheSizes
from darkformer_jax.calibration.exact_layers import Wish, candidates_of, ranking
from darkformer_jax.calibration.hybrids import Hybrids, Quality
from darkformer_jax.calibration.kept import Remember, recall
from darkformer_jax.calibration.passages import MEASURED
from darkformer_jax.calibration.quality_curve import Point, counts_of, points_of
from darkformer_jax.data.progress import ProgressBar
from darkformer_jax.data.tokenizers import Tokenizer
from darkformer_jax.model.transformer import Transformer


class Choice(NamedTuple):
    """What was chosen, and by which figures.

    Attributes:
      number: how many layers stay exact.
      ranked: every layer that could, in the order of the choice.
      alone: what the model loses if only this layer is replaced: `layer`, and the rises `loss` and `copy`.
      points: the models with 0, 2, 4, ... layers of the ranking exact, and with all.
      context: tokens at which the points' caches are counted.
    """

    number: int
    ranked: list[int]
    alone: list[dict[str, Any]]
    points: list[Point]
    context: int

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that stay exact."""
        return tuple(sorted(self.ranked[: self.number]))

    @property
    def point(self) -> Point:
        """The model that was chosen."""
        return next(point for point in self.points if len(point.layers) == self.number)

    def to_json(self) -> dict[str, Any]:
        """What calibration.json has of it."""
        curve = [point._asdict() for point in self.points]
        return {
            "chosen": self.layers,
            "ranking": self.ranked,
            "alone": self.alone,
            "cache_context": self.context,
            "curve": curve,
        }


def choose(
    wish: Wish,
    exact: Transformer,
    replaced: Transformer,
    passages: Int[np.ndarray, "n l"],
    test: Int[np.ndarray, "m l"],
    tokenizer: Tokenizer,
    sizes: CacheSizes,
    progress_bar: ProgressBar,
    remember: Remember,
) -> Choice:
    """Chooses `wish.number` layers.

    Args:
      exact: the model before.
      replaced: the model with every layer replaced that can be.
      passages: the layers are chosen by these, which they were fitted on; at most 8 of them.
      test: the curve is measured on these, likewise.
      tokenizer: the model's.
      sizes: of the caches, for the curve.
      remember: keeps what was measured.
    """
    candidates = candidates_of(exact.spec, replaced.spec)
    both = Hybrids(exact, replaced, passages[:MEASURED], tokenizer)
    alone = [frozenset(), *(frozenset({layer}) for layer in candidates)]
    measure = functools.partial(both.measure, alone, progress_bar, "each layer alone")
    base, *costs = itertools.starmap(Quality, recall(remember, "each_layer_alone", measure))
    ranked = ranking(costs, base, candidates)
    counts = counts_of(wish.number, len(candidates))
    models = [frozenset(ranked[count:]) for count in counts]
    together = Hybrids(exact, replaced, test[:MEASURED], tokenizer)
    measure = functools.partial(together.measure, models, progress_bar, "together")
    found = list(itertools.starmap(Quality, recall(remember, "together", measure)))
    points = points_of(ranked, counts, found, sizes)
    return Choice(wish.number, ranked, _rises(candidates, costs, base), points, sizes.context)


def _rises(candidates: Sequence[int], costs: Sequence[Quality], base: Quality) -> list[dict[str, Any]]:
    return [
        {"layer": layer, "loss": quality.loss - base.loss, "copy": quality.copy - base.copy}
        for layer, quality in zip(candidates, costs, strict=True)
    ]
