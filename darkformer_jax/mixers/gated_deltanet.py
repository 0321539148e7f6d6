"""Gated DeltaNet (Yang et al., arXiv 2412.06464)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from darkformer_jax.distributed.sharding import constrain
from darkformer_jax.mixers.convolution import ActivatedConvolution, last_tokens, no_tokens
from darkformer_jax.mixers.features import mean_exact_keys
from darkformer_jax.mixers.layers import Linear, RMSNorm, of_length
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
from darkformer_jax.ops.delta_rule import delta_rule_attention
from darkformer_jax.ops.signed_attention import init_signed_state


class GatedDeltaNet(Recurrent):
    """x -> y, with num_heads heads, whose q and k have d = head_dim numbers and whose v and z expand head_dim:

    q, k, v, z, a, b = projections of the input; q, k, v <- silu(convolution); q, k <- q / |q|, k / |k|
    g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b)     per token and head
    S <- exp(g) S, S <- S + beta k (v - S^T k)^T                 S [d, expand d] per head
    out = W (RMSNorm(S^T q d^-1/2) silu(z))                      the norm of each head
    """

    uses = frozenset({"chunk_size", "expand"})

    def __init__(self, spec: MixerSpec, *, rngs: nnx.Rngs) -> None:
        self.spec = spec
        heads, size, axes = spec.num_heads, spec.expand * spec.head_dim, ("embed", "heads", None)
        linear = functools.partial(Linear, rngs=rngs, dtype=spec.dtype)
        self.in_q = linear((spec.embed_dim, heads, spec.head_dim), axes)
        self.in_k = linear((spec.embed_dim, heads, spec.head_dim), axes)
        self.in_v = linear((spec.embed_dim, heads, size), axes)
        self.in_z = linear((spec.embed_dim, heads, size), axes)
        wide = functools.partial(Linear, (spec.embed_dim, heads), axes[:2], rngs=rngs, dtype=jnp.float32)
        self.in_a = wide()  # exponents
        self.in_b = wide()
        convolution = functools.partial(
            ActivatedConvolution, CONV_WIDTH, heads, axis="heads", use_bias=False, rngs=rngs
        )
        self.conv_q = convolution(head_dim=spec.head_dim)
        self.conv_k = convolution(head_dim=spec.head_dim)
        self.conv_v = convolution(head_dim=size)
        # One axis each, so without weight decay.
        self.A_log = nnx.Param(draw_log_rates(rngs, heads, 0.01), axes=("heads",))
        self.dt_bias = nnx.Param(draw_step_bias(rngs, heads), axes=("heads",))
        self.norm = RMSNorm(size, spec.norm_eps, spec.norm_plus_one, axis=None)
        self.out_proj = linear((heads, size, spec.embed_dim), ("heads", None, "embed"), num_inputs=2)

    @classmethod
    def build(cls, spec: MixerSpec, layer: int | Array, *, rngs: nnx.Rngs) -> "GatedDeltaNet":
        return cls(spec, rngs=rngs)

    @classmethod
    def flops(cls, spec: MixerSpec, length: int) -> float:
        """With H heads, d = head_dim, e = expand d, and n keys of the own chunk (`mean_exact_keys`), per token:

        projections  2 D H (2 d + 2 e + 2) + 2 H e D
        convolution  2 CONV_WIDTH H (2 d + e)
        state        6 H d e              what S holds under k, the update, and the reading
        local        H (2 d + 2 e) n      the outputs
                     H (2 d + 2 e) n      the triangular system: its products of keys, and its solution
        """
        H, d, e, D = spec.num_heads, spec.head_dim, spec.expand * spec.head_dim, spec.embed_dim
        projections = 2 * D * H * (2 * d + 2 * e + 2) + 2 * H * e * D
        convolution = 2 * CONV_WIDTH * H * (2 * d + e)
        return projections + convolution + 6 * H * d * e + 4 * H * (d + e) * mean_exact_keys(spec, length)

    def __call__(
        self, x: Array, segment_ids: Array, positions: Array, state: RecurrentState | None = None
    ) -> tuple[Array, RecurrentState | None]:
        """(y, the state after the tokens). x and y are [b, n, embed_dim]; positions are not read."""
        old = self.init_state(len(x), x.shape[1], self.spec.dtype) if state is None else state
        x = jnp.where((segment_ids != 0)[..., None], x, 0)
        projected = self.in_q(x), self.in_k(x), self.in_v(x)
        convolutions = self.conv_q, self.conv_k, self.conv_v
        convolved = convolve(convolutions, projected, segment_ids, old.convolution)
        q, k, v = (constrain(part, "batch", "sequence", "heads", None) for part in convolved)

        log_decay, _ = log_decay_of(self.in_a(x) + self.dt_bias[...].astype(jnp.float32)[None, None], self.A_log)
        queries = of_length(q, self.spec.head_dim**-0.5)
        options: dict[str, Any] = {"segment_ids": segment_ids, "chunk_size": self.spec.chunk_size, "state": old.scan}
        y, scan = delta_rule_attention(
            queries, of_length(k, 1.0), v, jax.nn.sigmoid(self.in_b(x)), log_decay, **options
        )
        gated = self.norm(y.astype(jnp.float32)) * jax.nn.silu(self.in_z(x).astype(jnp.float32))
        out = self.out_proj(constrain(gated.astype(v.dtype), "batch", "sequence", "heads", None))
        if state is None:
            return out, None
        return out, RecurrentState(scan, last_tokens(old.convolution, projected, segment_ids))

    def init_state(self, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> RecurrentState:
        """The state before the first token; its size does not depend on `max_length`."""
        s = self.spec
        heads, dim, size = s.num_heads, s.head_dim, s.expand * s.head_dim
        scan = init_signed_state(batch, heads, dim, size, jnp.dtype(dtype))
        return RecurrentState(scan, no_tokens(batch, CONV_WIDTH, ((heads, dim), (heads, dim), (heads, size)), dtype))
