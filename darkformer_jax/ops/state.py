"""What linear attention remembers of the tokens it has seen: a constant amount, whatever their number.

The far state is `(c, z, S)` of docs/attention.md: per feature i the largest log feature c_i over the keys seen, and
the sums z_i = sum_j exp(l_i(k_j) - c_i) and S_i = sum_j exp(l_i(k_j) - c_i) v_j. As the maximum is one of the terms,
z_i >= 1 once a key was seen. (With a decay z also takes what rounding c lost, and may fall below 1 over millions of
tokens.) c only moves the numbers into range; it cancels in the output and is a constant to the gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from darkformer_jax.ops.features import accumulator_dtype

NEG = -1e30  # "minus infinity" that can be subtracted from itself


class FarState(NamedTuple):
    """Summary of the keys that are seen through random features; all of them belong to one segment."""

    key_max: Float[Array, "*heads m"]  # c
    normalizer: Float[Array, "*heads m"]  # z
    values: Float[Array, "*heads m dv"]  # S
    segment: Int[Array, "*batch"]  # id of the segment the keys belong to; 0 = none seen


class Sinks(NamedTuple):
    """The first tokens of the far state's segment, once they have left the window."""

    keys: Float[Array, "*heads s d"]
    values: Float[Array, "*heads s dv"]
    filled: Bool[Array, "*batch s"]
    decays: Float[Array, "*heads s"] | None = None  # log decay from each sink to the end of the far state


class Recent(NamedTuple):
    """Keys that are still seen exactly: `window` tokens of whole chunks, and the chunk that is being filled."""

    keys: Float[Array, "*heads t d"]  # t = window while a chunk scan runs, window + chunk_size between calls
    values: Float[Array, "*heads t dv"]
    segments: Int[Array, "*batch t"]  # 0 = empty
    positions: Int[Array, "*batch t"]  # in the token's document
    decays: Float[Array, "*heads t"] | None = None  # each token's own log decay


class AttentionState(NamedTuple):
    """Everything a sequence needs to go on, by one token or by many. `init_state` and every linear attention make it.

    `last_segment` and `document_length` describe the newest token's document, `fill` counts the tokens of the chunk
    that is being filled (0 without a window). Leaves have leading axes [B, Hkv] or [B].
    """

    far: FarState
    sinks: Sinks
    recent: Recent
    fill: Int[Array, "*batch"]
    last_segment: Int[Array, "*batch"]
    document_length: Int[Array, "*batch"]


# Which leaves have a head axis, as vmap's in_axes and out_axes.
HEAD_AXES = AttentionState(
    far=FarState(0, 0, 0, None),  # type: ignore[arg-type]
    sinks=Sinks(0, 0, None, 0),  # type: ignore[arg-type]
    recent=Recent(0, 0, None, None, 0),  # type: ignore[arg-type]
    fill=None,  # type: ignore[arg-type]
    last_segment=None,  # type: ignore[arg-type]
    document_length=None,  # type: ignore[arg-type]
)


def empty_far(num_features: int, value_dim: int, dtype: jax.typing.DTypeLike = jnp.float32) -> FarState:
    """The identity of `merge_far`, for one head."""
    return FarState(
        key_max=jnp.full((num_features,), NEG, dtype),
        normalizer=jnp.zeros((num_features,), dtype),
        values=jnp.zeros((num_features, value_dim), dtype),
        segment=jnp.zeros((), jnp.int32),
    )


def empty_state(
    *,
    num_features: int,
    key_dim: int,
    value_dim: int,
    recent: int,
    num_sinks: int,
    has_decay: bool,
    dtype: jax.typing.DTypeLike,
) -> AttentionState:
    """The state of one head before its first token; `recent` is window + chunk_size, or 0 without a window."""
    zero = jnp.zeros((), jnp.int32)
    wide = accumulator_dtype(dtype)
    return AttentionState(
        far=empty_far(num_features, value_dim, wide),
        sinks=Sinks(
            jnp.zeros((num_sinks, key_dim), dtype),
            jnp.zeros((num_sinks, value_dim), dtype),
            jnp.zeros(num_sinks, bool),
            jnp.zeros(num_sinks, wide) if has_decay else None,
        ),
        recent=Recent(
            jnp.zeros((recent, key_dim), dtype),
            jnp.zeros((recent, value_dim), dtype),
            jnp.zeros(recent, jnp.int32),
            jnp.zeros(recent, jnp.int32),
            jnp.zeros(recent, wide) if has_decay else None,
        ),
        fill=zero,
        last_segment=zero,
        document_length=zero,
    )


def init_state(
    batch: int,
    num_kv_heads: int,
    key_dim: int,
    value_dim: int,
    num_features: int,
    dtype: jax.typing.DTypeLike,
    chunk_size: int = 128,
    window: int = 0,
    num_sinks: int = 0,
    has_decay: bool = False,
) -> AttentionState:
    """The state of `batch` sequences that have seen nothing. `dtype` is that of q, k and v; sums are in float32.

    has_decay: the calls have a `log_decay`. Only the state of a window depends on it.
    """
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    head = empty_state(
        num_features=num_features,
        key_dim=key_dim,
        value_dim=value_dim,
        recent=window + chunk_size if window else 0,
        num_sinks=num_sinks,
        has_decay=has_decay,
        dtype=dtype,
    )
    heads = jax.vmap(lambda _: head, out_axes=HEAD_AXES, axis_size=num_kv_heads, in_axes=None)(None)
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (batch, *leaf.shape)), heads)


def merge_far(first: FarState, second: FarState, decay: Float[Array, "*heads"] | None = None) -> FarState:
    """The summary of both parts of one segment: c = max(c1, c2), z = z1 e^(c1-c) + z2 e^(c2-c), S likewise.

    Associative, with `empty_far` as its identity: the parts can be summarised on different devices. Where the two
    belong to different segments the second, the later one, replaces the first. `decay` is the log decay of the first
    part over the second: c1 + decay stands for c1.
    """
    first_axes = first.normalizer.ndim - first.segment.ndim
    empty = second.segment == 0
    same = (first.segment == second.segment) | empty
    same = same.reshape(same.shape + (1,) * first_axes)
    first_max = jnp.where(same, first.key_max, NEG)
    decay = None if decay is None else decay[..., None]
    decayed = first_max if decay is None else first_max + decay
    key_max = jax.lax.stop_gradient(jnp.maximum(decayed, second.key_max))
    # c1 - c is exact where they are close. So z takes what rounding c1 + decay lost, and thousands of chunks add up to
    # the right decay.
    gap = first_max - key_max if decay is None else (first_max - key_max) + decay
    keep = jnp.where(same, jnp.exp(gap), 0)
    add = jnp.exp(second.key_max - key_max)
    return FarState(
        key_max=key_max,
        normalizer=first.normalizer * keep + second.normalizer * add,
        values=first.values * keep[..., None] + second.values * add[..., None],
        segment=jnp.where(empty, first.segment, second.segment),
    )
