"""Random feature attention with a gate (Peng et al., arXiv 2103.02143)."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from darkformer_jax.errors import UserError
from darkformer_jax.mixers.attention import ATTENTION_FIELDS, Mechanism
from darkformer_jax.mixers.features import draw_layer, mean_exact_keys
from darkformer_jax.mixers.layers import of_length
from darkformer_jax.mixers.mixer import Role
from darkformer_jax.mixers.spec import Geometry, MixerSpec, Projection
from darkformer_jax.ops.features import matmul
from darkformer_jax.ops.signed_attention import SignedState, init_signed_state, signed_attention

FLOOR = 0.001  # of the normaliser, which is 1 if all keys of a full memory are the query


class RFAGate(Mechanism):
    """Random Fourier features of a Gaussian kernel, in a memory that each token's gate g = exp(log decay) renews:

        S <- g S + (1 - g) phi(k) v^T,  z <- g z + (1 - g) phi(k),  out = phi(q)^T S / max(|phi(q)^T z|, FLOOR)
        phi(x) = m^-1/2 [sin, cos](w (sigma x / |x|)),  so that E[phi(q) . phi(k)] = exp(-|sigma (q/|q| - k/|k|)|^2 / 2)

    The m = `num_features` rows of w are drawn from N(0, I). sigma is learned per key/value head and dimension, from 1
    on. The gate is that of `decay = gate`. Estimates may be negative or near 0, hence the floor. The authors' published
    code has no gate; with 64 features it takes max(sum, 1.6 |phi|^2) or, in its quadratic form, max(|sum|, 0.0016
    |phi|^2). Here 1 - g scales z, and the first would act on every token. Ours acts on the first tokens of a document
    where the memory is long: one key has 1 - g = 1 / memory, times 0.14 or more of the kernel at sigma = 1. With the
    default `longest_memory`, 128 tokens, that is the floor at the least.
    """

    role: ClassVar[Role] = "estimator"
    uses = (ATTENTION_FIELDS - {"undecayed_heads"}) | {
        "chunk_size", "num_features", "projections", "redraw_every", "geometry_learning_rate"
    }  # fmt: skip
    needs = frozenset({"decay"})

    def __init__(self, spec: MixerSpec, layer: int | Array) -> None:
        super().__init__(spec, layer)
        self.projections = Projection(draw_layer(spec, layer, 0), axes=("kv_heads", "features", None))
        self.sigma = Geometry(jnp.ones((spec.num_kv_heads, spec.head_dim)), axes=("kv_heads", None))

    @classmethod
    def in_effect(cls, spec: MixerSpec) -> frozenset[str]:
        return cls.uses - {"chunk_size"}

    @classmethod
    def check(cls, spec: MixerSpec) -> None:
        super().check(spec)
        if spec.decay != "gate":
            raise UserError(f"model.attention.decay = {spec.decay!r}: {spec.kind!r} is gated; allowed: gate")

    @classmethod
    def check_stretch(cls, spec: MixerSpec, length: int) -> None:
        raise UserError(f"mesh.context > 1: {spec.kind!r} does not split sequences; allowed: mesh.context = 1")

    @classmethod
    def mixing_flops(cls, spec: MixerSpec, length: int) -> float:
        """With H query and G key/value heads, and n keys of the own chunk (`mean_exact_keys`), per token:

        features  2 m d (H + G)
        state     2 (2 m) (d + 1) (H + G)     the update of S and z, and the reading
        local     (2 (2 m) + 2 (d + 1)) H n
        """
        m, d, H = spec.num_features, spec.head_dim, spec.num_heads
        per_head = 2 * m * d + 4 * m * (d + 1)
        return per_head * (H + spec.num_kv_heads) + (4 * m + 2 * d + 2) * H * mean_exact_keys(spec, length)

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        segment_ids: Array,
        positions: Array,
        log_decay: Array | None = None,
        state: SignedState | None = None,
    ) -> tuple[Array, SignedState | None]:
        assert log_decay is not None  # `check` requires the gate
        wide = v.astype(jnp.float32)
        kept = jnp.broadcast_to(-jnp.expm1(log_decay), v.shape[:3])[..., None]  # 1 - g
        values = jnp.concatenate([wide * kept, kept], axis=-1).astype(v.dtype)
        options: dict[str, Any] = {"segment_ids": segment_ids, "chunk_size": self.spec.chunk_size, "state": state}
        sums, new = signed_attention(self._features(q), self._features(k), values, log_decay, **options)
        sums = sums.astype(jnp.float32)
        out = sums[..., :-1] / jnp.maximum(jnp.abs(sums[..., -1:]), FLOOR)
        return out.astype(v.dtype), None if state is None else new

    def init_state(self, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> SignedState:
        """S, with z as its last column; its size does not depend on `max_length`."""
        s = self.spec
        return init_signed_state(batch, s.num_kv_heads, 2 * s.num_features, s.head_dim + 1, jnp.dtype(dtype))

    def _features(self, x: Float[Array, "b n h d"]) -> Float[Array, "b n h m"]:
        """phi(x), with the w and sigma of the head's key/value head. Angles are float32."""
        w = self.projections[...].astype(jnp.float32) * self.sigma[...].astype(jnp.float32)[:, None]
        grouped = of_length(x.astype(jnp.float32), 1.0).reshape(*x.shape[:2], len(w), -1, x.shape[3])
        angles = matmul("bngrd,gmd->bngrm", grouped, w, jnp.float32).reshape(*x.shape[:3], -1)
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        return (waves * self.spec.num_features**-0.5).astype(x.dtype)
