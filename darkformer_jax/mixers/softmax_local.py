"""Exact softmax attention to the last tokens (Mistral's and Gemma's sliding window)."""

import jax
import jax.numpy as jnp

from darkformer_jax.mixers.softmax import KeyValueCache, Softmax, slots_of, write_slots
from darkformer_jax.mixers.spec import MixerSpec


class LocalSoftmax(Softmax):
    """`Softmax` over the last `local_window` tokens, the query's own included; its state holds no more than those."""

    uses = Softmax.uses | {"local_window", "rope_local_theta"}
    needs = frozenset({"local_window"})
    bidirectional = False
    is_local = True

    @classmethod
    def mixing_flops(cls, spec: MixerSpec, length: int) -> float:
        """As for `Softmax`, with the keys of the last `local_window` tokens."""
        return 4 * spec.num_heads * spec.head_dim * mean_local_keys(spec, length)

    def init_state(self, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> KeyValueCache:
        return super().init_state(batch, min(max_length, self.spec.local_window), dtype)

    def update(self, state: KeyValueCache, new: KeyValueCache) -> tuple[KeyValueCache, KeyValueCache]:
        """As `Softmax.update`; the slots are a ring, in which token i of a row has slot i % slots."""
        # Old and new keys together: the first of many new tokens still see keys that the last ones overwrite.
        joined = jax.tree.map(
            lambda old, x: jnp.concatenate([old, x.astype(old.dtype)], axis=1), slots_of(state), slots_of(new)
        )
        seen = state._replace(**joined, length=state.length + new.length)
        slots = state.keys.shape[1]
        index = jnp.arange(new.keys.shape[1], dtype=jnp.int32)[None, :]
        count = new.length[:, None]
        is_kept = (index < count) & (index >= count - slots)
        places = jnp.where(is_kept, (state.length[:, None] + index) % slots, slots)
        return seen, write_slots(state, new, places)


def mean_local_keys(spec: MixerSpec, length: int) -> float:
    """The number of keys in a query's local window, its own included, averaged over a sequence of `length` tokens."""
    window = min(spec.local_window, length)
    return window * (2 * length - window + 1) / (2 * length)
