"""What the heads of a layer forget: the log decay per token that multiplies their kernel (`ops/decay.py`)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from darkformer_jax.mixers.layers import Linear
from darkformer_jax.mixers.spec import MixerSpec


class Forgetting(nnx.Module):
    """x [b, n, embed] -> the log decay of each key/value head, [hkv], or [b, n, hkv] if tokens decide.

        alibi    -s_h, s_h = 2^(-8 (h + 1) / hkv): constants (Press et al., arXiv 2108.12409, for powers of two)
        learned  -softplus(a_h)
        gate     -softplus(a_h + x W_h), which is log sigmoid(-a_h - x W_h); W starts at 0

    softplus(a_h) starts at 1 / memory, and the memories of successive heads rise geometrically from shortest_memory to
    longest_memory. The last `undecayed_heads` heads forget nothing.
    """

    def __init__(self, spec: MixerSpec, rngs: nnx.Rngs) -> None:
        self.kind = "alibi" if spec.has_alibi else spec.decay
        self.num_heads = spec.num_kv_heads
        self.forgetful = spec.num_kv_heads - spec.undecayed_heads
        if self.kind == "alibi":
            return
        rate = 1 / memories(spec)
        start = rate + np.log(-np.expm1(-rate))  # the inverse of softplus
        self.bias = nnx.Param(jnp.asarray(start, jnp.float32), axes=("kv_heads",))
        if self.kind == "gate":
            shape = (spec.embed_dim, self.num_heads)
            self.gate = Linear(shape, ("embed", "kv_heads"), rngs=rngs, dtype=jnp.float32)  # exponents
            self.gate.kernel[...] = jnp.zeros(shape, jnp.float32)

    def __call__(self, x: Float[Array, "b n embed"]) -> Float[Array, "..."]:
        if self.kind == "alibi":
            return -jnp.asarray(alibi_slopes(self.num_heads))
        raw = self.bias[...].astype(jnp.float32)
        if self.kind == "gate":
            raw = self.gate(x) + raw[None, None]
        decay = -jax.nn.softplus(raw)
        if self.forgetful == self.num_heads:
            return decay
        forgets = np.arange(self.num_heads) < self.forgetful
        return jnp.where(forgets.reshape((1,) * (decay.ndim - 1) + (-1,)), decay, 0)


def alibi_slopes(num_heads: int) -> Float[np.ndarray, "h"]:
    """2^(-8/h), 2^(-16/h), ..., 2^-8."""
    return np.exp2(-8 * np.arange(1, num_heads + 1) / num_heads).astype(np.float32)


def memories(spec: MixerSpec) -> Float[np.ndarray, "hkv"]:
    """Tokens after which the weight of a key has fallen to 1/e, at the start, for each head."""
    count = spec.num_kv_heads - spec.undecayed_heads
    if count == 1:
        spaced = np.array([np.sqrt(spec.shortest_memory * spec.longest_memory)])
    else:
        spaced = np.geomspace(spec.shortest_memory, spec.longest_memory, count)
    return np.concatenate([spaced, np.full(spec.undecayed_heads, spec.longest_memory)])
