"""First and second moments of queries and keys from any number of batches; no activation is kept."""

import zipfile
from collections.abc import Sequence
from os import PathLike
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from darkformer_jax.errors import UserError, one_line


class Moments(NamedTuple):
    """E[q], E[k], E[q q^T] and E[k k^T] of each key/value head, with its group's queries pooled; float64, on the host.

    The moments of one layer have the leading axis [hkv]; `stack` makes it [layers, hkv]. Coordinates are those of the
    given q and k; `in_coordinates` maps them to sqrt(scale) M x, the coordinates of proposals.
    """

    tokens: Int[np.ndarray, "*layers"]
    mean_q: Float[np.ndarray, "*layers hkv d"]
    mean_k: Float[np.ndarray, "*layers hkv d"]
    second_q: Float[np.ndarray, "*layers hkv d d"]
    second_k: Float[np.ndarray, "*layers hkv d d"]

    @classmethod
    def of(
        cls, q: Float[Array, "b n hq d"], k: Float[Array, "b n hkv d"], mask: Bool[Array, "b n"] | None = None
    ) -> "Moments":
        """The moments of one batch of one layer. Tokens whose `mask` is False do not count.

        Raises:
          UserError: shapes do not fit, or values are not finite.
        """
        if q.ndim != 4 or k.ndim != 4 or k.shape != (*q.shape[:2], k.shape[2], q.shape[3]) or q.shape[2] % k.shape[2]:
            raise UserError(f"q {q.shape} and k {k.shape} do not fit: [B, L, Hq, d] and [B, L, Hkv, d], Hq = G Hkv")
        if mask is not None and mask.shape != q.shape[:2]:
            raise UserError(f"mask has shape {mask.shape}; expected {q.shape[:2]}")
        rows = np.ones(q.shape[:2], bool) if mask is None else np.asarray(mask).astype(bool)
        num_kv_heads, dim = k.shape[2:]
        group = q.shape[2] // num_kv_heads
        queries, keys = np.asarray(q)[rows], np.asarray(k)[rows]
        heads = range(num_kv_heads)
        parts = [
            [
                _mean_and_second(queries[:, h * group : (h + 1) * group].reshape(-1, dim), f"q of kv head {h}")
                for h in heads
            ],
            [_mean_and_second(keys[:, h], f"k of kv head {h}") for h in heads],
        ]
        (mean_q, second_q), (mean_k, second_k) = (map(np.stack, zip(*part, strict=True)) for part in parts)
        return cls(np.asarray(len(keys), np.int64), mean_q, mean_k, second_q, second_k)

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets of tokens together; zero where there are none."""
        if self.mean_k.shape != other.mean_k.shape:
            raise UserError(
                f"moments of [*layers, heads, size] = {self.mean_k.shape} and {other.mean_k.shape} do not merge"
            )
        tokens = np.asarray(self.tokens + other.tokens)
        share = np.asarray(other.tokens / np.maximum(tokens, 1))

        def mean(mine: np.ndarray, others: np.ndarray) -> np.ndarray:
            weight = share.reshape(share.shape + (1,) * (mine.ndim - share.ndim))
            return mine * (1 - weight) + others * weight

        return Moments(tokens, *(mean(*pair) for pair in zip(self[1:], other[1:], strict=True)))

    @classmethod
    def stack(cls, layers: Sequence["Moments"]) -> "Moments":
        """The moments of a whole model, from those of its layers."""
        return cls(*(np.stack(part) for part in zip(*layers, strict=True)))

    @property
    def covariance_q(self) -> Float[np.ndarray, "*layers hkv d d"]:
        """Cov[q] of the sample, divided by the count."""
        return self.second_q - _outer(self.mean_q, self.mean_q)

    @property
    def covariance_k(self) -> Float[np.ndarray, "*layers hkv d d"]:
        """Cov[k] of the sample, divided by the count."""
        return self.second_k - _outer(self.mean_k, self.mean_k)

    @property
    def pooled_second(self) -> Float[np.ndarray, "*layers hkv d d"]:
        """Lam = (E[q q^T] + E[k k^T]) / 2. The paper has one distribution for queries and keys."""
        return (self.second_q + self.second_k) / 2

    def require_full_rank(self, where: str = "") -> None:
        """Raises UserError if there are fewer tokens than the d + 1 that a full-rank covariance needs."""
        dim = self.mean_k.shape[-1]
        for index in np.ndindex(self.tokens.shape):
            if self.tokens[index] <= dim:
                names = ([where] if where else []) + [f"layer {layer}" for layer in index]
                raise UserError(
                    f"{': '.join([*names, ''])}moments of {self.tokens[index]} tokens; second moments of full "
                    f"rank in {dim} dimensions need at least {dim + 1}, and reliable ones many times more"
                )

    def transformed(
        self,
        linear_q: Float[np.ndarray, "*layers hkv r d"],
        linear_k: Float[np.ndarray, "*layers hkv r d"],
        shift_q: Float[np.ndarray, "*layers hkv d"] | float = 0.0,
        shift_k: Float[np.ndarray, "*layers hkv d"] | float = 0.0,
    ) -> "Moments":
        """The moments of linear_q (q - shift_q) and linear_k (k - shift_k)."""
        mean_q, mean_k = self.mean_q - shift_q, self.mean_k - shift_k
        second_q = self.covariance_q + _outer(mean_q, mean_q)
        second_k = self.covariance_k + _outer(mean_k, mean_k)
        return Moments(
            self.tokens,
            np.einsum("...rd,...d->...r", linear_q, mean_q),
            np.einsum("...rd,...d->...r", linear_k, mean_k),
            linear_q @ second_q @ np.swapaxes(linear_q, -1, -2),
            linear_k @ second_k @ np.swapaxes(linear_k, -1, -2),
        )

    def in_coordinates(self, geometry: Float[np.ndarray, "*layers hkv r d"] | None, scale: float) -> "Moments":
        """The moments of x' = sqrt(scale) M x, in which the kernel is exp(q' . k'); M is the identity for None.

        Args:
          geometry: M.
          scale: of the logits; softmax attention has d^-0.5.
        """
        m = np.eye(self.mean_k.shape[-1]) if geometry is None else np.asarray(geometry, np.float64)
        return self.transformed(scale**0.5 * m, scale**0.5 * m)

    def save(self, path: str | PathLike) -> None:
        """Writes them as a NumPy .npz file of five arrays, named like the fields."""
        with open(path, "wb") as file:
            np.savez(file, **self._asdict())

    @classmethod
    def load(cls, path: str | PathLike) -> "Moments":
        """Reads what `save` wrote. Raises UserError if `path` is not such a file."""
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                return cls(*(arrays[name] for name in cls._fields))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} holds no moments: {one_line(error)}") from error


def _mean_and_second(x: Array | np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(E[x], E[x x^T]) over rows, in float64; zeros if there are no rows. `name` is for the error."""
    wide = np.asarray(x).astype(np.float64)
    if not np.all(np.isfinite(wide)):
        raise UserError(f"{name}: {np.sum(~np.isfinite(wide))} of {wide.size} values are not finite")
    count = max(len(wide), 1)
    return np.sum(wide, axis=0) / count, wide.T @ wide / count


def _outer(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("...i,...j->...ij", a, b)
