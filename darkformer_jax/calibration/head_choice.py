"""Chooses the key/value heads that stay exact by what each one gains, and orders every layer's heads accordingly."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, Int

from darkformer_jax.calibration.cache_budget import Budget, at_least_one, parse_budget, show_bytes
from darkformer_jax.calibration.exact_layers import Wish, candidates_of, parse_wish
from darkformer_jax.calibration.heads import MixedHeads
from darkformer_jax.config.pattern import parse_pattern, shortest_pattern, show_layer
from darkformer_jax.data.progress import ProgressBar
from darkformer_jax.data.tokenizers import Tokenizer
from darkformer_jax.errors import UserError
from darkformer_jax.mixers.spec import MixerSpec
from darkformer_jax.model.network import Network, logical_axes
from darkformer_jax.model.spec import ModelSpec
from darkformer_jax.model.state_size import state_bytes
from darkformer_jax.model.transformer import Transformer
from darkformer_jax.tasks.table import table_lines
from darkformer_jax.training.step import TrainState

_PASSAGES = 8  # of the test text, at most

Head = tuple[int, int]  # layer, key/value head


class HeadPoint(NamedTuple):
    """A model with some exact heads, on passages that nothing was chosen or fitted on.

    Attributes:
      heads: how many are exact.
      loss, copy: see `Quality`.
      cache_bytes: of one sequence, all layers' caches and states.
    """

    heads: int
    loss: float
    copy: float
    cache_bytes: int


class HeadChoice(NamedTuple):
    """What was chosen, and by which figures.

    Attributes:
      number: how many heads stay exact.
      ranked: every head that could, in the order of the choice.
      gains: -d(loss + copy / 4) / d share of each head.
      points: the models with none, half the number, the number, twice the number and all heads exact.
      context: tokens at which caches are counted.
    """

    number: int
    ranked: list[Head]
    gains: Float[np.ndarray, "layers hkv"]
    points: list[HeadPoint]
    context: int

    @property
    def by_layer(self) -> dict[int, list[int]]:
        """The exact heads of each layer that has some."""
        chosen: dict[int, list[int]] = {}
        for layer, head in sorted(self.ranked[: self.number]):
            chosen.setdefault(layer, []).append(head)
        return chosen

    def to_json(self) -> dict[str, Any]:
        """What calibration.json has of it."""
        return {
            "chosen": {str(layer): heads for layer, heads in self.by_layer.items()},
            "ranking": self.ranked,
            "cache_context": self.context,
            "curve": [point._asdict() for point in self.points],
        }


class HeadSizes:
    """Bytes of the states of models with some exact heads."""

    def __init__(self, exact: ModelSpec, replaced: ModelSpec, context: int) -> None:
        self.context, self._exact, self._replaced = context, exact, replaced

    def total(self, heads: Sequence[Head]) -> int:
        """Of one sequence. Keys and values have the second model's dtype."""
        counts = np.bincount([layer for layer, _ in heads], minlength=self._exact.num_layers)
        return sum(self._layer(layer, int(count)) for layer, count in enumerate(counts))

    def _layer(self, layer: int, count: int) -> int:
        spec = layer_spec(self._exact.layers[layer], self._replaced.layers[layer], count)
        return state_bytes(spec, self.context, self._replaced.dtype)


def layer_spec(exact: MixerSpec, replaced: MixerSpec, count: int) -> MixerSpec:
    """That of a layer with so many exact key/value heads."""
    return exact if count == exact.num_kv_heads else dataclasses.replace(replaced, exact_kv_heads=count)


def parse_wishes(exact_layers: str, exact_heads: str, cache_budget: str) -> tuple[Wish, int | Budget | None]:
    """(the layers, the heads that are to stay exact): what the three flags ask for. Raises UserError for both."""
    if exact_heads == "none":
        return parse_wish(exact_layers, cache_budget), None
    if exact_layers != "none":
        both = f"--exact_heads={exact_heads} with --exact_layers={exact_layers}"
        raise UserError(f"{both}: allowed: one of them")
    return Wish(), _parse_head_wish(exact_heads, cache_budget)


def _parse_head_wish(exact_heads: str, cache_budget: str) -> int | Budget:
    """Reads auto:N, or auto with a budget such as 20%@32768. Raises UserError for others."""
    given, colon, number = exact_heads.partition(":")
    try:
        if given == "auto" and colon and not cache_budget:
            return at_least_one(number)
        if exact_heads == "auto" and cache_budget:
            return parse_budget(cache_budget)
    except ValueError:
        pass
    raise UserError(
        f"--exact_heads={exact_heads}"
        + (f" with --cache_budget={cache_budget}" if cache_budget else "")
        + "; allowed: none, auto:N with N from 1, or auto with --cache_budget=20%@32768"
    )


def check_head_wish(wish: int | Budget | None, exact: ModelSpec, replaced: ModelSpec) -> None:
    """Raises UserError for a wish that the model cannot have; nothing is fitted yet."""
    if wish is None:
        return
    candidates = candidates_of(exact, replaced)
    for layer in candidates:
        mixer = exact.layers[layer]
        if mixer.softcap:
            raise UserError(
                f"--exact_heads: layer {layer} caps its logits (softcap = {mixer.softcap}), and exact heads beside "
                "features do not; allowed: --exact_layers"
            )
        if mixer.undecayed_heads:
            raise UserError(
                f"--exact_heads: the last heads of layer {layer} do not decay (undecayed_heads = "
                f"{mixer.undecayed_heads}), and another order would move them; allowed: --exact_layers"
            )
    heads = [(layer, head) for layer in candidates for head in range(exact.layers[layer].num_kv_heads)]
    if isinstance(wish, Budget):
        _check_budget(wish, HeadSizes(exact, replaced, wish.context), heads)
        return
    most = len(heads) - 1
    if wish > most:
        raise UserError(
            f"--exact_heads=auto:{wish}: of {most + 1} key/value heads one at least must be replaced; allowed: 1 to "
            f"{most}"
        )


def _check_budget(budget: Budget, sizes: HeadSizes, heads: Sequence[Head]) -> None:
    none, one, every = (sizes.total(some) for some in ((), heads[:1], heads))
    limit = budget.amount * every if budget.is_share else budget.amount
    if limit < one:
        raise UserError(
            f"--cache_budget={budget.text}: is {show_bytes(limit)}; without an exact head the model needs "
            f"{show_bytes(none)}, with one {show_bytes(one)}; allowed: that, or --exact_heads=none"
        )
    if limit >= every:
        raise UserError(
            f"--cache_budget={budget.text}: is {show_bytes(limit)}, and the exact model needs {show_bytes(every)}; "
            "there is nothing to replace"
        )


def choose_heads(
    wish: int | Budget,
    exact: Transformer,
    replaced: Transformer,
    passages: Int[np.ndarray, "n l"],
    test: Int[np.ndarray, "m l"],
    tokenizer: Tokenizer,
    sizes: HeadSizes,
    progress_bar: ProgressBar,
) -> HeadChoice:
    """Chooses heads by their gains on the passages that M was fitted to; the curve is of the test passages."""
    candidates = candidates_of(exact.spec, replaced.spec)
    heads = MixedHeads(exact, replaced, candidates, tokenizer)
    gains = heads.gains(passages, progress_bar)
    ranked = [divmod(int(place), gains.shape[1]) for place in np.argsort(-gains, axis=None, kind="stable")]
    ranked = ranked[: len(candidates) * gains.shape[1]]
    number = wish if isinstance(wish, int) else _heads_within(wish, sizes, ranked)
    counts = sorted({0, number // 2, number, min(2 * number, len(ranked)), len(ranked)})
    points = []
    with progress_bar(len(counts), "model", "together") as bar:
        for count in counts:
            shares = np.zeros(gains.shape)
            shares[tuple(np.array(ranked[:count], int).reshape(-1, 2).T)] = 1
            quality = heads.measure(shares, test[:_PASSAGES])
            points.append(HeadPoint(count, *quality, sizes.total(ranked[:count])))
            bar.update()
    return HeadChoice(number, ranked, gains, points, sizes.context)


def _heads_within(budget: Budget, sizes: HeadSizes, ranked: Sequence[Head]) -> int:
    limit = budget.amount * sizes.total(ranked) if budget.is_share else budget.amount
    return max(count for count in range(len(ranked)) if sizes.total(ranked[:count]) <= limit)


def head_pattern(
    exact: ml_collections.ConfigDict, replaced: ml_collections.ConfigDict, by_layer: dict[int, list[int]], num_kv: int
) -> str:
    """`model.attention.pattern` of the model in which these layers have as many exact heads."""
    before, after = (
        parse_pattern(config.model.attention.pattern, config.model.attention.kind) for config in (exact, replaced)
    )
    entries = []
    for layer in range(exact.model.num_layers):
        entry, count = after[layer % len(after)], len(by_layer.get(layer, ()))
        if count == num_kv:
            entry = before[layer % len(before)]
        elif count:
            entry = entry._replace(options={**entry.options, "exact_kv_heads": count})
        entries.append(show_layer(entry))
    return ",".join(shortest_pattern(entries))


def with_exact_heads_first(state: TrainState, network: Network, by_layer: dict[int, list[int]]) -> TrainState:
    """The state with the heads of these layers in another order, the exact ones first. The function does not change."""
    trees = ((state.params, network.map_params), (state.projections, network.map_projections))
    params, projections = (_in_order(tree, visit, network.spec, by_layer) for tree, visit in trees)
    return state._replace(params=params, projections=projections)


def _in_order(tree: dict, visit: Any, spec: ModelSpec, by_layer: dict[int, list[int]]) -> dict:
    axes: dict[tuple[str, ...], tuple[str | None, ...]] = {}
    visit(lambda path, variable: axes.setdefault(tuple(path), logical_axes(variable)))
    new = flatten_dict(tree)
    for layer, first in by_layer.items():
        row, place = divmod(layer, len(spec.pattern))
        heads, kv_heads = spec.layers[layer].num_heads, spec.layers[layer].num_kv_heads
        order = np.array([*first, *(head for head in range(kv_heads) if head not in first)])
        group = np.arange(heads // kv_heads)
        orders = {"kv_heads": order, "heads": (order[:, None] * len(group) + group).ravel()}
        for path in [path for path in new if path[:2] == (f"blocks_{place}", "attention")]:
            moved = new[path][row]
            for axis, name in enumerate(axes[path][1:]):  # the first axis is that of the stacked layers
                if name in orders:
                    moved = moved.take(orders[name], axis=axis)
            new[path] = new[path].at[row].set(moved)
    return unflatten_dict(new)


def restacked(state: TrainState, network: Network, other: Network, start: TrainState) -> TrainState:
    """`start`, a state of `other`, with every array that `state` of `network` has for the same layer."""
    trees = []
    for old, new in ((state.params, start.params), (state.projections, start.projections)):
        source, target = flatten_dict(old), flatten_dict(new)
        for path in [path for path in target if not path[0].startswith("blocks_")]:
            target[path] = source[path]
        for layer in range(network.spec.num_layers):
            (row, place), (to_row, to_place) = (divmod(layer, len(net.spec.pattern)) for net in (network, other))
            for path in [path for path in target if path[0] == f"blocks_{to_place}"]:
                value = source[(f"blocks_{place}", *path[1:])][row]
                target[path] = target[path].at[to_row].set(value)
        trees.append(unflatten_dict(target))
    return start._replace(params=trees[0], projections=trees[1])


def head_lines(choice: HeadChoice) -> list[str]:
    """The curve as a table; its last point is the exact model. A star marks the chosen one."""
    exact = choice.points[-1]
    rows = [["exact heads", "loss", "over exact", "copy", f"cache at {choice.context:,}", "of exact"]]
    for point in choice.points:
        star = "*" if point.heads == choice.number else ""
        share = f"{100 * point.cache_bytes / exact.cache_bytes:.1f}%"
        over = f"{100 * (point.loss / exact.loss - 1):.2f}%"
        figures = [f"{point.loss:.4f}", over, f"{point.copy:.3f}", show_bytes(point.cache_bytes), share]
        rows.append([f"{point.heads}{star}", *figures])
    chosen = ", ".join(f"{layer}: {'+'.join(map(str, heads))}" for layer, heads in choice.by_layer.items())
    return [*table_lines(rows), f"* chosen: of layer: key/value heads {chosen} stay exact"]
