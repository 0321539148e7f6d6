"""Decay: the kernel times exp(G_n - G_j), with G the running sum of log decays g <= 0 over the tokens of a document.

A key loses weight exp(g_i) with every token i that comes after it. ALiBi has g = -slope, RetNet one constant per head,
and a gate makes g from the token. The far state stays as it is: only its scale c moves, c <- c + g.

Gradients. exp(G_n) multiplies all that query n sees, and the normaliser divides by it again: the output does not depend
on it. So where attention is causal the queries' part has no derivative. The keys' part, -G_j, has one number per key,
-sum_i dL/dl_i(k_j), and the state's scale one per chunk, sum_i (z_i dL/dz_i + S_i . dL/dS_i). Second derivatives in g
are not right: these rules are for first ones.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from darkformer_jax.errors import UserError
from darkformer_jax.ops.features import accumulator_dtype

FLOOR = -1000.0  # of one token's log decay; exp(FLOOR) is 0 in any dtype, and -inf would give inf - inf


class RunningSum(NamedTuple):
    """G_n = g_1 + ... + g_n as the sum of two parts.

    A plain float32 sum would round what follows a strong decay. Whole numbers are summed exactly, up to 2^24, and the
    sums of the rest stay small. So differences between near tokens are as precise as if the sum began there.

    `of_keys` is G once more. Where it is there, it alone has a derivative, as that of the keys; its value is not used.
    """

    whole: Float[Array, "*b t"]
    rest: Float[Array, "*b t"]
    of_keys: Float[Array, "*b t"] | None = None

    def value(self) -> Float[Array, "*b t"]:
        """G."""
        return self.whole + self.rest

    def cut(self, start: int | None, stop: int | None) -> "RunningSum":
        """G of tokens start:stop of one head."""
        return jax.tree.map(lambda leaf: leaf[start:stop], self)


class FoldDecay(NamedTuple):
    """Log decays from each key of a chunk, and from the state before it, to where the chunk's summary is read."""

    keys: Float[Array, "c"]
    state: Float[Array, ""]
    of_all: Float[Array, ""] | None = None  # of the summary as a whole, for its derivative alone; see `RunningSum`


def running_sum(log_decay: Float[Array, "..."], axis: int = 0, *, causal: bool = False) -> RunningSum:
    """G along an axis. causal: its derivative is that of keys, see above."""
    own = jax.lax.stop_gradient(log_decay) if causal else log_decay
    whole = jax.lax.stop_gradient(jnp.round(own))
    of_keys = jnp.cumsum(log_decay, axis=axis) if causal else None
    return RunningSum(jnp.cumsum(whole, axis=axis), jnp.cumsum(own - whole, axis=axis), of_keys)


def precise_running_sum(log_decay: Float[Array, "..."], axis: int, before: RunningSum | None = None) -> RunningSum:
    """G along an axis of any length, with twice the digits: `whole` is G rounded, and `rest` what the rounding lost.

    before: of the tokens before, without that axis.
    """
    plain = jnp.cumsum(log_decay, axis=axis)
    steps = jax.lax.stop_gradient(log_decay)
    whole, rest = jax.lax.associative_scan(_add, (steps, jnp.zeros_like(steps)), axis=axis)
    if before is not None:
        first = jnp.expand_dims(before.whole, axis), jnp.expand_dims(before.rest, axis)
        whole, rest = _add(first, (whole, rest))
    return RunningSum(whole, rest + (plain - jax.lax.stop_gradient(plain)))  # the derivative is that of the plain sum


def _add(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """The sum of two numbers, each the sum of two floats (Knuth's and Dekker's algorithms: Dekker 1971)."""
    rounded = first[0] + second[0]
    part = rounded - first[0]
    lost = (first[0] - (rounded - part)) + (second[0] - part) + (first[1] + second[1])
    whole = rounded + lost
    return whole, lost - (whole - rounded)


def between(queries: RunningSum, keys: RunningSum) -> Float[Array, "n t"]:
    """G_n - G_j of one head."""
    difference = (queries.whole[:, None] - keys.whole[None, :]) + (queries.rest[:, None] - keys.rest[None, :])
    return difference if keys.of_keys is None else _with_derivative(difference, keys.of_keys)


def to_end(chunk: RunningSum) -> FoldDecay:
    """For a chunk of one head whose sum begins where the state before it ends: to the chunk's last token."""
    end = chunk.cut(-1, None)
    return FoldDecay(between(end, chunk)[0], end.value()[0], None if chunk.of_keys is None else chunk.of_keys[-1])


def fold_decay(chunk: RunningSum | None) -> FoldDecay | None:
    """`to_end`, where there is a decay."""
    return None if chunk is None else to_end(chunk)


def to_start(chunk: RunningSum) -> FoldDecay:
    """The same from right to left: to the last token before the chunk."""
    return FoldDecay(chunk.value(), chunk.whole[-1] + chunk.rest[-1])


@jax.custom_jvp
def _with_derivative(difference: Float[Array, "n t"], of_keys: Float[Array, "t"]) -> Float[Array, "n t"]:
    """G_n - G_j with the derivative of -G_j in G_j."""
    return difference


_with_derivative.defjvps(
    lambda tangent, out, difference, of_keys: tangent,
    lambda tangent, out, difference, of_keys: jnp.broadcast_to(-tangent[None], difference.shape),
)


@jax.custom_jvp
def with_scale_derivative(x: Float[Array, "..."], log_scale: Float[Array, ""]) -> Float[Array, "..."]:
    """x as it is, with the derivative of exp(log_scale) x in log_scale, at 0."""
    return x


with_scale_derivative.defjvps(
    lambda tangent, out, x, log_scale: tangent,
    # einsum, because XLA's CPU backend is several times slower on the sum of a product, which the gradient has.
    lambda tangent, out, x, log_scale: jnp.einsum("i,->i", x.ravel(), tangent, precision="highest").reshape(x.shape),
)


def check_log_decay(log_decay: Array, k: Array, segment_ids: Array | None) -> None:
    """Raises UserError for another shape than [hkv] or [b, n, hkv], and for values above 0 where they are known.

    Those of a numpy array are known under jit, too, until it becomes one of JAX's. Padding may hold anything.
    """
    allowed = (k.shape[2:3], k.shape[:3])
    if np.shape(log_decay) not in allowed:
        raise UserError(
            f"log_decay has shape {np.shape(log_decay)}; expected {allowed[0]}, one number per key/value head, or "
            f"{allowed[1]}, one per token and head"
        )
    if isinstance(log_decay, jax.core.Tracer) or not getattr(log_decay, "is_fully_addressable", True):
        return
    known = np.asarray(log_decay, np.float64)
    if known.ndim == 3 and segment_ids is not None and not isinstance(segment_ids, jax.core.Tracer):
        known = known[np.asarray(segment_ids) != 0]
    largest = np.max(known, initial=-np.inf)
    if not largest <= 0:
        raise UserError(f"log_decay has {largest:g}; allowed: at most 0")


def decay_per_token(
    log_decay: Float[Array, "..."], batch: int, length: int, dtype: jax.typing.DTypeLike
) -> Float[Array, "b n hkv"]:
    """g of every token: [hkv] is broadcast, and values below `FLOOR` are raised to it."""
    log_decay = jnp.maximum(jnp.asarray(log_decay, accumulator_dtype(dtype)), FLOOR)
    return jnp.broadcast_to(log_decay, (batch, length, log_decay.shape[-1]))
