"""Exact softmax attention to all tokens, with a key/value cache for decoding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from darkformer_jax.distributed.sharding import context_size
from darkformer_jax.mixers.attention import ATTENTION_FIELDS, Mechanism
from darkformer_jax.mixers.spec import MixerSpec
from darkformer_jax.mixers.stretches import on_stretches
from darkformer_jax.ops.context import gather_sequence
from darkformer_jax.ops.decay import RunningSum, between, precise_running_sum
from darkformer_jax.ops.exact import exact_attention


class KeyValueCache(NamedTuple):
    """Keys and values of the tokens so far, in slots. An empty slot has segment 0; padding at the end takes no slot."""

    keys: Float[Array, "b t hkv d"]
    values: Float[Array, "b t hkv d"]
    segments: Int[Array, "b t"]
    positions: Int[Array, "b t"]
    length: Int[Array, "b"]  # tokens so far, kept or not
    elapsed: RunningSum | None = None  # [b, t, hkv], the log decay up to each token, where tokens decide over it
    total: RunningSum | None = None  # [b, hkv], up to the last token


class Softmax(Mechanism):
    """softmax(cap(scale q k^T) + decay) v. Its cost is quadratic in the length, and its state grows with the length.

    Where the mesh splits sequences over devices, each device gathers all keys and values. The message and the memory
    grow with the length, unlike those of linear attention.
    """

    role = "exact"
    uses = ATTENTION_FIELDS | {"query_scale", "softcap"}
    bidirectional = True

    @classmethod
    def mixing_flops(cls, spec: MixerSpec, length: int) -> float:
        """4 H d n: scores 2 d and values 2 d, for each of n visible keys of each of H heads."""
        visible = (length + 1) / 2 if spec.causal else length
        return 4 * spec.num_heads * spec.head_dim * visible

    def init_state(self, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> KeyValueCache:
        shape = (batch, max_length, self.spec.num_kv_heads, self.spec.head_dim)
        slots = jnp.zeros(shape[:2], jnp.int32)
        zeros = (jnp.zeros(shape[:3]), jnp.zeros((batch, shape[2])))
        sums = [RunningSum(x, x) for x in zeros] if self.spec.decay == "gate" else [None, None]
        return KeyValueCache(
            jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), slots, slots, jnp.zeros(batch, jnp.int32), *sums
        )

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        segment_ids: Array,
        positions: Array,
        log_decay: Array | None = None,
        state: KeyValueCache | None = None,
    ) -> tuple[Array, KeyValueCache | None]:
        if context_size() > 1:
            arrays = {"segment_ids": segment_ids, "positions": positions, "log_decay": log_decay}
            return on_stretches(self._attend_to_all, q, k, v, state=state, **arrays), None
        new = new_tokens(k, v, segment_ids, positions, log_decay, None if state is None else state.total)
        seen, state = (new, None) if state is None else self.update(state, new)
        bias = _decay_bias(log_decay, positions, seen.positions, new.elapsed, seen.elapsed)
        return self._attend(q, segment_ids, positions, seen, bias), state

    def _attend(self, q: Array, segment_ids: Array, positions: Array, seen: KeyValueCache, bias: Array | None) -> Array:
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
            bias=bias,
        )

    def _attend_to_all(
        self,
        q: Array,
        k: Array,
        v: Array,
        segment_ids: Array,
        positions: Array,
        log_decay: Array | None,
        sequence_axis: str,
    ) -> Array:
        """Attention of this device's queries to the keys and values of all devices."""
        keys, values, segments, places = (gather_sequence(x, sequence_axis) for x in (k, v, segment_ids, positions))
        decays = log_decay
        if decays is not None and decays.ndim == 3:
            decays = gather_sequence(decays, sequence_axis)
        seen = new_tokens(keys, values, segments, places, decays, None)
        start = jax.lax.axis_index(sequence_axis) * q.shape[1]
        own = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, q.shape[1], axis=1), seen.elapsed)
        bias = _decay_bias(decays, positions, places, own, seen.elapsed)
        return self._attend(q, segment_ids, positions, seen, bias)

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
    slots = jax.tree.map(lambda old, x: write(old, x, places), slots_of(state), slots_of(new))
    return state._replace(**slots, length=state.length + new.length, total=new.total)


def new_tokens(
    k: Array, v: Array, segment_ids: Array, positions: Array, log_decay: Array | None, total: RunningSum | None
) -> KeyValueCache:
    """The tokens of a call as a cache. total: the running decay before them; None = 0."""
    length = jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32)
    if log_decay is None or log_decay.ndim == 1:
        return KeyValueCache(k, v, segment_ids, positions, length)
    elapsed = precise_running_sum(jnp.where((segment_ids != 0)[..., None], log_decay, 0), 1, total)
    return KeyValueCache(k, v, segment_ids, positions, length, elapsed, jax.tree.map(lambda x: x[:, -1], elapsed))


def slots_of(cache: KeyValueCache) -> dict[str, Any]:
    """The fields that have an entry per slot."""
    return {name: value for name, value in cache._asdict().items() if name not in ("length", "total")}


def _decay_bias(
    log_decay: Array | None,
    positions: Int[Array, "b n"],
    key_positions: Int[Array, "b t"],
    elapsed: RunningSum | None,
    key_elapsed: RunningSum | None,
) -> Float[Array, "b hkv n t"] | None:
    """-|G_n - G_j|: log_decay times the distance, or the difference of running sums where tokens decide."""
    if log_decay is None:
        return None
    if elapsed is None or key_elapsed is None:
        distance = jnp.abs(positions[:, :, None] - key_positions[:, None, :])[:, None]
        return log_decay[None, :, None, None] * distance.astype(log_decay.dtype)
    over_heads = jax.vmap(between, in_axes=1)  # of one sequence, [n, hkv] and [t, hkv]
    apart = jax.vmap(over_heads)(elapsed, key_elapsed)
    # By place, because |x| has no derivative where a decay is 0.
    return jnp.where((key_positions[:, None, :] <= positions[:, :, None])[:, None], apart, -apart)
