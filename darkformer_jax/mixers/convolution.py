"""A short causal convolution over the tokens of a document."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from darkformer_jax.mixers.spec import MixerSpec

Parts = tuple[Array, ...]  # each [b, n, h, d], with numbers of heads and sizes of its own


class ConvolutionState(NamedTuple):
    """The last width - 1 tokens; segment 0 = none."""

    inputs: Parts
    segments: Int[Array, "b w"]


def tokens_before(
    x: Float[Array, "b n h d"],
    segment_ids: Int[Array, "b n"],
    before: Float[Array, "b w h d"],
    segments_before: Int[Array, "b w"],
) -> Iterator[Float[Array, "b n h d"]]:
    """x_{n-1}, x_{n-2}, ... of each token n, as far as `before`, the tokens in front of x, reaches.

    0 where the token is of another document than n's.
    """
    length, reach = x.shape[1], before.shape[1]
    tokens = jnp.concatenate([before.astype(x.dtype), x], axis=1)
    segments = jnp.concatenate([segments_before, segment_ids], axis=1)
    for start in range(reach - 1, -1, -1):
        same = segments[:, start : start + length] == segment_ids
        yield jnp.where(same[..., None, None], tokens[:, start : start + length], 0)


class ShortConvolution(nnx.Module):
    """y_n = x_n + sum_{0 <= i < width} kernel_i * x_{n-i}, for each head and dimension; x_{n-i} of n's document only.

    The kernel starts at 0, so that the layer starts as if there were no convolution, and weight decay leads back there.
    """

    def __init__(self, width: int, num_heads: int, head_dim: int, axis: str) -> None:
        self.kernel = nnx.Param(jnp.zeros((width, num_heads, head_dim), jnp.float32), axes=(None, axis, None))

    def __call__(
        self,
        x: Float[Array, "b n h d"],
        segment_ids: Int[Array, "b n"],
        before: Float[Array, "b w h d"],
        segments_before: Int[Array, "b w"],
    ) -> Float[Array, "b n h d"]:
        """y. before: the width - 1 tokens in front of x."""
        kernel = self.kernel[...].astype(x.dtype)
        y = x + kernel[0][None, None] * x
        for back, past in enumerate(tokens_before(x, segment_ids, before, segments_before), 1):
            y = y + kernel[back][None, None] * past
        return y


class ActivatedConvolution(nnx.Module):
    """y_n = silu(bias + sum_{0 <= i < width} kernel_i * x_{n-i}), the convolution of state space models.

    The kernel starts as PyTorch's do, uniform in +-width^-0.5, and the bias at 0.
    """

    def __init__(
        self, width: int, num_heads: int, head_dim: int, axis: str | None, *, use_bias: bool, rngs: nnx.Rngs
    ) -> None:
        bound, shape = width**-0.5, (num_heads, head_dim)
        start = jax.random.uniform(rngs.params(), (width, *shape), jnp.float32, -bound, bound)
        self.kernel = nnx.Param(start, axes=(None, axis, None))
        self.bias = nnx.Param(jnp.zeros(shape, jnp.float32), axes=(axis, None)) if use_bias else None

    def __call__(
        self,
        x: Float[Array, "b n h d"],
        segment_ids: Int[Array, "b n"],
        before: Float[Array, "b w h d"],
        segments_before: Int[Array, "b w"],
    ) -> Float[Array, "b n h d"]:
        """y. before: the width - 1 tokens in front of x."""
        kernel = self.kernel[...].astype(x.dtype)
        y = kernel[0][None, None] * x
        for back, past in enumerate(tokens_before(x, segment_ids, before, segments_before), 1):
            y = y + kernel[back][None, None] * past
        return jax.nn.silu(y if self.bias is None else y + self.bias[...].astype(x.dtype)[None, None])


class QKVConvolution(nnx.Module):
    """Convolutions of q, k and v."""

    def __init__(self, spec: MixerSpec) -> None:
        self.spec = spec
        self.q = ShortConvolution(spec.conv_width, spec.num_heads, spec.head_dim, "heads")
        self.k = ShortConvolution(spec.conv_width, spec.num_kv_heads, spec.head_dim, "kv_heads")
        self.v = ShortConvolution(spec.conv_width, spec.num_kv_heads, spec.head_dim, "kv_heads")

    def __call__(
        self, qkv: Parts, segment_ids: Int[Array, "b n"], state: ConvolutionState | None
    ) -> tuple[Parts, ConvolutionState | None]:
        """(convolved q, k and v, the state after these tokens or None if none was given)."""
        before = self.init_state(len(segment_ids), qkv[0].dtype) if state is None else state
        parts = zip((self.q, self.k, self.v), qkv, before.inputs, strict=True)
        q, k, v = (part(x, segment_ids, old, before.segments) for part, x, old in parts)
        return (q, k, v), None if state is None else last_tokens(state, qkv, segment_ids)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike) -> ConvolutionState:
        """The state before the first token."""
        s = self.spec
        sizes = [(heads, s.head_dim) for heads in (s.num_heads, s.num_kv_heads, s.num_kv_heads)]
        return no_tokens(batch, s.conv_width, sizes, dtype)


def no_tokens(
    batch: int, width: int, sizes: Sequence[tuple[int, int]], dtype: jax.typing.DTypeLike
) -> ConvolutionState:
    """The state before the first token of convolutions of `width` tokens. sizes: (heads, size) of each part."""
    inputs = tuple(jnp.zeros((batch, width - 1, *size), dtype) for size in sizes)
    return ConvolutionState(inputs, jnp.zeros((batch, width - 1), jnp.int32))


def last_tokens(state: ConvolutionState, inputs: Parts, segment_ids: Int[Array, "b n"]) -> ConvolutionState:
    """The state after more tokens. Padding at their end leaves no trace."""
    width = state.segments.shape[1]
    count = jnp.max(jnp.where(segment_ids != 0, jnp.arange(1, segment_ids.shape[1] + 1)[None], 0), axis=1)
    take = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, width, axis=0))

    def after(old: Array, new: Array) -> Array:
        return take(jnp.concatenate([old, new.astype(old.dtype)], axis=1), count)

    return jax.tree.map(after, state, ConvolutionState(inputs, segment_ids))
