"""What this machine could do at best: its rates of float32 products and exponentials, and the least time of attention.

Forward, `dark_attention` with features everywhere does per token and head, with chunks of C tokens,

    FLOPs         4 d^2 (Mq, Mk) + 4 d m (features) + 2 C m + 2 C d (own chunk) + 4 m d + 2 m (read far state, fold)
    exponentials  4 m (features of q and k, weights of the far state and of the keys) + 2 C (logarithms and weights)

The least time is the sum of both at the rates measured. The gradients need twice the FLOPs more, and no exponential:
what the backward pass recomputes to save memory is not counted as needed.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks.contenders import BATCH, CHUNK, FEATURES, HEAD_DIM, HEADS, Row

SIDE, ELEMENTS, TURNS = 2048, 1 << 20, 7
OF = ("ours", "ours-cores")  # contenders whose share of the machine is printed: features everywhere, without decays


class Rates(NamedTuple):
    """Per second, at best."""

    flops: float  # of a product of two float32 matrices of 2,048 x 2,048
    exponentials: float  # of 1,048,576 float32 numbers, which stay in the cache


def measure_rates() -> Rates:
    """The rates of all cores."""
    matrix = jax.random.normal(jax.random.key(0), (SIDE, SIDE))
    numbers = jax.random.normal(jax.random.key(1), (ELEMENTS,))
    product, exponential = jax.jit(jnp.matmul), jax.jit(jnp.exp)
    return Rates(
        2 * SIDE**3 / _seconds(lambda: product(matrix, matrix)), ELEMENTS / _seconds(lambda: exponential(numbers))
    )


def _seconds(run: Callable[[], Array]) -> float:
    run().block_until_ready()
    seconds = []
    for _ in range(TURNS):
        start = time.perf_counter()
        run().block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def forward_flops(
    length: int, heads: int, kv_heads: int, dim: int, features: int, chunk: int, window: int = 0
) -> float:
    """FLOPs of `length` tokens of all heads: half of Mq, Mk, of the features and of 4 m d are a key/value head's.

    With a window, its keys and the chunk's are seen through q.k and not through features.
    """
    d, m = dim, features
    near = 4 * (window + chunk) * d if window else 2 * chunk * (m + d)
    of_query = 2 * d * d + 2 * d * m + near + 2 * m * d + 2 * m
    of_key = 2 * d * d + 2 * d * m + 2 * m * d
    return float(length * (heads * of_query + kv_heads * of_key))


def least_seconds(length: int, backward: bool, rates: Rates) -> float:
    """The least time of features everywhere for `length` tokens."""
    chunk = min(CHUNK, length)
    flops = BATCH * forward_flops(length, HEADS, HEADS, HEAD_DIM, FEATURES, chunk)
    exponentials = BATCH * length * HEADS * (4 * FEATURES + 2 * chunk)
    return flops * (3 if backward else 1) / rates.flops + exponentials / rates.exponentials


def roofline(rows: Sequence[Row], rates: Rates) -> list[Row]:
    """Prints and returns, for each timing of `OF`, the least time and the share of the machine that was reached."""
    print(
        f"\nroofline: {rates.flops / 1e9:.0f} GFLOP/s in products, {rates.exponentials / 1e9:.1f} G exponentials/s "
        "(measured in this run)"
    )
    found = []
    for row in rows:
        if row["contender"] in OF and not row["skipped"]:
            least = 1e3 * least_seconds(row["length"], row["pass"] != "forward", rates)
            share = least / row["median_ms"]
            of = {name: row[name] for name in ("length", "pass", "contender")}
            found.append(of | {"least_ms": least, "share": share})
            taken = f"at least {least:.1f} ms, {row['contender']} {row['median_ms']:.1f}: {share:.0%}"
            print(f"{row['length']:>6}  {row['pass']:16}  {taken}")
    return found
