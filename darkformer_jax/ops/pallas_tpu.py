"""Causal attention as TPU kernels (Pallas): `scan_features`, normalised, and `scan_window`'s loop.

Of features everywhere, a program of the grid (B, Hkv, chunks) treats one chunk of one key/value head and all its query
heads; chunks follow each other and hand the far state (c, z, S^T) on in VMEM. Log features are made there and never
written to memory. `pallas_fast` has the formulas of almost every chunk, which have one scale per feature, and
`pallas_safe` those for any other, whose range of inputs without underflow is that of `ops/linear.py`. `pallas_window`
has the hybrid.

The backward pass keeps the inputs and the states before each chunk, and computes the rest again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from darkformer_jax.ops import pallas_window, pallas_window_backward
from darkformer_jax.ops.decay import RunningSum, running_sum
from darkformer_jax.ops.features import positive_random_features
from darkformer_jax.ops.linear import Kernel, Sums, Tokens, log_far_weight
from darkformer_jax.ops.lowering import TPU_TILE
from darkformer_jax.ops.pallas_backward import backward
from darkformer_jax.ops.pallas_blocks import LANES, Inputs, Sizes, last_segments
from darkformer_jax.ops.pallas_forward import forward
from darkformer_jax.ops.pallas_window import Places
from darkformer_jax.ops.scan import heads_last, join_chunks, split_chunks
from darkformer_jax.ops.sinks import PlacedSinks, place_sinks
from darkformer_jax.ops.state import AttentionState, FarState, Recent, Sinks


def what_is_not_covered(kernel: Kernel, tokens: Tokens, *, causal: bool, window: int) -> str | None:
    """Why the kernels cannot compute this call, in a few words; None where they can."""
    if not causal:
        return "causal=False"
    if tokens.values.dtype == jnp.float64:
        return "float64"
    if kernel.feature_map is not positive_random_features or not isinstance(kernel.scale, int | float):
        return "another feature map than DARK's, or a traced scale"
    if window and tokens.decays is not None:
        return "a decay with a window"
    if window and not kernel.arrays.features.projections.shape[1]:
        return "a window without features"
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
    missing = what_is_not_covered(kernel, tokens, causal=True, window=0)
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
    return (far, out), (inputs, segments, saved)


def _attend_backward(sizes: Sizes, saved: Any, gradient: tuple[FarState, Array]) -> tuple[Inputs, None]:
    inputs, segments, states = saved
    return backward(sizes, inputs, segments, states, gradient), None


_attend.defvjp(_attend_forward, _attend_backward)


def attend_chunks(
    kernel: Kernel,
    state: AttentionState,
    recent: Recent,
    chunks: Tokens,
    num_complete: Int[Array, "b"] | None,
    *,
    interpret: bool = False,
) -> tuple[FarState, Sinks, Sums]:
    """`scan_chunks` as a kernel; the sums are normalised, in v's dtype. A TPU takes chunks of `TPU_TILE` n tokens."""
    flat, (num_chunks, _, size) = jax.tree.map(join_chunks, chunks), chunks.segments.shape
    before = jax.vmap(heads_last)(recent)
    near = jax.tree.map(lambda old, new: jnp.concatenate([old.astype(new.dtype), new], axis=1), before, flat.recent())
    leaving = jax.tree.map(lambda leaf: leaf[:, : num_chunks * size], near)
    if num_complete is not None:  # the block that an incomplete chunk would move out stays in the window
        moves = jnp.arange(num_chunks * size)[None] // size < num_complete[:, None]
        leaving = leaving._replace(segments=jnp.where(moves, leaving.segments, 0))
    num_sinks = state.sinks.filled.shape[1]
    to_far = jnp.where(leaving.positions < num_sinks, 0, leaving.segments)
    sinks, sink_keys, sink_values = state.sinks, None, None
    blocks = near.segments.reshape(len(near.segments), -1, size)
    # Slices, because gathers are slow on a TPU.
    segments = jnp.concatenate([blocks[:, j : j + num_chunks] for j in range(blocks.shape[1] - num_chunks + 1)], axis=2)
    if num_sinks:
        each = place_sinks(state.sinks, state.far.segment, leaving, size)
        sinks, (sink_keys, sink_values, sink_segments) = each.after_all(), _whole_tiles(each)
        segments = jnp.concatenate([segments, sink_segments], axis=2)
    horizon, features = kernel.far_horizon, kernel.arrays.features
    bound = log_far_weight(horizon, flat.positions.astype(jnp.float32)) if horizon else None
    of_blocks = last_segments(leaving.segments, size)
    places = Places(flat.segments, segments, to_far, of_blocks, bound)
    with_geometry = kernel.window_kernel == "dark" and features.geometry is not None
    sizes = pallas_window.Sizes(float(kernel.scale), size, recent.segments.shape[1], with_geometry, interpret)
    of_heads = (kernel.arrays.log_gain, sink_keys, sink_values)
    inputs = pallas_window.Inputs(features, state.far, flat.queries, near.keys, near.values, *of_heads)
    far, out = _attend_window(sizes, inputs, places)
    sees = jnp.broadcast_to((flat.segments != 0)[:, :, None, None], out.shape[:-1])
    sums = Sums(out.astype(jnp.float32), sees.astype(jnp.float32), jnp.zeros(out.shape[:-1], jnp.float32))
    return far, sinks, split_chunks(sums, size)


def _whole_tiles(sinks: PlacedSinks) -> tuple[Array, Array, Array]:
    """Keys, values and segments of the sinks before each chunk, padded to the rows of a tile."""
    keys, values, segments = (x[:, :-1] for x in sinks)
    missing = -segments.shape[2] % TPU_TILE
    pad = lambda x: jnp.pad(x, [(0, 0)] * 3 + [(0, missing), (0, 0)])
    return pad(keys), pad(values), jnp.pad(segments, [(0, 0), (0, 0), (0, missing)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_window(sizes: pallas_window.Sizes, inputs: pallas_window.Inputs, places: Places) -> tuple[FarState, Array]:
    return pallas_window.forward(sizes, inputs, places, save=False)[:2]


def _attend_window_forward(
    sizes: pallas_window.Sizes, inputs: pallas_window.Inputs, places: Places
) -> tuple[tuple[FarState, Array], Any]:
    far, out, saved = pallas_window.forward(sizes, inputs, places, save=True)
    return (far, out), (inputs, places, saved)


def _attend_window_backward(
    sizes: pallas_window.Sizes, saved: Any, gradient: tuple[FarState, Array]
) -> tuple[pallas_window.Inputs, None]:
    inputs, places, states = saved
    return pallas_window_backward.backward(sizes, inputs, places, states, gradient), None


_attend_window.defvjp(_attend_window_forward, _attend_window_backward)
