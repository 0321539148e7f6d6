"""How large the caches of a partly exact model are, and how many exact layers a number of bytes holds."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from darkformer_jax.config.fields import whole_number
from darkformer_jax.errors import UserError
from darkformer_jax.model.spec import ModelSpec
from darkformer_jax.model.state_size import state_bytes

CACHE_CONTEXT = 32768  # tokens at which caches are compared where no budget says another number

_UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_BUDGET = re.compile(rf"(\d+(?:\.\d+)?)({'|'.join(_UNITS)}|%)@([\d_,]+)")


class Budget(NamedTuple):
    """What all caches and states of one sequence may take at some length.

    Attributes:
      amount: bytes, or a share of the exact model's from 0 to 1.
      is_share: which of them.
      context: tokens.
      text: as it was given.
    """

    amount: float
    is_share: bool
    context: int
    text: str

    def limit(self, every: int) -> float:
        """Its bytes, where the exact model needs `every`."""
        return self.amount * every if self.is_share else self.amount


class CacheSizes(NamedTuple):
    """Bytes of every layer's state at some length, as an exact layer and as the one that replaces it.

    Layers that are not replaced have the same size in both.
    """

    context: int
    exact: tuple[int, ...]
    replaced: tuple[int, ...]

    @classmethod
    def of(cls, exact: ModelSpec, replaced: ModelSpec, context: int) -> "CacheSizes":
        """The sizes in two models of the same depth. Keys and values have the second's dtype in both."""
        sizes = ([state_bytes(mixer, context, replaced.dtype) for mixer in spec.layers] for spec in (exact, replaced))
        return cls(context, *map(tuple, sizes))

    def total(self, layers: Iterable[int]) -> int:
        """Bytes of the model in which these layers are exact."""
        chosen = set(layers)
        pairs = enumerate(zip(self.exact, self.replaced, strict=True))
        return sum(pair[0] if layer in chosen else pair[1] for layer, pair in pairs)


def parse_budget(text: str) -> Budget:
    """Reads 64MB@32768 or 20%@32768. Raises UserError for others."""
    match = _BUDGET.fullmatch(text)
    if match is None:
        units = ", ".join(_UNITS)
        raise UserError(
            f"--cache_budget={text}: allowed: bytes or a share of the exact model's cache at a number of "
            f"tokens, 64MB@32768 or 20%@32768; units: {units}, %"
        )
    number, unit, context = match.groups()
    try:
        tokens = at_least_one(context.replace(",", ""))
    except ValueError as error:
        raise UserError(f"--cache_budget={text}: {context} is no number of tokens") from error
    if unit == "%":
        return Budget(float(number) / 100, True, tokens, text)
    return Budget(float(number) * _UNITS[unit], False, tokens, text)


def layers_within(budget: Budget, exact: ModelSpec, replaced: ModelSpec, candidates: Sequence[int]) -> int:
    """How many exact layers the budget holds, whichever they are. Raises UserError for none, and for all."""
    sizes = CacheSizes.of(exact, replaced, budget.context)
    every, none = sizes.total(candidates), sizes.total(())
    largest_first = sorted(candidates, key=lambda layer: sizes.replaced[layer] - sizes.exact[layer])
    totals = [sizes.total(largest_first[:count]) for count in range(1, len(candidates) + 1)]
    limit = limit_of(budget, none, totals[0], every, "layer")
    return sum(total <= limit for total in totals)


def limit_of(budget: Budget, none: int, one: int, every: int, part: str) -> float:
    """The budget's bytes.

    Args:
      none, one, every: bytes of the model without an exact part, with one, and of the exact model.
      part: layer or head.

    Raises:
      UserError: no exact part fits, or all do.
    """
    limit = budget.limit(every)
    said = f"--cache_budget={budget.text}"
    if every <= one:
        raise UserError(
            f"{said}: at {budget.context:,} tokens the exact model needs {show_bytes(every)}, the new one with one "
            f"exact {part} {show_bytes(one)}; allowed: more tokens behind the @"
        )
    if limit < one:
        raise UserError(
            f"{said}: is {show_bytes(limit)}; without an exact {part} the model needs {show_bytes(none)}, "
            f"with one {show_bytes(one)}; allowed: that, or --exact_{part}s=none"
        )
    if limit >= every:
        raise UserError(
            f"{said}: is {show_bytes(limit)}, and the exact model needs {show_bytes(every)}; there is "
            "nothing to replace"
        )
    return limit


def show_bytes(size: float) -> str:
    """A size in MB, with three figures at least."""
    return f"{size / 1e6:,.0f} MB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def at_least_one(text: str) -> int:
    """A whole number from 1 on. Raises ValueError for other texts."""
    number = whole_number(text)
    if not 1 <= number < 2**31:
        raise ValueError(text)
    return number
