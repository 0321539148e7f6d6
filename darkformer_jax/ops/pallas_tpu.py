"""Causal attention with random features everywhere as one TPU kernel (Pallas): `scan_features`, normalised.

A program of the grid (B, Hkv, chunks) treats one chunk of one key/value head and all its query heads; chunks follow
each other and hand the far state (c, z, S^T) on in VMEM. Log features are made there and never written to memory. The
formulas, and so the range of inputs without underflow, are those of `ops/linear.py`: a maximum per feature, and scores
with a maximum per query and per key.

The backward pass is that of the scan: it keeps only the inputs, and computes the scan's forward pass again. A forward
pass alone (prefill, evaluation) is what the kernel is for today.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from darkformer_jax.ops.attend import normalize
from darkformer_jax.ops.context import vary_like
from darkformer_jax.ops.features import RandomFeatures, positive_random_features
from darkformer_jax.ops.linear import HEADROOM, LOG_FLOOR, Kernel, KernelArrays, Tokens
from darkformer_jax.ops.scan import scan_features
from darkformer_jax.ops.state import NEG, AttentionState, FarState, init_state

LANES = 128


class _Sizes(NamedTuple):
    """What a compiled kernel depends on besides shapes."""

    scale: float
    chunk: int
    interpret: bool


class _Inputs(NamedTuple):
    features: RandomFeatures
    far: FarState
    queries: Float[Array, "b n h g d"]
    keys: Float[Array, "b n h d"]
    values: Float[Array, "b n h dv"]


def what_is_not_covered(kernel: Kernel, state: AttentionState, tokens: Tokens, *, causal: bool) -> str | None:
    """Why the kernel cannot compute this call without a window, in a few words; None where it can."""
    if not causal:
        return "causal=False"
    if tokens.decays is not None:
        return "log_decay"
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
      interpret: computes the kernel's steps with XLA, on any device; for tests.

    Raises:
      ValueError: for a call that `what_is_not_covered` names; callers ask it first.
    """
    missing = what_is_not_covered(kernel, state, tokens, causal=True)
    if missing is not None:
        raise ValueError(f"the TPU kernel does not cover {missing}")
    chunk = chunk_of(tokens.queries.shape[3]) if chunk_size is None else chunk_size
    sizes = _Sizes(float(kernel.scale), chunk, interpret)
    inputs = _Inputs(kernel.arrays.features, state.far, tokens.queries, tokens.keys, tokens.values)
    # Within a shard_map, devices share some of them; their gradients are summed once, outside the kernel.
    inputs = vary_like(tokens.keys, inputs)
    far, out = _attend(sizes, inputs, tokens.segments)
    return state._replace(far=far), out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(sizes: _Sizes, inputs: _Inputs, segments: Int[Array, "b n"]) -> tuple[FarState, Array]:
    batch, length, heads, group, _ = inputs.queries.shape
    pad = lambda x: jnp.pad(x, [(0, 0), (0, -length % sizes.chunk)] + [(0, 0)] * (x.ndim - 2))
    segments = pad(segments)
    of_chunk, before, after = _segments_of_chunks(segments, inputs.far.segment, sizes.chunk)
    c, z, S, out = _call(
        sizes,
        inputs,
        (before, of_chunk),
        jnp.moveaxis(pad(inputs.queries), 1, 3),
        jnp.moveaxis(pad(inputs.keys), 1, 2),
        jnp.moveaxis(pad(inputs.values), 1, 2),
        segments,
    )
    far = FarState(c[:, :, 0], z[:, :, 0], jnp.swapaxes(S, 2, 3), after)
    return far, jnp.moveaxis(out, 3, 1)[:, :length].reshape(batch, length, heads, group, -1)


def _segments_of_chunks(
    segments: Int[Array, "b n"], first: Int[Array, "b"], chunk: int
) -> tuple[Int[Array, "b c"], Int[Array, "b c"], Int[Array, "b"]]:
    """Per chunk, its last segment (0: padding only) and that of the far state before it; and the last far state's."""
    ids = segments.reshape(segments.shape[0], -1, chunk)
    places = jnp.where(ids != 0, jnp.arange(chunk, dtype=jnp.int32)[None, None], -1)
    last = jnp.argmax(places, axis=-1, keepdims=True)  # the first one where all are padding, which is 0
    of_chunk = jnp.take_along_axis(ids, last, axis=-1)[..., 0]

    # The newest segment at or before each chunk, the state's own in front.
    known = jnp.concatenate([first[:, None], of_chunk], axis=1)
    newest = jax.lax.cummax(jnp.where(known != 0, jnp.arange(known.shape[1], dtype=jnp.int32)[None], 0), axis=1)
    held = jnp.take_along_axis(known, newest, axis=1)
    return of_chunk, held[:, :-1], held[:, -1]


def _call(
    sizes: _Sizes, inputs: _Inputs, scalars: tuple[Array, Array], q: Array, k: Array, v: Array, segments: Array
) -> Any:
    """(c, z, S^T, out) of the padded tokens, heads in front."""
    batch, heads, group, length, dim = q.shape
    value_dim, chunk = v.shape[-1], sizes.chunk
    w, geometry, log_weights = inputs.features
    features = w.shape[1]
    far = inputs.far
    per_head = [w.astype(q.dtype)]
    per_head += [] if geometry is None else [geometry.astype(q.dtype)]
    per_head += [] if log_weights is None else [log_weights.astype(jnp.float32)[:, None]]
    states = [far.key_max[:, :, None], far.normalizer[:, :, None], jnp.swapaxes(far.values, 2, 3)]

    of_tokens = lambda *shape: pl.BlockSpec((1, 1, *shape), lambda b, h, n, *_: (b, h, *(0,) * (len(shape) - 2), n, 0))
    of_head = [pl.BlockSpec((1, *x.shape[1:]), lambda b, h, n, *_: (h, 0, 0)) for x in per_head]
    of_state = [pl.BlockSpec((1, 1, *x.shape[2:]), lambda b, h, n, *_: (b, h, 0, 0)) for x in states]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(batch, heads, length // chunk),
        in_specs=[
            of_tokens(group, chunk, dim),
            of_tokens(chunk, dim),
            of_tokens(chunk, value_dim),
            pl.BlockSpec((1, chunk, 1), lambda b, h, n, *_: (b, n, 0)),
            pl.BlockSpec((1, 1, chunk), lambda b, h, n, *_: (b, 0, n)),
            *of_state,
            *of_head,
        ],
        out_specs=[*of_state, of_tokens(group, chunk, value_dim)],
        scratch_shapes=[
            pltpu.VMEM(shape, jnp.float32) for shape in ((1, features), (1, features), (value_dim, features))
        ],
    )
    array = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(k).manual_axis_type)
    body = functools.partial(
        _chunk, scale=sizes.scale, has_geometry=geometry is not None, has_weights=log_weights is not None
    )
    return pl.pallas_call(
        body,
        grid_spec=grid,
        out_shape=[array(x.shape, jnp.float32) for x in states]
        + [array((batch, heads, group, length, value_dim), v.dtype)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=_interpreter(k) if sizes.interpret else False,
    )(*scalars, q, k, v, segments[:, :, None], segments[:, None, :], *states, *per_head)


def _interpreter(x: Array) -> Any:
    """What computes a kernel's steps: XLA, or within a shard_map, whose types it does not know, a simulated TPU."""
    return pltpu.InterpretParams() if jax.typeof(x).manual_axis_type.varying else True


def _chunk(before: Any, of_chunk: Any, *refs: Any, scale: float, has_geometry: bool, has_weights: bool) -> None:
    """One chunk: read the far state and the chunk, then fold the chunk in; `chunk_features` for one program."""
    q_ref, k_ref, v_ref, column_ref, row_ref, c_in, z_in, S_in, w_ref, *rest = refs
    geometry_ref = rest.pop(0) if has_geometry else None
    weights_ref = rest.pop(0) if has_weights else None
    c_out, z_out, S_out, out_ref, c, z, S = rest
    index = pl.program_id(2)
    far_segment, own_segment = before[pl.program_id(0), index], of_chunk[pl.program_id(0), index]

    @pl.when(index == 0)
    def _start() -> None:
        c[...], z[...], S[...] = c_in[0, 0], z_in[0, 0], S_in[0, 0]

    _, _, group, size, dim = q_ref.shape
    log = functools.partial(_log_features, w_ref, geometry_ref, weights_ref, scale)
    v, column, row = v_ref[0, 0], column_ref[0], row_ref[0]
    log_q, log_k = log(q_ref[0, 0].reshape(group * size, dim)), log(k_ref[0, 0])
    places = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (size, size), axis)
    visible = (column == row) & (row != 0) & (places(0) >= places(1))
    scores = _scores(log_q, log_k, v.dtype).reshape(group, size, size)
    scores = jnp.where(visible[None], scores, NEG).reshape(group * size, size)
    reads = ((column == far_segment) & (column != 0))[None]
    far_scores = (log_q + c[...]).reshape(group, size, log_q.shape[-1])
    far_scores = jnp.where(reads, far_scores, NEG).reshape(log_q.shape)

    largest = jnp.maximum(jnp.max(far_scores, axis=1, keepdims=True), jnp.max(scores, axis=1, keepdims=True))
    shift = jnp.where(largest > 0.5 * NEG, largest, 0.0)
    far_weights, weights = jnp.exp(far_scores - shift), jnp.exp(scores - shift)
    numerator = _dot(far_weights, S[...], (1, 1), v.dtype) + _dot(weights, v, (1, 0), v.dtype)
    denominator = jnp.sum(far_weights * z[...], axis=1, keepdims=True) + jnp.sum(weights, axis=1, keepdims=True)
    out = numerator / jnp.where(denominator > 0, denominator, 1.0)
    out_ref[0, 0] = out.reshape(group, size, -1).astype(out_ref.dtype)

    to_far = (column == own_segment) & (column != 0)
    chunk_max = jnp.max(jnp.where(to_far, log_k, NEG), axis=0, keepdims=True)
    key_weights = jnp.exp(jnp.where(to_far, log_k - chunk_max, NEG))
    same = (own_segment == far_segment) | (own_segment == 0)
    old_max = jnp.where(same, c[...], NEG)
    new_max = jnp.maximum(old_max, chunk_max)
    keep, add = jnp.where(same, jnp.exp(old_max - new_max), 0.0), jnp.exp(chunk_max - new_max)
    c[...] = new_max
    z[...] = z[...] * keep + jnp.sum(key_weights, axis=0, keepdims=True) * add
    S[...] = S[...] * keep + _dot(v, key_weights, (0, 0), v.dtype) * add

    @pl.when(index == pl.num_programs(2) - 1)
    def _end() -> None:
        c_out[0, 0], z_out[0, 0], S_out[0, 0] = c[...], z[...], S[...]


def _dot(a: Array, b: Array, axes: tuple[int, int], dtype: Any) -> Array:
    """The product over one axis of each, operands rounded to `dtype`, in float32; as `ops.features.matmul`."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    contract = (((axes[0],), (axes[1],)), ((), ()))
    a, b = a.astype(dtype), b.astype(dtype)
    return jax.lax.dot_general(a, b, contract, precision=precision, preferred_element_type=jnp.float32)


def _log_features(w: Any, geometry: Any, log_weights: Any, scale: float, x: Array) -> Float[Array, "n m"]:
    """`log_positive_features` of references to one head's arrays."""
    point = x if geometry is None else _dot(x, geometry[0], (1, 1), x.dtype).astype(x.dtype)
    projected = _dot(point, w[0], (1, 1), x.dtype)
    point = point.astype(jnp.float32)
    logs = scale**0.5 * projected - 0.5 * scale * jnp.sum(point * point, axis=1, keepdims=True)
    return logs if log_weights is None else logs + log_weights[0]


def _scores(log_q: Array, log_k: Array, dtype: Any) -> Float[Array, "n t"]:
    """`feature_scores`."""
    headroom = min(HEADROOM, 0.5 * (80.0 - math.log(log_q.shape[-1])))
    q_max, k_max = jnp.max(log_q, axis=1, keepdims=True), jnp.max(log_k, axis=1, keepdims=True)
    product = _dot(jnp.exp(log_q - (q_max - headroom)), jnp.exp(log_k - (k_max - headroom)), (1, 1), dtype)
    k_row = jnp.broadcast_to(k_max, (k_max.shape[0], LANES)).T[:1]  # whole tiles are what a TPU transposes
    return jnp.log(jnp.maximum(product, math.exp(LOG_FLOOR))) + (q_max + k_row - 2 * headroom)


def _attend_forward(sizes: _Sizes, inputs: _Inputs, segments: Array) -> tuple[tuple[FarState, Array], Any]:
    return _attend(sizes, inputs, segments), (inputs, segments)


def _attend_backward(sizes: _Sizes, saved: tuple[_Inputs, Array], gradient: Any) -> tuple[_Inputs, None]:
    inputs, segments = saved
    _, pull = jax.vjp(lambda inputs: _scan(sizes, inputs, segments), inputs)
    return pull(gradient)[0], None


def _scan(sizes: _Sizes, inputs: _Inputs, segments: Array) -> tuple[FarState, Array]:
    """The same by the scan over chunks."""
    kernel = Kernel(KernelArrays(inputs.features), positive_random_features, sizes.scale)
    tokens = Tokens(inputs.queries, inputs.keys, inputs.values, segments, jnp.zeros_like(segments))
    (batch, heads, features), sizes_of_head = inputs.far.key_max.shape, (inputs.keys.shape[-1], inputs.values.shape[-1])
    state = init_state(batch, heads, *sizes_of_head, features, inputs.keys.dtype)._replace(far=inputs.far)
    state, sums = scan_features(kernel, state, tokens, chunk_size=sizes.chunk, causal=True)
    return state.far, normalize(sums.numerator, sums.denominator).astype(inputs.values.dtype)


_attend.defvjp(_attend_forward, _attend_backward)
