"""Exact attention in some key/value heads of a layer whose other heads see through features."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from darkformer_jax.errors import UserError
from darkformer_jax.mixers.softmax import KeyValueCache, Softmax
from darkformer_jax.mixers.spec import MixerSpec
from darkformer_jax.ops.state import AttentionState


class SplitState(NamedTuple):
    """What the exact heads keep, which grows with the tokens, and what the others keep."""

    exact: KeyValueCache
    features: AttentionState


class ExactHeads(nnx.Module):
    """The first `exact_kv_heads` key/value heads and the queries of their groups.

    A model's heads can be put in any order, so "the first" is no restriction: `calibrate` orders them.
    """

    def __init__(self, spec: MixerSpec, layer: int | Array) -> None:
        self.spec = spec
        self.attention = Softmax(exact_part(spec), layer)

    def init_state(self, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> KeyValueCache:
        """Their cache before the first token."""
        return self.attention.init_state(batch, max_length, dtype)

    def beside(
        self,
        features: Callable[..., tuple[Array, Any]],
        q: Float[Array, "b n hq d"],
        k: Float[Array, "b n hkv d"],
        v: Float[Array, "b n hkv d"],
        *,
        segment_ids: Int[Array, "b n"],
        positions: Int[Array, "b n"],
        log_decay: Array | None,
        state: SplitState | None,
    ) -> tuple[Float[Array, "b n hq d"], SplitState | None]:
        """The output of all heads; `features` is called for those that are not exact."""
        kv_heads, heads = self.spec.exact_kv_heads, self.attention.spec.num_heads
        places = {"segment_ids": segment_ids, "positions": positions}
        decays = (None, None) if log_decay is None else (log_decay[..., :kv_heads], log_decay[..., kv_heads:])
        cache, sums = (None, None) if state is None else state
        first = (q[:, :, :heads], k[:, :, :kv_heads], v[:, :, :kv_heads])
        exact, cache = self.attention(*first, **places, log_decay=decays[0], state=cache)
        rest = (q[:, :, heads:], k[:, :, kv_heads:], v[:, :, kv_heads:])
        others, sums = features(*rest, **places, log_decay=decays[1], state=sums)
        new = None if cache is None or sums is None else SplitState(cache, sums)
        return jnp.concatenate([exact, others], axis=2), new


def exact_part(spec: MixerSpec) -> MixerSpec:
    """The spec of the exact heads alone."""
    return _part(spec, spec.exact_kv_heads, kind="softmax")


def features_part(spec: MixerSpec) -> MixerSpec:
    """The spec of the other heads alone."""
    return _part(spec, spec.num_kv_heads - spec.exact_kv_heads, exact_kv_heads=0)


def check_exact_heads(spec: MixerSpec) -> None:
    """Raises UserError if no head is left for the features."""
    if spec.exact_kv_heads >= spec.num_kv_heads:
        raise UserError(
            f"model.attention.exact_kv_heads = {spec.exact_kv_heads} of {spec.num_kv_heads} key/value heads: at least "
            "one must be left; exact layers have kind = 'softmax'"
        )


def _part(spec: MixerSpec, num_kv_heads: int, **changes: Any) -> MixerSpec:
    group = spec.num_heads // spec.num_kv_heads
    return dataclasses.replace(spec, num_heads=num_kv_heads * group, num_kv_heads=num_kv_heads, **changes)
