"""The small parts of a transformer that are not attention."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from darkformer_jax.distributed.gather import with_gathered
from darkformer_jax.ops.lowering import dtype_of_sums, is_cpu_of_rows

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class Linear(nnx.Module):
    """Contracts the last `num_inputs` axes of x with the first ones of a kernel, in `dtype`; adds a bias if asked.

    rank: that of the low-rank update of the kernel (darkformer_jax/model/lora.py); 0 = no update.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        num_inputs: int = 1,
        use_bias: bool = False,
        rank: int = 0,
        rngs: nnx.Rngs,
        dtype: jax.typing.DTypeLike,
    ) -> None:
        self.num_inputs = num_inputs
        self.axes = axes
        self.dtype = dtype
        inputs = tuple(range(num_inputs))
        outputs = tuple(range(num_inputs, len(shape)))
        init = jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=inputs, out_axis=outputs)
        key = rngs.params()
        self.kernel = nnx.Param(init(key, shape, jnp.float32), axes=axes)
        zeros = jnp.zeros(shape[num_inputs:], jnp.float32)
        self.bias = nnx.Param(zeros, axes=axes[num_inputs:]) if use_bias else None
        # A has its own key, so that the kernel is the same with any rank.
        sizes, std = (*shape[:num_inputs], rank), math.prod(shape[:num_inputs]) ** -0.5
        low = (jax.random.fold_in(key, 1), sizes, jnp.float32)
        self.lora_A = nnx.Param(std * jax.random.normal(*low), axes=(*axes[:num_inputs], None)) if rank else None
        out = jnp.zeros((rank, *shape[num_inputs:]), jnp.float32)
        self.lora_B = nnx.Param(out, axes=(None, *axes[num_inputs:])) if rank else None

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...].astype(self.dtype)
        contract = functools.partial(_contract, num_inputs=self.num_inputs)
        y = with_gathered(contract, x.astype(self.dtype), kernel, self.axes, sums_in=dtype_of_sums(self.dtype))
        if self.lora_A is not None and self.lora_B is not None:
            low = _contract(x.astype(self.dtype), self.lora_A[...].astype(self.dtype), self.num_inputs)
            y = y + jnp.tensordot(low, self.lora_B[...].astype(self.dtype), axes=1)
        if self.bias is None:
            return y
        bias = self.bias[...].astype(self.dtype)
        return y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


def _contract(x: Array, kernel: Array, num_inputs: int) -> Array:
    """The last `num_inputs` axes of x times the first ones of `kernel`: rows of tokens times one matrix.

    On CPUs it is a product of two matrices for XLA, too. Of more axes, XLA's CPU backend would transpose the
    gradient of y for that of the kernel, element by element inside the loop that computes it: an MLP's backward pass
    took 1.7 times as long. Where a mesh may split axes of x beside the batch, they stay apart.
    """
    rows, columns = x.shape[: x.ndim - num_inputs], kernel.shape[num_inputs:]
    if is_cpu_of_rows():
        size = math.prod(kernel.shape[:num_inputs])
        return (x.reshape(-1, size) @ kernel.reshape(size, -1)).reshape(*rows, *columns)
    x_axes = tuple(range(x.ndim - num_inputs, x.ndim))
    return jax.lax.dot_general(x, kernel, ((x_axes, tuple(range(num_inputs))), ((), ())))


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32; * (1 + scale) with `plus_one`."""

    def __init__(self, size: int, eps: float, plus_one: bool = False, axis: str | None = "embed") -> None:
        self.eps = eps
        self.plus_one = plus_one
        self.scale = nnx.Param(jnp.full((size,), 0.0 if plus_one else 1.0, jnp.float32), axes=(axis,))

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * inverse * (1 + scale if self.plus_one else scale)).astype(x.dtype)


def of_length(x: Float[Array, "*b d"], length: float) -> Float[Array, "*b d"]:
    """x / sqrt(|x|^2 + 1e-6) * length over the last axis, in float32 until the end."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    return (wide * inverse * length).astype(x.dtype)


class GatedMLP(nnx.Module):
    """(activation(x Wg) * (x Wu)) Wd: SwiGLU with silu, GeGLU with gelu_tanh."""

    def __init__(
        self, embed_dim: int, mlp_dim: int, activation: str, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike
    ) -> None:
        self.activation = activation
        self.gate = Linear((embed_dim, mlp_dim), ("embed", "mlp"), rngs=rngs, dtype=dtype)
        self.up = Linear((embed_dim, mlp_dim), ("embed", "mlp"), rngs=rngs, dtype=dtype)
        self.down = Linear((mlp_dim, embed_dim), ("mlp", "embed"), rngs=rngs, dtype=dtype)

    def __call__(self, x: Array) -> Array:
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))
