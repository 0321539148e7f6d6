"""`dark_attention`: random-feature linear attention with a learned geometry, for use in any JAX model."""

from typing import Any, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from darkformer_jax.errors import UserError
from darkformer_jax.ops.attend import (
    Backend,
    Options,
    as_arrays,
    attend,
    check_inputs,
    check_options,
    group_size,
    scale_of,
)
from darkformer_jax.ops.decay import check_log_decay
from darkformer_jax.ops.features import RandomFeatures, positive_random_features
from darkformer_jax.ops.linear import Kernel, KernelArrays, WindowKernel
from darkformer_jax.ops.state import AttentionState, init_state

__all__ = ["dark_attention", "init_state"]


def dark_attention(
    q: Float[Array, "b n hq d"],
    k: Float[Array, "b n hkv d"],
    v: Float[Array, "b n hkv dv"],
    *,
    projections: Float[Array, "... m r"] | None,
    geometry: Float[Array, "... r d"] | None = None,
    causal: bool = True,
    segment_ids: Int[Array, "b n"] | None = None,
    scale: float | None = None,
    chunk_size: int = 128,
    window: int = 0,
    num_sinks: int = 0,
    window_kernel: WindowKernel = "dark",
    log_weights: Float[Array, "... m"] | None = None,
    log_gain: Float[Array, "hq"] | None = None,
    far_horizon: int = 0,
    log_decay: Float[Array, "hkv"] | Float[Array, "b n hkv"] | None = None,
    state: AttentionState | None = None,
    return_state: bool = False,
    sequence_axis: str | None = None,
    backend: Backend = "scan",
) -> Any:
    """Attention with the kernel exp(scale q^T M^T M k), estimated by m positive random features in O(n m) time.

        out_n = sum_j kappa(q_n, k_j) v_j / sum_j kappa(q_n, k_j),
        kappa(q, k) ~ 1/m sum_i exp(w_i.Mq' - |Mq'|^2/2) exp(w_i.Mk' - |Mk'|^2/2),  x' = sqrt(scale) x

    (DARKFormer, arXiv 2603.04127; with M = I it is Performer, arXiv 2009.14794.) With a window, a query sees some keys
    through the exact kernel: its own chunk up to itself, the `window` tokens before that chunk, and the first
    `num_sinks` tokens of its document. It sees the rest through the features. One normaliser covers both.

    Args:
      q: queries. Each group of hq / hkv consecutive query heads shares one key/value head, its features and its state.
      k: keys.
      v: values.
      projections: w, see `draw_projections`; [m, r] serves every head. None: only the window and the sinks are seen.
      geometry: M; None is the identity.
      causal: True: a query sees no later token. False: it sees its whole document; needs window = 0.
      segment_ids: document of each token, in contiguous stretches; tokens see only their own. 0 is padding, whose
        output is 0. None: one document. Chunks begin with the row, not with a document: which keys of a packed
        document the window shows depends on where in a chunk the document begins.
      scale: of the logits, at least 0; None is d^-0.5.
      chunk_size: tokens per chunk. With a window it decides what is exact; without one it changes only the cost.
      window: 0 for features everywhere, else a multiple of chunk_size.
      num_sinks: first tokens of each document that are seen exactly; needs a window.
      window_kernel: the exact kernel: "dark", which the features estimate, or "softmax", exp(scale q^T k), which
        pretrained weights expect; needs a window.
      log_weights: half of the importance weight of each projection that was not drawn from N(0, I); see
        `ops.theory.proposals.transform_projections`.
      log_gain: one number per query head, added to the log weight of all that is seen through features; needs a window.
      far_horizon: the n-th token of a document gives all that it sees through features min(1, far_horizon / n) of its
        weight: their sum stops growing where the document gets longer than that, and is a mean. Without it, features
        that were fitted to shorter documents outweigh the window in longer ones. 0: no bound; else needs a window.
      log_decay: g <= 0, per key/value head or per token and head. The kernel, the exact one included, is multiplied by
        exp(g_{j+1} + ... + g_n): a key loses weight with every token of its document that comes after it. -slope is
        ALiBi's (arXiv 2108.12409), a constant is RetNet's, log sigmoid(...) of the token a gate. Without causality a
        later key loses weight likewise, exp(g_{n+1} + ... + g_j). Values below -1000 count as -1000. First derivatives
        in it are exact; second ones are not supported.
      state: of the tokens before these, from `init_state` or an earlier call with the same options.
      return_state: also returns the state after the last token. Padding at the end leaves no trace in it.
      sequence_axis: within `jax.shard_map`, the mesh axis over which the sequence is split. q, k, v, segment_ids and a
        log_decay per token are this device's stretch; out is this stretch of what one device would compute. The devices
        exchange far states, windows, sinks and sums of decays, in messages that do not grow with the length.
      backend: "scan" works everywhere. "parallel" computes the same for all chunks of 8,192 tokens at once: in few and
        large programs, for GPUs, with more memory; it needs causality. "pallas" is a TPU kernel for causal attention,
        and one for its gradients: features stay in the chip's fast memory. Without a window it chooses its own chunks;
        with one it takes no log_decay, and a chunk_size that is a multiple of 16. It takes no float64, sequence_axis or
        traced scale, and has first derivatives only. "pallas_interpret" runs the kernels' steps on any device, slowly,
        for tests.

    Returns:
      out [b, n, hq, dv] in v's dtype, or (out, state).

    Raises:
      UserError: for shapes or options that do not fit together.
    """
    options = Options.of(causal, chunk_size, window, num_sinks, return_state, sequence_axis, backend)
    q, k, v, segment_ids = as_arrays(q, k, v, segment_ids)
    projections, geometry, log_weights, log_gain = as_arrays(projections, geometry, log_weights, log_gain)
    state = jax.tree.map(jnp.asarray, state)
    check_inputs(q, k, v, segment_ids)
    check_options(q, options, log_decay, state)
    if log_decay is not None:
        check_log_decay(log_decay, k, segment_ids)
    kernel = feature_kernel(
        q,
        k,
        projections=projections,
        geometry=geometry,
        scale=scale,
        window=options.window,
        window_kernel=window_kernel,
        log_weights=log_weights,
        log_gain=log_gain,
        far_horizon=far_horizon,
    )
    return attend(kernel, q, k, v, segment_ids, log_decay, state, options)


def feature_kernel(
    q: Float[Array, "b p hq d"],
    k: Float[Array, "b n hkv d"],
    *,
    projections: Float[Array, "... m r"] | None,
    geometry: Float[Array, "... r d"] | None,
    scale: float | None,
    window: int,
    window_kernel: WindowKernel,
    log_weights: Float[Array, "... m"] | None = None,
    log_gain: Float[Array, "hq"] | None,
    far_horizon: int = 0,
) -> Kernel:
    """The kernel of all key/value heads that `dark_attention` uses; its docstring explains the arguments.

    Raises:
      UserError: for shapes or options that do not fit together.
    """
    _check_window_options(q, window, window_kernel, log_gain, far_horizon)
    if log_gain is not None:
        log_gain = log_gain.reshape(k.shape[2], group_size(q, k))
    arrays = _kernel_arrays(projections, geometry, log_weights, log_gain, k, window)
    return Kernel(arrays, positive_random_features, scale_of(scale, q), window_kernel, far_horizon)


def _check_window_options(q: Array, window: int, window_kernel: str, log_gain: Array | None, horizon: int) -> None:
    if window_kernel not in get_args(WindowKernel):
        raise UserError(f"window_kernel = {window_kernel!r}: allowed: {', '.join(get_args(WindowKernel))}")
    if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 0:
        raise UserError(f"far_horizon = {horizon!r}: must be a whole number, 0 or more")
    if not window and (window_kernel != "dark" or log_gain is not None or horizon):
        raise UserError(
            "window_kernel, log_gain and far_horizon treat the window unlike the rest: they need window > 0"
        )
    if log_gain is not None and log_gain.shape != q.shape[2:3]:
        raise UserError(f"log_gain has shape {log_gain.shape}; expected one number per query head, {q.shape[2:3]}")


def _kernel_arrays(
    projections: Array | None,
    geometry: Array | None,
    log_weights: Array | None,
    log_gain: Array | None,
    k: Array,
    window: int,
) -> KernelArrays:
    """The arrays with heads in front: w [Hkv, m, r] (m = 0 for None), M [Hkv, r, d], weights [Hkv, m], gains [Hkv, g].

    All but w may be None.
    """
    num_kv_heads, dim = k.shape[2:]
    if geometry is not None:
        if geometry.shape[-1] != dim or geometry.ndim not in (2, 3):
            raise UserError(f"geometry has shape {geometry.shape}; expected [r, {dim}] or [{num_kv_heads}, r, {dim}]")
        if geometry.ndim == 3 and geometry.shape[0] not in (1, num_kv_heads):
            raise UserError(f"geometry is for {geometry.shape[0]} heads; there are {num_kv_heads} key/value heads")
        geometry = jnp.broadcast_to(geometry, (num_kv_heads, *geometry.shape[-2:]))
    rank = dim if geometry is None else geometry.shape[-2]
    if projections is None:
        if not window:
            raise UserError("projections=None: a query then sees only the window, so window must be > 0")
        if log_weights is not None:
            raise UserError("log_weights belong to projections, but projections=None")
        return KernelArrays(RandomFeatures(jnp.zeros((num_kv_heads, 0, rank), jnp.float32), geometry), log_gain)
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
    return KernelArrays(RandomFeatures(projections, geometry, log_weights), log_gain)
