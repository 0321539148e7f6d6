"""`dark_attention`: random-feature linear attention with a learned geometry, for use in any JAX model."""

import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from darkformer_jax.errors import UserError
from darkformer_jax.ops.context import check_stretch, place_stretch, state_before, vary_like
from darkformer_jax.ops.linear import (
    KernelArrays,
    Tokens,
    WindowKernel,
    document_places,
    shift_window,
    step_features,
    step_window,
)
from darkformer_jax.ops.scan import SUM_AXES, TOKEN_AXES, Heads, scan_features, scan_window
from darkformer_jax.ops.state import HEAD_AXES, AttentionState, empty_state


def dark_attention(
    q: Float[Array, "b n hq d"],
    k: Float[Array, "b n hkv d"],
    v: Float[Array, "b n hkv dv"],
    *,
    projections: Float[Array, "*hkv m r"] | None,
    geometry: Float[Array, "*hkv r d"] | None = None,
    causal: bool = True,
    segment_ids: Int[Array, "b n"] | None = None,
    scale: float | None = None,
    chunk_size: int = 128,
    window: int = 0,
    num_sinks: int = 0,
    window_kernel: WindowKernel = "dark",
    log_weights: Float[Array, "*hkv m"] | None = None,
    log_gain: Float[Array, "hq"] | None = None,
    state: AttentionState | None = None,
    return_state: bool = False,
    sequence_axis: str | None = None,
) -> Any:
    """Attention with the kernel exp(scale q^T M^T M k), estimated by m positive random features in O(n m) time.

        out_n = sum_j kappa(q_n, k_j) v_j / sum_j kappa(q_n, k_j),
        kappa(q, k) ~ 1/m sum_i exp(w_i.Mq' - |Mq'|^2/2) exp(w_i.Mk' - |Mk'|^2/2),  x' = sqrt(scale) x

    (DARKFormer, arXiv 2603.04127; with M = I it is Performer, arXiv 2009.14794.) With a window, a query sees its own
    chunk up to itself, the `window` tokens before that chunk and the first `num_sinks` tokens of its document through
    the exact kernel, and the rest through the features, under one normaliser.

    Args:
      q: queries. Each group of hq / hkv consecutive query heads shares one key/value head, its features and its state.
      k: keys.
      v: values.
      projections: w, see `draw_projections`; [m, r] is used for every head. None leaves the window and the sinks alone.
      geometry: M; None is the identity.
      causal: a query sees no later token. False (features only) sees all of its segment.
      segment_ids: document of each token, in contiguous stretches; tokens see only their own. 0 is padding, whose
        output is 0. None: one document. A window's chunks are the row's, so which keys of a packed document are
        seen exactly depends on the place in its chunk where the document starts.
      scale: of the logits; None is d^-0.5.
      chunk_size: tokens that are treated at once. With a window it also defines what is exact.
      window: 0 for features everywhere, else a multiple of chunk_size.
      num_sinks: needs a window.
      window_kernel: what the window and the sinks are seen through: "dark", the kernel that the features estimate, or
        "softmax", exp(scale q^T k), which pretrained weights expect; it needs a window.
      log_weights: half of the importance weight of each projection that was not drawn from N(0, I); see
        `ops.proposals.transform_projections`.
      log_gain: per query head, added to the logarithm of everything that is seen through features; needs a window.
      state: continues the sequences that `state` has seen; the options must be those it was made with.
      return_state: also returns the state after the last token. Padding at the end leaves no trace in it.
      sequence_axis: within `jax.shard_map`, the mesh axis over which the sequence is split: q, k, v and segment_ids are
        this device's stretch, and out its part of what a single device computes of the whole. The devices exchange
        their far states, windows and sinks, whose size does not depend on the length, and nothing else.

    Returns:
      out [b, n, hq, dv] in v's dtype, or (out, state).

    Raises:
      UserError: for shapes or options that do not fit together.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    _check_shapes(q, k, v, segment_ids)
    _check_options(q, causal, chunk_size, window, num_sinks, state, return_state)
    _check_window_options(q, window, window_kernel, log_gain)
    if sequence_axis is not None:
        if not causal or state is not None or return_state:
            raise UserError("sequence_axis needs causal=True, and neither takes nor returns a state")
        check_stretch(q.shape[1], chunk_size, window)
    arrays = _per_head(projections, geometry, log_weights, log_gain, k, window)
    num_features = arrays.projections.shape[-2]
    batch, length, num_heads, dim = q.shape
    num_kv_heads, value_dim = v.shape[2:]
    if segment_ids is not None:
        segment_ids = segment_ids.astype(jnp.int32)
        # Padding may hold anything, NaN included, and 0 * NaN would reach the sums and the gradients.
        real = (segment_ids != 0)[:, :, None, None]
        q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
    resumed = state is not None
    if state is None:
        state = init_state(batch, num_kv_heads, dim, value_dim, num_features, q.dtype, chunk_size, window, num_sinks)
    elif state.far.values.shape[1:] != (num_kv_heads, num_features, value_dim):
        raise UserError(
            f"the state was made for [kv heads, features, value size] = {state.far.values.shape[1:]}; "
            f"these inputs have {(num_kv_heads, num_features, value_dim)}"
        )
    if sequence_axis is not None:
        state = place_stretch(state, segment_ids, length, sequence_axis)
        arrays = vary_like(k, arrays)
    if segment_ids is None:  # all in the document that the state is in
        last_segment = jnp.maximum(state.last_segment, 1)
        segment_ids = jnp.broadcast_to(last_segment[:, None], (batch, length))
        positions = state.document_length[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]
        document_length = state.document_length + length
    else:
        positions, last_segment, document_length = jax.vmap(document_places)(
            segment_ids, state.last_segment, state.document_length
        )
    state = state._replace(last_segment=last_segment, document_length=document_length)
    grouped = q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, dim)
    tokens = Tokens(grouped, k, v, segment_ids, positions)
    heads = Heads(arrays, scale, window_kernel)
    if sequence_axis is not None:
        state = state_before(heads, state, tokens, axis=sequence_axis, chunk_size=chunk_size, window=window)

    if resumed and length == 1:
        step = functools.partial(step_window, chunk_size=chunk_size) if window else step_features
        state, sums = heads.map(step, (HEAD_AXES, TOKEN_AXES), (HEAD_AXES, SUM_AXES))(state, tokens)
        if window:
            state = _shift_full_windows(heads, state, chunk_size)
    elif window:
        state, sums = scan_window(
            heads, state, tokens, chunk_size=chunk_size, resumed=resumed, return_state=return_state
        )
    else:
        state, sums = scan_features(heads, state, tokens, chunk_size=chunk_size, causal=causal)
    out = _normalize(sums.numerator, sums.denominator).reshape(batch, length, num_heads, value_dim).astype(v.dtype)
    return (out, state) if return_state else out


def init_state(
    batch: int,
    num_kv_heads: int,
    key_dim: int,
    value_dim: int,
    num_features: int,
    dtype: jnp.dtype,
    chunk_size: int = 128,
    window: int = 0,
    num_sinks: int = 0,
) -> AttentionState:
    """The state of `batch` sequences that have seen nothing. `dtype` is that of q, k and v; sums are in float32."""
    head = empty_state(
        num_features=num_features,
        key_dim=key_dim,
        value_dim=value_dim,
        recent=window + chunk_size if window else 0,
        num_sinks=num_sinks,
        dtype=dtype,
    )
    heads = jax.vmap(lambda _: head, out_axes=HEAD_AXES, axis_size=num_kv_heads, in_axes=None)(None)
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (batch, *leaf.shape)), heads)


def _shift_full_windows(heads: Heads, state: AttentionState, chunk_size: int) -> AttentionState:
    """`shift_window` when any sequence needs it: once in chunk_size tokens, not at every one."""
    shift = heads.map(functools.partial(shift_window, chunk_size=chunk_size), (HEAD_AXES,), HEAD_AXES)
    return jax.lax.cond(jnp.any(state.fill == chunk_size), shift, lambda old: old, state)


def _normalize(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, which is at least one but for queries that see nothing (padding): those get zero."""
    inverse = 1 / jnp.where(denominator > 0, denominator, 1)
    # einsum, because the gradient of a broadcast division is slow on XLA's CPU backend.
    return jnp.einsum("...v,...->...v", numerator, inverse, precision=jax.lax.Precision.HIGHEST)


def _check_shapes(q: Array, k: Array, v: Array, segment_ids: Array | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise UserError(f"{name} has shape {x.shape}; expected [batch, length, heads, size]")
    if k.shape != (*q.shape[:2], k.shape[2], q.shape[3]) or v.shape[:3] != k.shape[:3]:
        raise UserError(
            f"q {q.shape}, k {k.shape} and v {v.shape} do not fit: [B, L, Hq, d], [B, L, Hkv, d], [B, L, Hkv, dv]"
        )
    if q.shape[2] % k.shape[2]:
        raise UserError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads")
    if not q.shape[1]:
        raise UserError("the sequence is empty: length must be at least 1")
    if len({q.dtype, k.dtype, v.dtype}) > 1 or q.dtype not in (jnp.bfloat16, jnp.float32, jnp.float64):
        raise UserError(
            f"q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}; they must share one of bfloat16, float32, "
            "float64 (sums over features exceed what float16 holds)"
        )
    if segment_ids is not None and segment_ids.shape != q.shape[:2]:
        raise UserError(f"segment_ids have shape {segment_ids.shape}; expected {q.shape[:2]}")


def _check_options(
    q: Array,
    causal: bool,
    chunk_size: int,
    window: int,
    num_sinks: int,
    state: AttentionState | None,
    return_state: bool,
) -> None:
    if chunk_size < 1 or window < 0 or window % chunk_size:
        raise UserError(
            f"window = {window} must be 0 or a multiple of chunk_size = {chunk_size}, which must be positive"
        )
    if num_sinks < 0 or (num_sinks and not window):
        raise UserError(f"num_sinks = {num_sinks} with window = {window}: sinks need a window")
    if not causal and (window or state is not None or return_state):
        raise UserError("causal=False works with features everywhere: without a window, a state or return_state")
    if state is not None and state.recent.segments.shape[-1] != (window + chunk_size if window else 0):
        raise UserError(f"the state was made with another window or chunk_size than {window} and {chunk_size}")
    if state is not None and (state.fill.shape != q.shape[:1] or state.sinks.filled.shape[-1] != num_sinks):
        raise UserError(f"the state was made for another batch or num_sinks than {q.shape[0]} and {num_sinks}")


def _check_window_options(q: Array, window: int, window_kernel: str, log_gain: Array | None) -> None:
    if window_kernel not in get_args(WindowKernel):
        raise UserError(f"window_kernel = {window_kernel!r}: allowed: {', '.join(get_args(WindowKernel))}")
    if not window and (window_kernel != "dark" or log_gain is not None):
        raise UserError("window_kernel and log_gain set what is seen exactly off from the rest: they need window > 0")
    if log_gain is not None and log_gain.shape != q.shape[2:3]:
        raise UserError(f"log_gain has shape {log_gain.shape}; expected one number a query head, {q.shape[2:3]}")


def _per_head(
    projections: Array | None,
    geometry: Array | None,
    log_weights: Array | None,
    log_gain: Array | None,
    k: Array,
    window: int,
) -> KernelArrays:
    """Projections [Hkv, m, r] (m = 0 for None), and geometry [Hkv, r, d], weights [Hkv, m], gains [Hkv, g] or None."""
    num_kv_heads, dim = k.shape[2:]
    if log_gain is not None:
        log_gain = log_gain.reshape(num_kv_heads, -1)
    if geometry is not None:
        if geometry.shape[-1] != dim or geometry.ndim not in (2, 3):
            raise UserError(f"geometry has shape {geometry.shape}; expected [r, {dim}] or [{num_kv_heads}, r, {dim}]")
        if geometry.ndim == 3 and geometry.shape[0] not in (1, num_kv_heads):
            raise UserError(f"geometry is for {geometry.shape[0]} heads; there are {num_kv_heads} key/value heads")
        geometry = jnp.broadcast_to(geometry, (num_kv_heads, *geometry.shape[-2:]))
    rank = dim if geometry is None else geometry.shape[-2]
    if projections is None:
        if not window:
            raise UserError("projections=None leaves only the window to attend to: it needs window > 0")
        if log_weights is not None:
            raise UserError("log_weights are of projections; projections=None")
        return KernelArrays(jnp.zeros((num_kv_heads, 0, rank), jnp.float32), geometry, None, log_gain)
    if projections.shape[-1] != rank or projections.ndim not in (2, 3) or not projections.shape[-2]:
        raise UserError(
            f"projections have shape {projections.shape}; expected [m, {rank}] or [{num_kv_heads}, m, {rank}]"
        )
    if projections.ndim == 3 and projections.shape[0] not in (1, num_kv_heads):
        raise UserError(f"projections are for {projections.shape[0]} heads; there are {num_kv_heads} key/value heads")
    if log_weights is not None:
        if log_weights.shape != projections.shape[:-1]:
            raise UserError(f"log_weights have shape {log_weights.shape}; expected {projections.shape[:-1]}")
        log_weights = jnp.broadcast_to(log_weights, (num_kv_heads, log_weights.shape[-1]))
    projections = jnp.broadcast_to(projections, (num_kv_heads, *projections.shape[-2:]))
    return KernelArrays(projections, geometry, log_weights, log_gain)
