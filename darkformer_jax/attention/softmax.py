"""Exact softmax attention, with a key/value cache for decoding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from darkformer_jax.attention.spec import AttentionSpec
from darkformer_jax.ops.exact import exact_attention


class KeyValueCache(NamedTuple):
    """Every key and value so far; slots from `length` on are empty (segment 0). What exceeds the slots is not kept."""

    keys: Float[Array, "b t hkv d"]
    values: Float[Array, "b t hkv d"]
    segments: Int[Array, "b t"]
    positions: Int[Array, "b t"]
    length: Int[Array, "b"]


class Softmax(nnx.Module):
    """softmax(q k^T / sqrt(d)) v: quadratic in the length, and a state that grows with it."""

    def __init__(self, spec: AttentionSpec, layer: int | Array) -> None:
        self.spec = spec

    def init_state(self, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> KeyValueCache:
        shape = (batch, max_length, self.spec.num_kv_heads, self.spec.head_dim)
        slots = jnp.zeros(shape[:2], jnp.int32)
        return KeyValueCache(
            jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), slots, slots, jnp.zeros(batch, jnp.int32)
        )

    def __call__(
        self, q: Array, k: Array, v: Array, *, segment_ids: Array, positions: Array, state: KeyValueCache | None = None
    ) -> tuple[Array, KeyValueCache | None]:
        if state is None:
            out = exact_attention(
                q,
                k,
                v,
                query_segments=segment_ids,
                key_segments=segment_ids,
                query_positions=positions,
                key_positions=positions,
            )
            return out, None
        new = (k, v, segment_ids, positions)
        places = state.length[:, None] + jnp.arange(k.shape[1], dtype=jnp.int32)[None, :]
        # Not dynamic_update_slice, which moves a write that does not fit back over older keys.
        write = jax.vmap(lambda old, x, place: old.at[place].set(x.astype(old.dtype), mode="drop"))
        keys, values, segments, slots = (write(old, x, places) for old, x in zip(state[:4], new, strict=True))
        # Padding at the end is written with segment 0 and then overwritten: it takes no slot.
        length = state.length + jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32)
        state = KeyValueCache(keys, values, segments, slots, length)
        out = exact_attention(
            q,
            state.keys,
            state.values,
            query_segments=segment_ids,
            key_segments=state.segments,
            query_positions=positions,
            key_positions=state.positions,
        )
        return out, state
