"""Causal attention with random features everywhere as TPU kernels (Pallas): `scan_features`, normalised.

A program of the grid (B, Hkv, chunks) treats one chunk of one key/value head and all its query heads; chunks follow
each other and hand the far state (c, z, S^T) on in VMEM. Log features are made there and never written to memory. The
formulas, and so the range of inputs without underflow, are those of `ops/linear.py`: a maximum per feature, and scores
with a maximum per query and per key.

The backward pass keeps the inputs, the output and the states before each chunk, and computes the rest again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from darkformer_jax.ops.decay import RunningSum, running_sum
from darkformer_jax.ops.features import positive_random_features
from darkformer_jax.ops.linear import Kernel, Tokens
from darkformer_jax.ops.pallas_backward import backward
from darkformer_jax.ops.pallas_chunk import LANES, Inputs, Sizes
from darkformer_jax.ops.pallas_forward import forward
from darkformer_jax.ops.state import AttentionState, FarState


def what_is_not_covered(kernel: Kernel, state: AttentionState, tokens: Tokens, *, causal: bool) -> str | None:
    """Why the kernel cannot compute this call without a window, in a few words; None where it can."""
    if not causal:
        return "causal=False"
    if tokens.values.dtype == jnp.float64:
        return "float64"
    if kernel.feature_map is not positive_random_features or not isinstance(kernel.scale, int | float):
        return "another feature map than DARK's, or a traced scale"
    if state.sinks.filled.shape[-1]:
        return "sinks"
    return None


def chunk_of(group: int) -> int:
    """Tokens of a chunk: the product of a chunk with its group of query heads fills the matrix unit, and fits VMEM."""
    return LANES if group > 2 else 2 * LANES


def attend_features(
    kernel: Kernel, state: AttentionState, tokens: Tokens, *, chunk_size: int | None = None, interpret: bool = False
) -> tuple[AttentionState, Float[Array, "b n h g v"]]:
    """(the state after the tokens, out in v's dtype): `scan_features` with causality, and `normalize`.

    Leaves have the batch in front, as there. Arrays that are sharded over devices need `jax.shard_map` around the call.

    Args:
      chunk_size: of the kernel, not of the result; None: what suits a TPU. A TPU takes multiples of 128.
      interpret: computes the kernel's steps on any device; for tests.

    Raises:
      ValueError: for a call that `what_is_not_covered` names; callers ask it first.
    """
    missing = what_is_not_covered(kernel, state, tokens, causal=True)
    if missing is not None:
        raise ValueError(f"the TPU kernel does not cover {missing}")
    chunk = chunk_of(tokens.queries.shape[3]) if chunk_size is None else chunk_size
    sizes = Sizes(float(kernel.scale), chunk, interpret)
    decays = None if tokens.decays is None else _running_decays(tokens.decays, chunk)
    inputs = Inputs(kernel.arrays.features, state.far, tokens.queries, tokens.keys, tokens.values, decays)
    far, out = _attend(sizes, inputs, tokens.segments)
    return state._replace(far=far), out


def _running_decays(log_decay: Float[Array, "b n h"], chunk: int) -> RunningSum:
    """[b, h, t] of whole chunks: the sum of each chunk's decays up to each token. Padding does not decay."""
    batch, length, heads = log_decay.shape
    chunks = jnp.pad(log_decay, [(0, 0), (0, -length % chunk), (0, 0)]).reshape(batch, -1, chunk, heads)
    sums = running_sum(chunks.astype(jnp.float32), axis=2, causal=True)
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 3, 1).reshape(batch, heads, -1), sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(sizes: Sizes, inputs: Inputs, segments: Int[Array, "b n"]) -> tuple[FarState, Array]:
    return forward(sizes, inputs, segments, save=False)[:2]


def _attend_forward(sizes: Sizes, inputs: Inputs, segments: Array) -> tuple[tuple[FarState, Array], Any]:
    far, out, saved = forward(sizes, inputs, segments, save=True)
    return (far, out), (inputs, segments, out, saved)


def _attend_backward(sizes: Sizes, saved: Any, gradient: tuple[FarState, Array]) -> tuple[Inputs, None]:
    inputs, segments, out, states = saved
    return backward(sizes, inputs, segments, out, states, gradient), None


_attend.defvjp(_attend_forward, _attend_backward)
