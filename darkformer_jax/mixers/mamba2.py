"""Mamba-2, a state space model (Dao and Gu, arXiv 2405.21060)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from darkformer_jax.distributed.sharding import constrain
from darkformer_jax.mixers.convolution import ActivatedConvolution, last_tokens, no_tokens
from darkformer_jax.mixers.features import mean_exact_keys
from darkformer_jax.mixers.layers import Linear, RMSNorm
from darkformer_jax.mixers.recurrent import (
    CONV_WIDTH,
    Recurrent,
    RecurrentState,
    convolve,
    draw_log_rates,
    draw_step_bias,
    log_decay_of,
)
from darkformer_jax.mixers.spec import MixerSpec
from darkformer_jax.ops.signed_attention import init_signed_state, signed_attention


class Mamba2(Recurrent):
    """x -> y, with H = expand num_heads heads of P = head_dim, and N = state_size:

        z, x, B, C, dt = projections of the input; x, B, C <- silu(convolution)
        dt <- softplus(dt + dt_bias), g = -exp(A_log) dt             per token and head
        S <- exp(g) S + B (dt x)^T, y = S^T C + D x                  S [N, P] per head
        out = W RMSNorm(y silu(z))                                   the norm over all heads

    All heads share B and C (one group). z, x, B, C and dt are the columns of the paper's one projection, each with a
    kernel of its own, so that a mesh can split them by heads.
    """

    uses = frozenset({"chunk_size", "state_size", "expand"})

    def __init__(self, spec: MixerSpec, *, rngs: nnx.Rngs) -> None:
        self.spec = spec
        heads, of_heads = num_heads(spec), (spec.embed_dim, num_heads(spec), spec.head_dim)
        linear = functools.partial(Linear, rngs=rngs, dtype=spec.dtype)
        self.z = linear(of_heads, ("embed", "heads", None))
        self.x = linear(of_heads, ("embed", "heads", None))
        self.B = linear((spec.embed_dim, 1, spec.state_size), ("embed", None, None))
        self.C = linear((spec.embed_dim, 1, spec.state_size), ("embed", None, None))
        self.dt = Linear((spec.embed_dim, heads), ("embed", "heads"), rngs=rngs, dtype=jnp.float32)  # exponents
        convolution = functools.partial(ActivatedConvolution, CONV_WIDTH, use_bias=True, rngs=rngs)
        self.conv_x = convolution(heads, spec.head_dim, "heads")
        self.conv_B = convolution(1, spec.state_size, None)
        self.conv_C = convolution(1, spec.state_size, None)
        # One axis each, so without weight decay.
        self.A_log = nnx.Param(draw_log_rates(rngs, heads, 1.0), axes=("heads",))
        self.dt_bias = nnx.Param(draw_step_bias(rngs, heads), axes=("heads",))
        self.D = nnx.Param(jnp.ones(heads, jnp.float32), axes=("heads",))
        self.norm = RMSNorm(heads * spec.head_dim, spec.norm_eps, spec.norm_plus_one, axis="heads")
        self.out_proj = linear((heads, spec.head_dim, spec.embed_dim), ("heads", None, "embed"), num_inputs=2)

    @classmethod
    def build(cls, spec: MixerSpec, layer: int | Array, *, rngs: nnx.Rngs) -> "Mamba2":
        return cls(spec, rngs=rngs)

    @classmethod
    def flops(cls, spec: MixerSpec, length: int) -> float:
        """With H heads of P, I = H P, N = state_size, and n keys of the own chunk (`mean_exact_keys`), per token:

        projections  2 D (2 I + 2 N + H) + 2 I D
        convolution  2 CONV_WIDTH (I + 2 N)
        state        4 N I     the update, and the reading
        local        (2 N + 2 I) n
        """
        heads, size, N, D = num_heads(spec), num_heads(spec) * spec.head_dim, spec.state_size, spec.embed_dim
        projections = 2 * D * (2 * size + 2 * N + heads) + 2 * size * D
        convolution = 2 * CONV_WIDTH * (size + 2 * N)
        return projections + convolution + 4 * N * size + 2 * (N + size) * mean_exact_keys(spec, length)

    def __call__(
        self, x: Array, segment_ids: Array, positions: Array, state: RecurrentState | None = None
    ) -> tuple[Array, RecurrentState | None]:
        """(y, the state after the tokens). x and y are [b, n, embed_dim]; positions are not read."""
        old = self.init_state(len(x), x.shape[1], self.spec.dtype) if state is None else state
        x = jnp.where((segment_ids != 0)[..., None], x, 0)
        projected = self.x(x), self.B(x), self.C(x)
        convolutions = self.conv_x, self.conv_B, self.conv_C
        values, B, C = convolve(convolutions, projected, segment_ids, old.convolution)
        values = constrain(values, "batch", "sequence", "heads", None)

        log_decay, step = log_decay_of(self.dt(x) + self.dt_bias[...].astype(jnp.float32)[None, None], self.A_log)
        wide = values.astype(jnp.float32)
        steps = (wide * step[..., None]).astype(values.dtype)
        options: dict[str, Any] = {"segment_ids": segment_ids, "chunk_size": self.spec.chunk_size, "state": old.scan}
        y, scan = signed_attention(C, B, steps, log_decay, **options)
        y = y.astype(jnp.float32) + self.D[...].astype(jnp.float32)[None, None, :, None] * wide
        gated = y * jax.nn.silu(self.z(x).astype(jnp.float32))
        normed = self.norm(gated.reshape(*gated.shape[:2], -1)).reshape(gated.shape).astype(values.dtype)
        out = self.out_proj(constrain(normed, "batch", "sequence", "heads", None))
        if state is None:
            return out, None
        return out, RecurrentState(scan, last_tokens(old.convolution, projected, segment_ids))

    def init_state(self, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> RecurrentState:
        """The state before the first token; its size does not depend on `max_length`."""
        s, heads = self.spec, num_heads(self.spec)
        sizes = ((heads, s.head_dim), (1, s.state_size), (1, s.state_size))
        scan = init_signed_state(batch, heads, s.state_size, s.head_dim, jnp.dtype(dtype))
        return RecurrentState(scan, no_tokens(batch, CONV_WIDTH, sizes, dtype))


def num_heads(spec: MixerSpec) -> int:
    """H."""
    return spec.expand * spec.num_heads
