"""Chooses the key/value heads that stay exact by what each one gains."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from jaxtyping import Float, Int

from darkformer_jax.calibration.cache_budget import Budget, at_least_one, limit_of, parse_budget, show_bytes
from darkformer_jax.calibration.exact_layers import Wish, candidates_of, parse_wish
from darkformer_jax.calibration.heads import MixedHeads
from darkformer_jax.calibration.hybrids import Quality
from darkformer_jax.calibration.kept import Remember, keep_nothing, recall
from darkformer_jax.calibration.passages import MEASURED
from darkformer_jax.config.pattern import parse_pattern, shortest_pattern, show_layer
from darkformer_jax.data.progress import ProgressBar
from darkformer_jax.data.tokenizers import Tokenizer
from darkformer_jax.errors import UserError
from darkformer_jax.mixers.spec import MixerSpec
from darkformer_jax.model.spec import ModelSpec
from darkformer_jax.model.state_size import state_bytes
from darkformer_jax.model.transformer import Transformer
from darkformer_jax.tasks.table import table_lines

_NAMED = r"\d+:\d+(\+\d+)*(,\d+:\d+(\+\d+)*)*"

Head = tuple[int, int]  # layer, key/value head
HeadWish = int | Budget | tuple[Head, ...]  # so many, as many as fit, or these


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
      ranked: every head that could, in the order of the choice. Heads that were named come first.
      gains: -d(loss + copy / 4) / d share of each head; None: heads were named, and nothing was asked.
      points: the models with none, half the number, the number, twice the number and all heads exact.
      context: tokens at which caches are counted.
    """

    number: int
    ranked: list[Head]
    gains: Float[np.ndarray, "layers hkv"] | None
    points: list[HeadPoint]
    context: int

    @property
    def by_layer(self) -> dict[int, list[int]]:
        """The exact heads of each layer that has some."""
        chosen: dict[int, list[int]] = {}
        for layer, head in sorted(self.ranked[: self.number]):
            chosen.setdefault(layer, []).append(head)
        return chosen

    @property
    def point(self) -> HeadPoint:
        """The model that was chosen."""
        return next(point for point in self.points if point.heads == self.number)

    def to_json(self) -> dict[str, Any]:
        """What calibration.json has of it."""
        found = {
            "chosen": {str(layer): heads for layer, heads in self.by_layer.items()},
            "ranking": self.ranked,
            "cache_context": self.context,
            "curve": [point._asdict() for point in self.points],
        }
        if self.gains is not None:  # null in a layer that cannot be replaced: JSON has no infinity
            found["gains"] = [[gain if gain > -np.inf else None for gain in layer] for layer in self.gains.tolist()]
        return found


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


def parse_wishes(exact_layers: str, exact_heads: str, cache_budget: str) -> tuple[Wish, HeadWish | None]:
    """(the layers, the heads that are to stay exact): what the three flags ask for. Raises UserError for both."""
    if exact_heads == "none":
        return parse_wish(exact_layers, cache_budget), None
    if exact_layers != "none":
        both = f"--exact_heads={exact_heads} with --exact_layers={exact_layers}"
        raise UserError(f"{both}: allowed: one of them")
    return Wish(), _parse_head_wish(exact_heads, cache_budget)


def _parse_head_wish(exact_heads: str, cache_budget: str) -> HeadWish:
    """Reads auto:N, auto with a budget such as 20%@32768, or heads such as 5:2,20:1+2. Raises UserError for others."""
    given, colon, number = exact_heads.partition(":")
    try:
        if re.fullmatch(_NAMED, exact_heads, re.ASCII) and not cache_budget:
            return _named(exact_heads)
        if given == "auto" and colon and not cache_budget:
            return at_least_one(number)
        if exact_heads == "auto" and cache_budget:
            return parse_budget(cache_budget)
    except ValueError:
        pass
    raise UserError(
        f"--exact_heads={exact_heads}"
        + (f" with --cache_budget={cache_budget}" if cache_budget else "")
        + "; allowed: none, auto:N with N from 1, auto with --cache_budget=20%@32768, or heads by layer, 5:2,20:1+2"
    )


def _named(text: str) -> tuple[Head, ...]:
    """Raises UserError for a head that is named twice."""
    layers = (item.split(":") for item in text.split(","))
    heads = [(int(layer), int(head)) for layer, several in layers for head in several.split("+")]
    twice = [head for number, head in enumerate(heads) if head in heads[:number]]
    if twice:
        raise UserError(f"--exact_heads={text}: names head {twice[0][1]} of layer {twice[0][0]} twice")
    return tuple(heads)


def check_head_wish(wish: HeadWish | None, exact: ModelSpec, replaced: ModelSpec) -> None:
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
        if mixer.has_alibi:
            raise UserError(
                f"--exact_heads: the heads of layer {layer} have ALiBi's slopes by their number (positions = "
                f"{mixer.positions!r}), and another order would change them; allowed: --exact_layers"
            )
        if mixer.undecayed_heads:
            raise UserError(
                f"--exact_heads: the last heads of layer {layer} do not decay (undecayed_heads = "
                f"{mixer.undecayed_heads}), and another order would move them; allowed: --exact_layers"
            )
    heads = [(layer, head) for layer in candidates for head in range(exact.layers[layer].num_kv_heads)]
    if isinstance(wish, Budget):
        sizes = HeadSizes(exact, replaced, wish.context)
        limit_of(wish, sizes.total(()), sizes.total(heads[:1]), sizes.total(heads), "head")
        return
    most = len(heads) - 1
    if not isinstance(wish, int):
        _check_named(wish, exact, candidates)
    number = wish if isinstance(wish, int) else len(wish)
    if number > most:
        given = f"=auto:{wish}" if isinstance(wish, int) else ""
        raise UserError(
            f"--exact_heads{given}: of {most + 1} key/value heads one at least must be replaced; allowed: "
            + (f"1 to {most}" if most > 0 else "none")
        )


def _check_named(wish: Sequence[Head], exact: ModelSpec, candidates: Sequence[int]) -> None:
    for layer, head in wish:
        if not layer < exact.num_layers:
            raise UserError(f"--exact_heads: there is no layer {layer}; allowed: 0 to {exact.num_layers - 1}")
        if layer not in candidates:
            raise UserError(f"--exact_heads: layer {layer} is {exact.layer_kinds[layer]} and stays as it is anyway")
        if not head < exact.layers[layer].num_kv_heads:
            most = exact.layers[layer].num_kv_heads - 1
            raise UserError(f"--exact_heads: layer {layer} has no key/value head {head}; allowed: 0 to {most}")


def choose_heads(
    wish: HeadWish,
    exact: Transformer,
    replaced: Transformer,
    passages: Int[np.ndarray, "n l"],
    test: Int[np.ndarray, "m l"],
    tokenizer: Tokenizer,
    sizes: HeadSizes,
    progress_bar: ProgressBar,
    remember: Remember,
) -> HeadChoice:
    """Chooses heads by their gains on the passages that M was fitted to; the curve is of the test passages.

    Of heads that are named, the curve has only the model with them, beside those with none and with all.
    """
    candidates = candidates_of(exact.spec, replaced.spec)
    heads = MixedHeads(exact, replaced, candidates, tokenizer)
    num_kv_heads, gains = exact.spec.layers[0].num_kv_heads, None
    if isinstance(wish, int | Budget):
        ranked, gains = rank_heads(heads, passages, progress_bar, remember)
        number = wish if isinstance(wish, int) else _heads_within(wish, sizes, ranked)
        counts = sorted({0, number // 2, number, min(2 * number, len(ranked)), len(ranked)})
    else:
        ranked = [*wish, *(head for head in itertools.product(candidates, range(num_kv_heads)) if head not in wish)]
        number = len(wish)
        counts = [0, number, len(ranked)]
    points = []
    with progress_bar(len(counts), "model", "together") as bar:
        for count in counts:
            measure = functools.partial(heads.measure, shares_of(ranked[:count], exact.spec), test[:MEASURED])
            quality = Quality(*recall(remember, f"exact_heads_{count}", measure))
            points.append(HeadPoint(count, *quality, sizes.total(ranked[:count])))
            bar.update()
    return HeadChoice(number, ranked, gains, points, sizes.context)


def rank_heads(
    heads: MixedHeads,
    passages: Int[np.ndarray, "n l"],
    progress_bar: ProgressBar,
    remember: Remember = keep_nothing,
) -> tuple[list[Head], Float[np.ndarray, "layers hkv"]]:
    """The heads of the layers that can be replaced, that with the largest gain first; and all gains."""
    gains = heads.gains(passages, progress_bar, remember=remember)
    order = np.argsort(-gains, axis=None, kind="stable")[: np.count_nonzero(gains > -np.inf)]
    return [divmod(int(place), gains.shape[1]) for place in order], gains


def shares_of(heads: Iterable[Head], spec: ModelSpec) -> Float[np.ndarray, "layers hkv"]:
    """1 where a head is exact, else 0."""
    shares = np.zeros((spec.num_layers, spec.layers[0].num_kv_heads))
    for layer, head in heads:
        shares[layer, head] = 1
    return shares


def _heads_within(budget: Budget, sizes: HeadSizes, ranked: Sequence[Head]) -> int:
    limit = budget.limit(sizes.total(ranked))
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
