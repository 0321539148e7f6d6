"""What every linear attention of this package does with its kernel: state, scan or step, normaliser."""

import functools
import math
import operator
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from darkformer_jax.errors import UserError
from darkformer_jax.ops.context import check_stretch, place_stretch, state_before, vary_like
from darkformer_jax.ops.decay import decay_per_token
from darkformer_jax.ops.features import accumulator_dtype
from darkformer_jax.ops.linear import (
    Kernel,
    Sums,
    Tokens,
    document_places,
    shift_window,
    step_features,
    step_window,
)
from darkformer_jax.ops.lowering import TPU_TILE, target_platform
from darkformer_jax.ops.parallel import parallel_chunks, parallel_feature_chunks
from darkformer_jax.ops.scan import (
    SUM_AXES,
    TOKEN_AXES,
    over_heads,
    scan_chunks,
    scan_feature_chunks,
    scan_features,
    scan_window,
)
from darkformer_jax.ops.state import HEAD_AXES, AttentionState, init_state

Backend = Literal["scan", "parallel", "pallas", "pallas_interpret"]


class Options(NamedTuple):
    """How a kernel is used; see `dark_attention`."""

    causal: bool
    chunk_size: int
    window: int
    num_sinks: int
    return_state: bool
    sequence_axis: str | None
    backend: Backend

    @classmethod
    def of(
        cls,
        causal: bool,
        chunk_size: int,
        window: int,
        num_sinks: int,
        return_state: bool,
        sequence_axis: str | None,
        backend: Backend,
    ) -> "Options":
        """The options with Python's integers. Raises UserError for a number that is none."""
        numbers = {"chunk_size": chunk_size, "window": window, "num_sinks": num_sinks}
        for name, number in numbers.items():
            try:
                numbers[name] = operator.index(number)
            except TypeError as error:
                raise UserError(f"{name} = {number!r}: allowed: an integer, static under jit") from error
        return cls(causal, **numbers, return_state=return_state, sequence_axis=sequence_axis, backend=backend)


def attend(
    kernel: Kernel,
    q: Float[Array, "b n hq d"],
    k: Float[Array, "b n hkv d"],
    v: Float[Array, "b n hkv dv"],
    segment_ids: Int[Array, "b n"] | None,
    log_decay: Float[Array, "..."] | None,
    state: AttentionState | None,
    options: Options,
) -> Any:
    """The output, or (output, state), for arguments that are checked; see `dark_attention`.

    `kernel` has the arrays of all key/value heads.

    Raises:
      UserError: for a state of other sizes than these inputs have.
    """
    batch, length, num_heads, dim = q.shape
    num_kv_heads, value_dim = v.shape[2:]
    num_features = _count_features(kernel, k)
    decays = None if log_decay is None else decay_per_token(log_decay, batch, length, q.dtype)
    if segment_ids is not None:
        segment_ids = segment_ids.astype(jnp.int32)
        # Padding may hold anything, NaN included, and 0 * NaN would reach the sums and the gradients.
        real = (segment_ids != 0)[:, :, None, None]
        q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
        decays = None if decays is None else jnp.where(real[..., 0], decays, 0)
    resumed = state is not None
    if state is None:
        _, chunk_size, window, num_sinks, *_ = options
        sizes = (num_kv_heads, dim, value_dim, num_features)
        state = init_state(batch, *sizes, q.dtype, chunk_size, window, num_sinks, decays is not None)
    elif state.far.values.shape[1:] != (num_kv_heads, num_features, value_dim):
        raise UserError(
            f"the state was made for [kv heads, features, value size] = {state.far.values.shape[1:]}; "
            f"these inputs have {(num_kv_heads, num_features, value_dim)}"
        )
    if not length:
        out = jnp.zeros((batch, 0, num_heads, value_dim), v.dtype)
        return (out, state) if options.return_state else out
    if options.sequence_axis is not None:
        state = place_stretch(state, segment_ids, length, options.sequence_axis)
    state, arrays, decays = vary_like(k, (state, kernel.arrays, decays))
    kernel = kernel._replace(arrays=arrays)
    state, segments, positions = _place_tokens(state, segment_ids, length)
    grouped = q.reshape(batch, length, num_kv_heads, group_size(q, k), dim)
    tokens = Tokens(grouped, k, v, segments, positions, decays)
    # A kernel's grid may not be empty.
    if options.backend.startswith("pallas") and not (resumed and length == 1) and min(q.size, v.size):
        state, out = _by_kernel(kernel, state, tokens, options, resumed)
    else:
        state, sums = _scan_or_step(kernel, state, tokens, options, resumed)
        out = normalize(sums.numerator, sums.denominator)
    out = out.reshape(batch, length, num_heads, value_dim).astype(v.dtype)
    return (out, state) if options.return_state else out


def _count_features(kernel: Kernel, k: Array) -> int:
    """m: the size of what the feature map returns for one token."""
    token = jax.ShapeDtypeStruct((k.shape[0], *k.shape[2:]), k.dtype)
    return jax.eval_shape(over_heads(kernel, Kernel.log_features, (0,), 0), token).shape[-1]


def _place_tokens(
    state: AttentionState, segment_ids: Array | None, length: int
) -> tuple[AttentionState, Int[Array, "b n"], Int[Array, "b n"]]:
    """(the state with its document as it is after the tokens, each token's segment, its place in its document)."""
    if segment_ids is None:  # all in the document that the state is in
        last_segment = jnp.maximum(state.last_segment, 1)
        segment_ids = jnp.broadcast_to(last_segment[:, None], (*last_segment.shape, length))
        positions = state.document_length[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]
        document_length = state.document_length + length
    else:
        # Each layer of a model asks for this, and XLA computes it once: it moves out of the scan over layers.
        positions, last_segment, document_length = jax.vmap(document_places)(
            segment_ids, state.last_segment, state.document_length
        )
    return state._replace(last_segment=last_segment, document_length=document_length), segment_ids, positions


def _scan_or_step(
    kernel: Kernel, state: AttentionState, tokens: Tokens, options: Options, resumed: bool
) -> tuple[AttentionState, Sums]:
    """(the state after the tokens, their sums), by a one-token step or a scan over chunks, with a window or without."""
    causal, chunk_size, window, _, return_state, axis, backend = options
    if axis is not None:
        state = state_before(kernel, state, tokens, axis=axis, chunk_size=chunk_size, window=window)
    if resumed and tokens.segments.shape[1] == 1:
        step = functools.partial(step_window, chunk_size=chunk_size) if window else step_features
        state, sums = over_heads(kernel, step, (HEAD_AXES, TOKEN_AXES), (HEAD_AXES, SUM_AXES))(state, tokens)
        return _shift_full_windows(kernel, state, chunk_size) if window else state, sums
    parallel = backend == "parallel"
    if window:
        over_chunks = parallel_chunks if parallel else scan_chunks
        return scan_window(
            kernel,
            state,
            tokens,
            chunk_size=chunk_size,
            resumed=resumed,
            return_state=return_state,
            over_chunks=over_chunks,
        )
    over_features = parallel_feature_chunks if parallel else scan_feature_chunks
    return scan_features(kernel, state, tokens, chunk_size=chunk_size, causal=causal, over_chunks=over_features)


def _by_kernel(
    kernel: Kernel, state: AttentionState, tokens: Tokens, options: Options, resumed: bool
) -> tuple[AttentionState, Float[Array, "b n h g v"]]:
    """(the state after the tokens, out) by the TPU kernels. Raises UserError for what they do not cover."""
    from darkformer_jax.ops import pallas_tpu  # which takes a while to import, and imports this module

    missing = pallas_tpu.what_is_not_covered(kernel, tokens, causal=options.causal, window=options.window)
    held = state.recent.keys.dtype
    if missing is None and held != tokens.keys.dtype:
        missing = f"a state of {held} with inputs of {tokens.keys.dtype}"
    if missing is not None:
        raise UserError(f"backend = {options.backend!r} does not cover {missing}: use backend = 'scan'")
    # A kernel's arrays have one type: heads of q may be split where those of k are not.
    state, tokens, arrays = vary_like(tokens, (state, tokens, kernel.arrays))
    kernel = kernel._replace(arrays=arrays)
    interpret = options.backend == "pallas_interpret"
    if options.window:
        state, sums = scan_window(
            kernel,
            state,
            tokens,
            chunk_size=options.chunk_size,
            resumed=resumed,
            return_state=options.return_state,
            over_chunks=functools.partial(pallas_tpu.attend_chunks, interpret=interpret),
        )
        return state, normalize(sums.numerator, sums.denominator)
    return pallas_tpu.attend_features(
        kernel, state, tokens, chunk_size=options.chunk_size if interpret else None, interpret=interpret
    )


def _shift_full_windows(kernel: Kernel, state: AttentionState, chunk_size: int) -> AttentionState:
    """`shift_window`, run only when a sequence needs it: once per chunk_size tokens."""
    shift = over_heads(kernel, functools.partial(shift_window, chunk_size=chunk_size), (HEAD_AXES,), HEAD_AXES)
    return jax.lax.cond(jnp.any(state.fill == chunk_size), shift, lambda old: old, state)


def normalize(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator; 0 for queries that see nothing (padding). Any other denominator is at least 1."""
    inverse = 1 / jnp.where(denominator > 0, denominator, 1)
    # einsum, because the gradient of a broadcast division is slow on XLA's CPU backend.
    return jnp.einsum("...v,...->...v", numerator, inverse, precision=jax.lax.Precision.HIGHEST)


def as_arrays(*values: Any) -> tuple[Any, ...]:
    """JAX arrays of arrays that may be numpy's: float64 becomes float32 unless x64 is on. None stays None."""
    return tuple(None if value is None else jnp.asarray(value) for value in values)


def scale_of(scale: Any, q: Array) -> Any:
    """The scale of the logits, d^-0.5 for None: a Python number or, if it is traced, one of the logits' dtype.

    Either keeps the logits' dtype, which a number of numpy's would not. Raises UserError where it is not a number that
    a kernel of positive features can have.
    """
    if scale is None:
        return q.shape[-1] ** -0.5
    if np.shape(scale):
        raise UserError(f"scale has shape {np.shape(scale)}; expected one number")
    if isinstance(scale, jax.core.Tracer):
        return scale.astype(accumulator_dtype(q.dtype))
    try:
        number = float(scale)
    except (TypeError, ValueError) as error:
        raise UserError(f"scale = {scale!r}: expected one real number") from error
    if not 0 <= number < math.inf:
        raise UserError(f"scale = {number:g}: allowed: finite and at least 0")
    return number


def group_size(q: Array, k: Array) -> int:
    """The query heads of each key/value head; 0 where there are no heads."""
    return q.shape[2] // max(k.shape[2], 1)


def check_inputs(q: Array, k: Array, v: Array, segment_ids: Array | None) -> None:
    """Raises UserError where shapes or dtypes do not fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise UserError(f"{name} has shape {x.shape}; expected [batch, length, heads, size]")
    if k.shape != (*q.shape[:2], k.shape[2], q.shape[3]) or v.shape[:3] != k.shape[:3]:
        raise UserError(
            f"q {q.shape}, k {k.shape} and v {v.shape} do not fit: [B, L, Hq, d], [B, L, Hkv, d], [B, L, Hkv, dv]"
        )
    if not q.shape[3]:
        raise UserError(f"q has shape {q.shape}: the size of a head must be at least 1")
    if group_size(q, k) * k.shape[2] != q.shape[2]:
        raise UserError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads")
    if len({q.dtype, k.dtype, v.dtype}) > 1 or q.dtype not in (jnp.bfloat16, jnp.float32, jnp.float64):
        raise UserError(
            f"q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}; they must share one of bfloat16, float32, "
            "float64 (sums over features exceed what float16 holds)"
        )
    if segment_ids is not None and segment_ids.shape != q.shape[:2]:
        raise UserError(f"segment_ids have shape {segment_ids.shape}; expected {q.shape[:2]}")
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer) and segment_ids.dtype != bool:
        raise UserError(f"segment_ids have dtype {segment_ids.dtype}; allowed: integers or bool")


def check_options(q: Array, options: Options, log_decay: Array | None, state: AttentionState | None) -> None:
    """Raises UserError where the options, the state and the length do not fit together."""
    causal, chunk_size, window, num_sinks, return_state, sequence_axis, backend = options
    if backend not in get_args(Backend):
        raise UserError(f"backend = {backend!r}: allowed: {', '.join(get_args(Backend))}")
    if backend == "pallas" and target_platform() != "tpu":
        raise UserError(f"backend = 'pallas' is a TPU kernel; this program is for a {target_platform()}: use 'scan'")
    if backend.startswith("pallas") and sequence_axis is not None:
        raise UserError(f"backend = {backend!r} does not cover sequence_axis = {sequence_axis!r}: use backend = 'scan'")
    if backend == "pallas" and window and chunk_size % TPU_TILE:
        raise UserError(
            f"chunk_size = {chunk_size}: backend = 'pallas' with a window takes multiples of {TPU_TILE}, "
            "backend = 'scan' any"
        )
    if backend == "parallel" and not causal:
        raise UserError("backend = 'parallel' does not cover causal=False: use backend = 'scan'")
    if chunk_size < 1:
        raise UserError(f"chunk_size = {chunk_size} must be positive")
    if window < 0 or window % chunk_size:
        raise UserError(f"window = {window} must be 0 or a multiple of chunk_size = {chunk_size}")
    if num_sinks < 0 or (num_sinks and not window):
        raise UserError(f"num_sinks = {num_sinks} with window = {window}: sinks need a window")
    if not causal and (window or state is not None or return_state):
        raise UserError("causal=False works with features everywhere: without a window, a state or return_state")
    if state is not None and state.recent.segments.shape[-1] != (window + chunk_size if window else 0):
        raise UserError(f"the state was made with another window or chunk_size than {window} and {chunk_size}")
    if state is not None and (state.fill.shape != q.shape[:1] or state.sinks.filled.shape[-1] != num_sinks):
        raise UserError(f"the state was made for another batch or num_sinks than {q.shape[0]} and {num_sinks}")
    if state is not None and window and (state.recent.decays is None) != (log_decay is None):
        made, called = ("without", "with") if state.recent.decays is None else ("with", "without")
        raise UserError(f"the state was made {made} log_decay, and this call is {called} it (init_state: has_decay)")
    if sequence_axis is not None:
        if not causal or state is not None or return_state:
            raise UserError("sequence_axis needs causal=True, and neither takes nor returns a state")
        check_stretch(q.shape[1], chunk_size, window)
