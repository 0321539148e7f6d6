"""Nystromformer (Xiong et al., arXiv 2102.03902)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from darkformer_jax.mixers.encoders import EncoderMechanism, per_query_head, places_in_row
from darkformer_jax.mixers.spec import MixerSpec
from darkformer_jax.ops.features import matmul
from darkformer_jax.ops.projections import projection_key
from darkformer_jax.ops.state import NEG

CONV_WIDTH = 33  # tokens that the convolution of v sees, half of them on each side
_PSEUDO_INVERSE_STEPS = 6


class Nystromformer(EncoderMechanism):
    """A B^+ C v + convolution(v), where A = softmax(q l_k^T), B = softmax(l_q l_k^T), C = softmax(l_q k^T), q scaled.

    The landmarks l_q and l_k are means of q and k over m = `num_features` stretches of equal length: of the text's n
    tokens, token i belongs to stretch floor(i m / n). Padding is left out, so a text's outputs do not depend on the
    row's length. With n <= m every token is its own landmark, and A B^+ C is exact attention if B^+ has converged. B^+
    is the pseudo-inverse, after six steps of the authors' iteration, with one scale per head and text.
    """

    def __init__(self, spec: MixerSpec, layer: int | Array) -> None:
        super().__init__(spec, layer)
        shape, bound = (CONV_WIDTH, spec.num_heads), CONV_WIDTH**-0.5
        drawn = jax.random.uniform(projection_key(spec.seed, layer, 0), shape, jnp.float32, -bound, bound)
        self.kernel = nnx.Param(drawn, axes=(None, "heads"))

    @classmethod
    def mixing_flops(cls, spec: MixerSpec, length: int) -> float:
        """Per token and head: 8 m d for A, C and their products, 2 CONV_WIDTH d; 2 m^3 per product of B^+."""
        m, d = spec.num_features, spec.head_dim
        products = 4 * _PSEUDO_INVERSE_STEPS + 1
        return spec.num_heads * (8 * m * d + 2 * CONV_WIDTH * d + products * 2 * m**3 / length)

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        segment_ids: Array,
        positions: Array,
        log_decay: Array | None = None,
        state: Any = None,
    ) -> tuple[Array, Any]:
        m, dtype = self.spec.num_features, v.dtype
        is_real = segment_ids != 0
        q, k, v = (jnp.where(is_real[..., None, None], x, 0) for x in (q, k, v))  # 0 times padding's may be NaN
        k, v = per_query_head(k, self.spec.num_heads), per_query_head(v, self.spec.num_heads)
        place, count = places_in_row(segment_ids)
        stretch = place * m // jnp.maximum(count, 1)[:, None]
        members = jnp.where(is_real[..., None], jax.nn.one_hot(stretch, m), 0)  # [b, n, m]
        sizes = jnp.sum(members, axis=1)
        is_landmark = sizes > 0
        means = members / jnp.maximum(sizes, 1)[:, None]
        q_marks, k_marks = (matmul("bnm,bnhd->bmhd", means, x, jnp.float32) for x in (q, k))

        def weights(queries: Array, keys: Array, seen: Array) -> Array:
            logits = self.spec.scale * matmul("bnhd,bthd->bhnt", queries, keys, jnp.float32)
            return jax.nn.softmax(jnp.where(seen[:, None, None], logits, NEG), axis=-1)

        A, C = weights(q, k_marks, is_landmark), weights(q_marks, k, is_real)
        # A place without a token stands for itself alone: the inverse of the rest is the same without it.
        own = jnp.eye(m, dtype=jnp.float32)[None, None]
        B = jnp.where(is_landmark[:, None, :, None], weights(q_marks, k_marks, is_landmark), own)
        of_values = matmul("bhmn,bnhd->bhmd", C, v, jnp.float32)
        solved = matmul("bhmt,bhtd->bhmd", pseudo_inverse(B), of_values, jnp.float32)
        out = matmul("bhnm,bhmd->bnhd", A, solved, jnp.float32) + self._convolve(v)
        return jnp.where(is_real[..., None, None], out, 0).astype(dtype), None

    def _convolve(self, v: Float[Array, "b n h d"]) -> Float[Array, "b n h d"]:
        """sum_i kernel_i v_{n+i}, -16 <= i <= 16, one kernel per head; in float32."""
        kernel, length = self.kernel[...].astype(jnp.float32), v.shape[1]
        reach = CONV_WIDTH // 2
        padded = jnp.pad(v.astype(jnp.float32), ((0, 0), (reach, reach), (0, 0), (0, 0)))
        parts = (kernel[i][None, None, :, None] * padded[:, i : i + length] for i in range(CONV_WIDTH))
        return sum(parts, jnp.zeros_like(padded[:, :length]))


def pseudo_inverse(B: Float[Array, "b h m m"]) -> Float[Array, "b h m m"]:
    """Approximates B^+: Z <- Z (13 I - B Z (15 I - B Z (7 I - B Z))) / 4 from Z = B^T / (|B|_1 |B|_inf)."""
    columns, rows = (jnp.max(jnp.sum(jnp.abs(B), axis=axis), axis=-1) for axis in (-2, -1))
    Z = jnp.swapaxes(B, -1, -2) / (columns * rows)[..., None, None]
    eye = jnp.eye(B.shape[-1], dtype=B.dtype)[None, None]

    def times(a: Array, b: Array) -> Array:
        return matmul("bhij,bhjk->bhik", a, b, jnp.float32)

    for _ in range(_PSEUDO_INVERSE_STEPS):
        BZ = times(B, Z)
        Z = 0.25 * times(Z, 13 * eye - times(BZ, 15 * eye - times(BZ, 7 * eye - BZ)))
    return Z
