"""Which layers of a model stay exact when the others are replaced: as the user says, or by what each layer costs."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import ml_collections

from darkformer_jax.calibration.cache_budget import CACHE_CONTEXT, Budget, at_least_one, layers_within, parse_budget
from darkformer_jax.calibration.hybrids import Quality
from darkformer_jax.config.pattern import parse_pattern, shortest_pattern, show_layer
from darkformer_jax.errors import UserError
from darkformer_jax.model.spec import ModelSpec


class Wish(NamedTuple):
    """What --exact_layers and --cache_budget ask for; one of the three, or none of them for no exact layer.

    Attributes:
      layers: numbers of layers.
      number: how many are to be chosen.
      budget: how many bytes the chosen ones may fill, with the states of the others.
    """

    layers: tuple[int, ...] = ()
    number: int = 0
    budget: Budget | None = None

    @property
    def is_auto(self) -> bool:
        """Whether the layers are still to be chosen."""
        return self.number > 0 or self.budget is not None


def parse_wish(exact_layers: str, cache_budget: str) -> Wish:
    """Reads none, 3,17, auto:N, or auto with a budget such as 64MB@32768 or 20%@32768. Raises UserError for others."""
    given, colon, number = exact_layers.partition(":")
    is_auto, shown = given == "auto", f"--exact_layers={exact_layers}"
    if cache_budget and (not is_auto or colon):
        raise UserError(
            f"--cache_budget={cache_budget} with {shown}; allowed: --exact_layers=auto or --exact_heads=auto"
        )
    if is_auto and not colon:
        if not cache_budget:
            raise UserError(f"{shown}: how many? allowed: auto:N, or auto with --cache_budget=64MB@{CACHE_CONTEXT}")
        return Wish(budget=parse_budget(cache_budget))
    if exact_layers == "none":
        return Wish()
    try:
        if is_auto:
            return Wish(number=at_least_one(number))
        layers = [int(text) for text in exact_layers.split(",")]
    except ValueError as error:
        raise UserError(f"{shown}: allowed: none, numbers of layers such as 3,17, or auto:N with N from 1") from error
    if len(set(layers)) < len(layers):
        raise UserError(f"{shown}: a layer is there twice")
    return Wish(layers=tuple(sorted(layers)))


def check_wish(wish: Wish, exact: ModelSpec, replaced: ModelSpec) -> Wish:
    """The wish for a model, with the budget as a number of layers. Nothing is fitted yet.

    Args:
      exact: the model before.
      replaced: the model with every layer replaced that can be.

    Raises:
      UserError: no such layer, one that is not replaced anyway, none left to replace, or a budget that holds no exact
        layer or all of them.
    """
    candidates = candidates_of(exact, replaced)
    most = len(candidates) - 1
    for layer in wish.layers:
        if not 0 <= layer < exact.num_layers:
            raise UserError(f"--exact_layers: there is no layer {layer}; allowed: 0 to {exact.num_layers - 1}")
        if layer not in candidates:
            raise UserError(f"--exact_layers: layer {layer} is {exact.layer_kinds[layer]} and stays as it is anyway")
    if len(wish.layers) > most:
        raise UserError(
            f"--exact_layers names all of the {len(candidates)} layers; allowed: fewer, or there is nothing to replace"
        )
    if wish.number > most:
        raise UserError(
            f"--exact_layers=auto:{wish.number}: {len(candidates)} layers can be replaced, and one at least must be; "
            f"allowed: 1 to {most}"
        )
    if wish.budget is not None:
        return Wish(number=layers_within(wish.budget, exact, replaced, candidates), budget=wish.budget)
    return wish


def candidates_of(exact: ModelSpec, replaced: ModelSpec) -> list[int]:
    """The layers that are replaced unless they are to stay exact: not those that a model has only locally."""
    pairs = enumerate(zip(exact.layers, replaced.layers, strict=True))
    return [layer for layer, (before, after) in pairs if before.kind != after.kind]


def ranking(alone: Sequence[Quality], base: Quality, candidates: Sequence[int]) -> list[int]:
    """The candidates in the order in which they are to stay exact.

    There are two orders: by the copying, and by the loss, that the model loses if the layer alone is replaced. They
    take turns to name their next layer that is not named yet, copying first. What a layer costs alone says which layers
    matter, not how their errors add up.

    Args:
      alone: the quality of the model in which only this candidate is replaced.
      base: that of the exact model.
    """
    cost = {layer: Quality(q.loss - base.loss, q.copy - base.copy) for layer, q in zip(candidates, alone, strict=True)}
    orders = [sorted(candidates, key=lambda layer: -cost[layer].copy), sorted(candidates, key=lambda i: -cost[i].loss)]
    ranked: list[int] = []
    while len(ranked) < len(candidates):
        order = orders[len(ranked) % 2]
        ranked.append(next(layer for layer in order if layer not in ranked))
    return ranked


def hybrid_pattern(exact: ml_collections.ConfigDict, replaced: ml_collections.ConfigDict, layers: Iterable[int]) -> str:
    """`model.attention.pattern` of the model in which these layers are those of `exact`, the others of `replaced`."""
    chosen = set(layers)
    before, after = (
        [show_layer(layer) for layer in parse_pattern(config.model.attention.pattern, config.model.attention.kind)]
        for config in (exact, replaced)
    )
    entries = [
        before[layer % len(before)] if layer in chosen else after[layer % len(after)]
        for layer in range(exact.model.num_layers)
    ]
    return ",".join(shortest_pattern(entries))
