"""Several sources in one run: their streams as one split, and the order in which training reads their rows.

Weights are shares of the training rows. The source of row k of a run depends on k and the weights alone: after any
number of rows each of two sources has had its share to within half a row, and each of several to within a row or two.
Each source passes its own rows in an order of its own and begins anew, in another order, when they are used up.
"""

import dataclasses
import hashlib
import math
import sys
from collections.abc import Sequence
from fractions import Fraction

import grain
import numpy as np

from darkformer_jax.data.stream import TokenStream


@dataclasses.dataclass(frozen=True)
class Mixture:
    """One split, training or held-out, of several sources. Its counts are sums over the sources, like a stream's.

    Attributes:
      names: of the sources.
      streams: their tokens.
      weights: whole numbers in the proportion of their shares of the training rows. Held-out data is read once, whole.
    """

    names: tuple[str, ...]
    streams: tuple[TokenStream, ...]
    weights: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all sources, separators included."""
        return sum(stream.num_tokens for stream in self.streams)

    @property
    def num_documents(self) -> int:
        """Documents of all sources."""
        return sum(stream.num_documents for stream in self.streams)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents' text."""
        return sum(stream.num_bytes for stream in self.streams)

    @property
    def num_targets(self) -> int:
        """Tokens of all sources that are predicted."""
        return sum(stream.num_targets for stream in self.streams)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) that changes with any token and any weight."""
        parts = [f"{weight} {stream.fingerprint}" for weight, stream in zip(self.weights, self.streams, strict=True)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def shares(self) -> list[float]:
        """Each source's share of the training rows."""
        return [weight / sum(self.weights) for weight in self.weights]

    def read(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """`TokenStream.read` of the sources' tokens end to end."""
        positions = starts[:, None] + np.arange(length)
        tokens, is_start = np.zeros(positions.shape, np.int32), np.zeros(positions.shape, np.bool_)
        for stream in self.streams:
            own = (positions >= 0) & (positions < stream.num_tokens)
            tokens[own], is_start[own] = (part[:, 0] for part in stream.read(positions[own], 1))
            positions = positions - stream.num_tokens
        return tokens, is_start


Split = TokenStream | Mixture


def whole_weights(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """The smallest whole numbers in the same proportion."""
    denominator = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * denominator) for weight in weights]
    return tuple(number // math.gcd(*whole) for number in whole)


class Shares(grain.transforms.DatasetSelectionMap):
    """Row number k -> (its source, how many rows of this source come before it), for every k >= 0.

    Of the first k rows, round(k r / R) are left to the sources after the first, where R is the sum of the weights and r
    that without the first one. The first source has the others. The rest is divided in the same way.

    `grain.MapDataset.mix` divides like this, too, but rounds the weights to per cents of the smallest one.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        self._weights = tuple(weights)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, row: int) -> tuple[int, int]:
        before, after, total = row, row + 1, sum(self._weights)
        for source, weight in enumerate(self._weights):
            rest = total - weight
            before_rest, after_rest = ((2 * count * rest + total) // (2 * total) for count in (before, after))
            if after - after_rest > before - before_rest:
                return source, before - before_rest
            before, after, total = before_rest, after_rest, rest
        raise IndexError(f"row {row} is in no source")  # not reached: the last source leaves nothing


def mixed_rows(totals: Sequence[int], weights: Sequence[int], seed: int) -> grain.MapDataset:
    """Endless row numbers of all sources, by their shares.

    Rows are numbered source by source: source i has the `totals[i]` numbers that follow those of source i - 1.

    Args:
      totals: rows of each source.
      weights: see `Mixture`.
      seed: of the sources' orders, 0 .. 2**32 - 1.
    """
    ends = np.cumsum(totals).tolist()
    sources = []
    for number, (end, total) in enumerate(zip(ends, totals, strict=True)):
        own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])  # else equal sizes had equal orders
        sources.append(grain.MapDataset.range(end - total, end).seed(own).shuffle().repeat())
    return grain.MapDataset.select_from_datasets(sources, Shares(weights))
