"""Exact softmax attention to all tokens, with a key/value cache for decoding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from darkformer_jax.distributed.sharding import context_size
from darkformer_jax.mixers.attention import Mechanism
from darkformer_jax.mixers.spec import MixerSpec
from darkformer_jax.mixers.stretches import on_stretches
from darkformer_jax.ops.context import gather_sequence
from darkformer_jax.ops.exact import exact_attention


class KeyValueCache(NamedTuple):
    """Keys and values of the tokens so far, in slots. An empty slot has segment 0; padding at the end takes no slot."""

    keys: Float[Array, "b t hkv d"]
    values: Float[Array, "b t hkv d"]
    segments: Int[Array, "b t"]
    positions: Int[Array, "b t"]
    length: Int[Array, "b"]  # tokens so far, kept or not


class Softmax(Mechanism):
    """softmax(cap(scale q k^T)) v. Its cost is quadratic in the length, and its state grows with the length.

    Where the mesh splits sequences over devices, each device gathers all keys and values. The message and the memory
    grow with the length, unlike those of linear attention.
    """

    role = "exact"
    uses = frozenset({"query_scale", "softcap"})
    bidirectional = True

    @classmethod
    def mixing_flops(cls, spec: MixerSpec, length: int) -> float:
        """4 H d n: scores 2 d and values 2 d, for each of n visible keys of each of H heads."""
        visible = (length + 1) / 2 if spec.causal else length
        return 4 * spec.num_heads * spec.head_dim * visible

    def init_state(self, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> KeyValueCache:
        shape = (batch, max_length, self.spec.num_kv_heads, self.spec.head_dim)
        slots = jnp.zeros(shape[:2], jnp.int32)
        return KeyValueCache(
            jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), slots, slots, jnp.zeros(batch, jnp.int32)
        )

    def __call__(
        self, q: Array, k: Array, v: Array, *, segment_ids: Array, positions: Array, state: KeyValueCache | None = None
    ) -> tuple[Array, KeyValueCache | None]:
        if context_size() > 1:
            arrays = {"segment_ids": segment_ids, "positions": positions}
            return on_stretches(self._attend_to_all, q, k, v, state=state, **arrays), None
        new = KeyValueCache(k, v, segment_ids, positions, jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32))
        seen, state = (new, None) if state is None else self.update(state, new)
        return self._attend(q, segment_ids, positions, seen), state

    def _attend(self, q: Array, segment_ids: Array, positions: Array, seen: KeyValueCache) -> Array:
        return exact_attention(
            q,
            seen.keys,
            seen.values,
            query_segments=segment_ids,
            key_segments=seen.segments,
            query_positions=positions,
            key_positions=seen.positions,
            scale=self.spec.query_scale or None,
            softcap=self.spec.softcap,
            local_window=self.spec.local_window,
            causal=self.spec.causal,
        )

    def _attend_to_all(
        self, q: Array, k: Array, v: Array, segment_ids: Array, positions: Array, sequence_axis: str
    ) -> Array:
        """Attention of this device's queries to the keys and values of all devices."""
        own = (k, v, segment_ids, positions)
        keys, values, segments, places = (gather_sequence(x, sequence_axis) for x in own)
        count = jnp.sum(segments != 0, axis=1, dtype=jnp.int32)
        return self._attend(q, segment_ids, positions, KeyValueCache(keys, values, segments, places, count))

    def update(self, state: KeyValueCache, new: KeyValueCache) -> tuple[KeyValueCache, KeyValueCache]:
        """(the cache that the new tokens attend to, the state after them). Tokens beyond the last slot are dropped."""
        # Padding is written after the tokens, and the next tokens overwrite it: `length` does not count it.
        places = state.length[:, None] + jnp.arange(new.keys.shape[1], dtype=jnp.int32)[None, :]
        state = write_slots(state, new, places)
        return state, state


def write_slots(state: KeyValueCache, new: KeyValueCache, places: Int[Array, "b n"]) -> KeyValueCache:
    """`state` with the new tokens in their slots; places beyond the last slot are dropped."""
    # Not dynamic_update_slice: it would move a write that does not fit back over older keys.
    write = jax.vmap(lambda old, x, place: old.at[place].set(x.astype(old.dtype), mode="drop"))
    keys, values, segments, positions = (write(old, x, places) for old, x in zip(state[:4], new[:4], strict=True))
    return KeyValueCache(keys, values, segments, positions, state.length + new.length)
