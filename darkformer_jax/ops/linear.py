"""Linear attention of one key/value head and its group of query heads, chunk by chunk or one token at a time.

Everything here is for one sequence and one key/value head; `over_heads` maps it over heads and batch. With
a_i = l_i(q) + c_i for the far keys, s_j for the keys that are seen one by one, and r the larger of their maxima,

    out = [ sum_i exp(a_i - r) S_i + sum_j exp(s_j - r) v_j ] / [ sum_i exp(a_i - r) z_i + sum_j exp(s_j - r) ]

The denominator is at least one, so it needs no epsilon: either r is some a_i, and z_i >= 1, or it is some s_j. No later
key enters a scale. Without a window s_j is the logarithm of the feature estimate summed over features (the paper's
estimator everywhere); with one it is the exact log kernel + log m, which meets the scale of the feature sums.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from darkformer_jax.ops.decay import (
    FoldDecay,
    RunningSum,
    between,
    fold_decay,
    running_sum,
    to_end,
    with_scale_derivative,
)
from darkformer_jax.ops.features import FeatureMap, accumulator_dtype, apply_geometry, matmul
from darkformer_jax.ops.state import NEG, AttentionState, FarState, Recent, Sinks, merge_far

# In the product of query and key features each side is scaled to a maximum of e^HEADROOM. A pair whose best common
# feature lies up to 2 HEADROOM - LOG_FLOOR = 117 nats under the two separate maxima is exact in float32; one beyond
# that counts as 117 nats under, which is wrong only for a query that sees nothing nearer. A pair's gap is at most the
# smaller of max_i l_i - min_i l_i of the two sides. For random features that is |x| (max w.x/|x| - min w.x/|x|): |Mx|^2
# of about 500 is exact at least. For elu + 1 it is log(1 + max_i x_i) - min_i x_i. The sum of both exponents and log m
# stays under 88, float32's largest, also in the gradient.
HEADROOM = 36.0
LOG_FLOOR = -45.0

WindowKernel = Literal["dark", "softmax"]


class KernelArrays(NamedTuple):
    """The arrays of a kernel; those of all key/value heads have the heads in front."""

    features: Any  # what the feature map reads
    log_gain: Float[Array, "*hkv g"] | None = None  # of each query head, on everything that is seen through features


class Kernel(NamedTuple):
    """One head's kernel: sum_i exp(l_i(q) + l_i(k)) beyond the window, and `log_kernel` within it."""

    arrays: KernelArrays
    feature_map: FeatureMap
    scale: float
    window_kernel: WindowKernel = "dark"
    far_horizon: int = 0  # of `dark_attention`

    def log_features(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch m"]:
        """l_i(x)."""
        features = self.feature_map(self.arrays.features, x, self.scale)
        return features.astype(accumulator_dtype(x.dtype))  # float64 arrays of a map would widen the state

    def log_kernel(self, q: Float[Array, "n g d"], k: Float[Array, "t d"]) -> Float[Array, "n g t"]:
        """What `RandomFeatures` estimate: scale q^T M^T M k + log m. "softmax" has the identity in the place of M."""
        point, geometry = q, self.arrays.features.geometry if self.window_kernel == "dark" else None
        if geometry is not None:
            point = apply_geometry(apply_geometry(q, geometry), geometry.T)
        dots = matmul("ngd,td->ngt", point, k, q.dtype)
        return self.scale * dots + math.log(max(self.arrays.features.projections.shape[0], 1))


class Sums(NamedTuple):
    """Numerator and denominator of an attention output, times e^-log_scale. (0, 0, NEG) where nothing is visible."""

    numerator: Float[Array, "n g dv"]
    denominator: Float[Array, "n g"]
    log_scale: Float[Array, "n g"]


class Tokens(NamedTuple):
    """A stretch of tokens of one head. Segment 0 is padding: not a key, and a query that reads nothing."""

    queries: Float[Array, "n g d"]
    keys: Float[Array, "n d"]
    values: Float[Array, "n dv"]
    segments: Int[Array, "n"]
    positions: Int[Array, "n"]  # in the token's document
    decays: Float[Array, "n"] | None = None  # each token's log decay; None: there is no decay

    def recent(self) -> Recent:
        return Recent(self.keys, self.values, self.segments, self.positions, self.decays)


def feature_scores(
    log_q: Float[Array, "n g m"], log_k: Float[Array, "t m"], dtype: jax.typing.DTypeLike
) -> Float[Array, "n g t"]:
    """log sum_i exp(l_i(q) + l_i(k)), as one matmul.

    Scaled by each query's and each key's own maximum over features, so that no key can push another into underflow.
    """
    headroom = min(HEADROOM, 0.5 * (80.0 - math.log(log_q.shape[-1])))
    q_max = jax.lax.stop_gradient(jnp.max(log_q, axis=-1, keepdims=True))
    k_max = jax.lax.stop_gradient(jnp.max(log_k, axis=-1, keepdims=True))
    logs = _log_product(dtype, log_q - (q_max - headroom), log_k - (k_max - headroom))
    return logs + (q_max + k_max[None, None, :, 0] - 2 * headroom)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_product(
    dtype: jax.typing.DTypeLike, log_q: Float[Array, "n g m"], log_k: Float[Array, "t m"]
) -> Float[Array, "n g t"]:
    """log max(P, e^LOG_FLOOR), P = sum_i exp(l_i(q) + l_i(k)), where e^HEADROOM is the largest of either side.

    The gradient needs dL/dP = dL/dlog P / P. P is up to m e^(2 HEADROOM), so that the quotient is no normal float32
    unless dL/dlog P is above 1e-6, which it is not where a loss is a mean over many tokens. So the quotients are scaled
    as far up as their products with features allow.
    """
    return _log_product_forward(dtype, log_q, log_k)[0]


def _log_product_forward(dtype: Any, log_q: Array, log_k: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    q, k = jnp.exp(log_q), jnp.exp(log_k)
    product = matmul("ngm,tm->ngt", q, k, dtype)
    return jnp.log(jnp.maximum(product, math.exp(LOG_FLOOR))), (q, k, product)


def _log_product_backward(dtype: Any, saved: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, Array]:
    q, k, product = saved
    above = product > math.exp(LOG_FLOOR)
    gradient, product = jnp.where(above, gradient, 0), jnp.where(above, product, 1)
    # The largest quotient becomes e^-LOG_FLOOR, unless its product with both features, e^scale dL/dlog P, passes e^75.
    log_quotient = _log_largest(gradient * math.exp(30.0) / product) - 30.0
    log_scale = jnp.minimum(75.0 - _log_largest(gradient), -LOG_FLOOR - log_quotient)
    quotients = _times_exp(gradient, log_scale, product)
    to_q = q * matmul("ngt,tm->ngm", quotients, k, dtype)
    to_k = k * matmul("ngt,ngm->tm", quotients, q, dtype)
    return _times_exp(to_q, -log_scale), _times_exp(to_k, -log_scale)


def _log_largest(x: Array) -> Float[Array, ""]:
    """log max |x|; 0 where all are 0."""
    largest = jnp.max(jnp.abs(x), initial=0)
    return jnp.log(jnp.where(largest > 0, largest, 1))


def _times_exp(x: Array, exponent: Float[Array, ""], divisor: Array | None = None) -> Array:
    """x e^exponent / divisor, where e^exponent alone may be no float32. The barrier keeps XLA from forming it."""
    half = jnp.exp(0.5 * exponent)
    x = x * half if divisor is None else x * half / divisor
    return jax.lax.optimization_barrier(x) * half


_log_product.defvjp(_log_product_forward, _log_product_backward)


def weighted_sums(
    far_scores: Float[Array, "n g m"],
    far: FarState,
    scores: Float[Array, "n g t"],
    values: Float[Array, "t dv"],
) -> Sums:
    """Sums over the far keys and t single ones. `NEG` scores are invisible."""
    dtype = values.dtype
    row_max = jnp.maximum(jnp.max(far_scores, axis=-1, initial=NEG), jnp.max(scores, axis=-1, initial=NEG))
    row_max = jax.lax.stop_gradient(row_max)
    shift = jnp.where(row_max > 0.5 * NEG, row_max, 0.0)[..., None]
    far_weights = jnp.exp(far_scores - shift)
    weights = jnp.exp(scores - shift)
    numerator = matmul("ngm,mv->ngv", far_weights, far.values, dtype) + matmul("ngt,tv->ngv", weights, values, dtype)
    denominator = matmul("ngm,m->ng", far_weights, far.normalizer, far.normalizer.dtype) + jnp.sum(weights, axis=-1)
    return Sums(numerator, denominator, row_max)


def merge_sums(first: Sums, second: Sums) -> Sums:
    """Adds the sums over two disjoint sets of keys."""
    log_scale = jnp.maximum(first.log_scale, second.log_scale)
    scale1, scale2 = jnp.exp(first.log_scale - log_scale), jnp.exp(second.log_scale - log_scale)
    return Sums(
        first.numerator * scale1[..., None] + second.numerator * scale2[..., None],
        first.denominator * scale1 + second.denominator * scale2,
        log_scale,
    )


def fold(
    kernel: Kernel,
    far: FarState,
    sinks: Sinks,
    chunk: Recent,
    decay: FoldDecay | None,
    log_k: Float[Array, "c m"] | None = None,
) -> tuple[FarState, Sinks]:
    """Adds a chunk's last segment to the far state and to the sinks, which forget every segment before it."""
    summary = summarize(kernel, chunk, decay, sinks.filled.shape[0], log_k)
    return add_summary(far, sinks, summary, chunk, decay)


def summarize(
    kernel: Kernel, chunk: Recent, decay: FoldDecay | None, num_sinks: int, log_k: Float[Array, "c m"] | None = None
) -> FarState:
    """The far state of a chunk's last segment alone, without its sinks."""
    log_k = kernel.log_features(chunk.keys) if log_k is None else log_k
    if decay is not None:
        log_k = log_k + decay.keys[:, None]
    last = last_nonzero(chunk.segments)
    segment = jnp.where(last >= 0, chunk.segments[last], 0)
    to_far = (_members(chunk, segment) & (chunk.positions >= num_sinks))[:, None]

    key_max = jax.lax.stop_gradient(jnp.max(jnp.where(to_far, log_k, NEG), axis=0))
    weights = jnp.exp(jnp.where(to_far, log_k - key_max[None, :], NEG))
    dtype = chunk.values.dtype
    return FarState(key_max, jnp.sum(weights, axis=0), matmul("cm,cv->mv", weights, chunk.values, dtype), segment)


def add_summary(
    far: FarState, sinks: Sinks, summary: FarState, chunk: Recent, decay: FoldDecay | None
) -> tuple[FarState, Sinks]:
    """The far state and the sinks after a chunk that `summarize` has seen."""
    if num_sinks := sinks.filled.shape[0]:
        segment = summary.segment
        is_sink = _members(chunk, segment) & (chunk.positions < num_sinks)
        sinks = _fold_sinks(sinks, chunk, decay, is_sink, (segment == far.segment) | (segment == 0))
    far = merge_far(far, summary, None if decay is None else decay.state)
    if decay is not None and decay.of_all is not None:
        z, S = (with_scale_derivative(x, decay.of_all) for x in (far.normalizer, far.values))
        far = far._replace(normalizer=z, values=S)
    return far, sinks


def _members(chunk: Recent, segment: Int[Array, ""]) -> Bool[Array, "c"]:
    return (chunk.segments == segment) & (chunk.segments != 0)


def _fold_sinks(
    sinks: Sinks, chunk: Recent, decay: FoldDecay | None, is_sink: Bool[Array, "c"], same: Bool[Array, ""]
) -> Sinks:
    own = jnp.arange(sinks.filled.shape[0], dtype=jnp.int32)[:, None] == chunk.positions[None, :]
    slot = own & is_sink[None, :]  # [s, c], one-hot rows
    found = jnp.any(slot, axis=1)
    decays = None
    if decay is not None and sinks.decays is not None:
        decays = jnp.where(found, _pick(slot, decay.keys), sinks.decays + decay.state)
        if decay.of_all is not None:
            decays = decays + (decay.of_all - jax.lax.stop_gradient(decay.of_all))
    return Sinks(
        keys=jnp.where(found[:, None], _pick(slot, chunk.keys), sinks.keys),
        values=jnp.where(found[:, None], _pick(slot, chunk.values), sinks.values),
        filled=(sinks.filled & same) | found,
        decays=decays,
    )


def _pick(one_hot: Bool[Array, "s c"], x: Float[Array, "c *d"]) -> Float[Array, "s *d"]:
    """The rows of x that `one_hot` marks, exactly: by default accelerators would round them in the product."""
    return jnp.matmul(one_hot.astype(x.dtype), x, precision=jax.lax.Precision.HIGHEST)


def last_nonzero(segments: Int[Array, "n"]) -> Int[Array, ""]:
    """Index of the last token that is not padding; -1 where all are."""
    return jnp.max(jnp.where(segments != 0, jnp.arange(segments.shape[0], dtype=jnp.int32), -1), initial=-1)


def document_places(
    segment_ids: Int[Array, "n"], last_segment: Int[Array, ""], document_length: Int[Array, ""]
) -> tuple[Int[Array, "n"], Int[Array, ""], Int[Array, ""]]:
    """Each token's place in its document, and the last document's id and length so far. Padding takes no place."""
    real = segment_ids != 0
    latest = jax.lax.cummax(jnp.where(real, jnp.arange(segment_ids.shape[0], dtype=jnp.int32), -1))
    latest = jnp.concatenate([jnp.full(1, -1, latest.dtype), latest[:-1]])  # the real token before each
    before = jnp.where(latest >= 0, segment_ids[latest], last_segment)
    ones = real.astype(jnp.int32)
    count = jnp.cumsum(ones) - ones  # real tokens before each
    starts = jnp.where(real & (segment_ids != before), count, -document_length)
    positions = count - jax.lax.cummax(starts)
    last = last_nonzero(segment_ids)
    return (
        positions,
        jnp.where(last >= 0, segment_ids[last], last_segment),
        jnp.where(last >= 0, positions[last] + 1, document_length),
    )


def read_far(
    kernel: Kernel,
    queries: Array,
    segments: Array,
    far: FarState,
    decay: Float[Array, "n"] | None,
    log_q: Array | None = None,
) -> Float[Array, "n g m"]:
    """a_i = l_i(q) + c_i + decay (+ the head's log gain), invisible to queries of another segment.

    decay: from the end of the far state to each query, with `log_far_weight` if there is a horizon.
    """
    log_q = kernel.log_features(queries) if log_q is None else log_q
    if decay is not None:
        log_q = log_q + decay[:, None, None]
    if kernel.arrays.log_gain is not None:
        log_q = log_q + kernel.arrays.log_gain.astype(log_q.dtype)[None, :, None]
    reads = (segments == far.segment) & (segments != 0)
    return jnp.where(reads[:, None, None], log_q + far.key_max[None, None, :], NEG)


def exact_sums(
    kernel: Kernel,
    tokens: Tokens,
    far: FarState,
    sinks: Sinks,
    near: Recent,
    visible: Bool[Array, "n t"],
    queries: RunningSum | None,
    elapsed: RunningSum | None,
) -> Sums:
    """`weighted_sums` of the far state and of sinks and near keys with their exact kernel.

    queries, elapsed: the running decays of the queries and of the near keys, from the end of the far state.
    """
    sees_sinks = (tokens.segments == far.segment)[:, None] & sinks.filled[None, :] & (tokens.segments != 0)[:, None]
    keys = jnp.concatenate([sinks.keys, near.keys])
    values = jnp.concatenate([sinks.values, near.values])
    mask = jnp.concatenate([sees_sinks, visible], axis=1)[:, None, :]
    scores, since = kernel.log_kernel(tokens.queries, keys), None
    if queries is not None and elapsed is not None and sinks.decays is not None:
        since = queries.value()
        decays = jnp.concatenate([since[:, None] + sinks.decays[None, :], between(queries, elapsed)], axis=1)
        scores = scores + decays[:, None, :]
    scores = jnp.where(mask, scores, NEG)
    if kernel.far_horizon:
        bound = log_far_weight(kernel.far_horizon, tokens.positions.astype(scores.dtype))
        since = bound if since is None else since + bound
    return weighted_sums(read_far(kernel, tokens.queries, tokens.segments, far, since), far, scores, values)


def log_far_weight(horizon: int, places: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
    """min(0, log(horizon / n)) of the n-th token: the total weight of its far keys stays that of `horizon` tokens."""
    return jnp.minimum(0.0, math.log(horizon) - jnp.log(jnp.maximum(places + 1, 1)))


def same_segment(query_segments: Int[Array, "*b n"], key_segments: Int[Array, "*b t"]) -> Bool[Array, "*b n t"]:
    """Which keys belong to the query's document; padding belongs to none."""
    return (query_segments[..., :, None] == key_segments[..., None, :]) & (key_segments != 0)[..., None, :]


def chunk_features(
    kernel: Kernel,
    far: FarState,
    sinks: Sinks,
    tokens: Tokens,
    visible: Bool[Array, "n n"],
    queries: RunningSum | None,
    elapsed: RunningSum | None,
) -> tuple[FarState, Sums]:
    """One chunk with features everywhere: read the far state and the chunk, then fold the chunk in.

    queries, elapsed: the running decays of the chunk, as those of queries and of keys.
    """
    log_q, log_k = kernel.log_features(tokens.queries), kernel.log_features(tokens.keys)
    sums = feature_sums(kernel, far, tokens, visible, queries, elapsed, log_q, log_k)
    far, _ = fold(kernel, far, sinks, tokens.recent(), fold_decay(elapsed), log_k)
    return far, sums


def feature_sums(
    kernel: Kernel,
    far: FarState,
    tokens: Tokens,
    visible: Bool[Array, "n n"],
    queries: RunningSum | None,
    elapsed: RunningSum | None,
    log_q: Float[Array, "n g m"],
    log_k: Float[Array, "n m"],
) -> Sums:
    """`weighted_sums` of the far state and of the chunk's own keys, with the estimate of the kernel for both."""
    scores, since = feature_scores(log_q, log_k, tokens.values.dtype), None
    if queries is not None and elapsed is not None:
        since = queries.value()
        apart = between(queries, elapsed)
        if elapsed.of_keys is None:  # not causal; by place, because |x| has no derivative where a decay is 0
            apart = jnp.where(jnp.tri(apart.shape[0], dtype=bool), apart, -apart)
        scores = scores + apart[:, None, :]
    scores = jnp.where(visible[:, None, :], scores, NEG)
    far_scores = read_far(kernel, tokens.queries, tokens.segments, far, since, log_q)
    return weighted_sums(far_scores, far, scores, tokens.values)


def chunk_window(
    kernel: Kernel,
    far: FarState,
    sinks: Sinks,
    recent: Recent,
    tokens: Tokens,
    visible: Bool[Array, "n t"],
    queries: RunningSum | None,
    elapsed: RunningSum | None,
) -> tuple[FarState, Sinks, Recent, Sums]:
    """One chunk of the hybrid: window and own chunk exact, then the window's oldest chunk moves to the far state.

    queries, elapsed: the running decays of the chunk's queries, and of the keys of the window and the chunk.
    """
    size = tokens.segments.shape[0]
    near = join_recent(recent, tokens.recent())
    sums = exact_sums(kernel, tokens, far, sinks, near, visible, queries, elapsed)
    decay = None if elapsed is None else to_end(elapsed.cut(0, size))
    far, sinks = fold(kernel, far, sinks, slice_recent(near, 0, size), decay)
    return far, sinks, slice_recent(near, size, None), sums


def step_features(kernel: Kernel, state: AttentionState, token: Tokens) -> tuple[AttentionState, Sums]:
    """One token with features everywhere: fold it in, then read."""
    decay = None if token.decays is None else to_end(running_sum(token.decays))
    far, _ = fold(kernel, state.far, state.sinks, token.recent(), decay)
    scores = read_far(kernel, token.queries, token.segments, far, None)
    empty = jnp.full((*scores.shape[:-1], 0), NEG, scores.dtype)
    return state._replace(far=far), weighted_sums(scores, far, empty, token.values[:0])


def step_window(kernel: Kernel, state: AttentionState, token: Tokens, chunk_size: int) -> tuple[AttentionState, Sums]:
    """One token of the hybrid. The caller calls `shift_window` once the chunk is full."""
    # Padding takes no slot: it is written where the next token will overwrite it, and its segment makes it invisible.
    slot = state.recent.segments.shape[0] - chunk_size + state.fill
    recent = write_recent(state.recent, token.recent(), slot)
    visible = same_segment(token.segments, recent.segments)
    elapsed = None if recent.decays is None else running_sum(recent.decays)
    # Slots after the token's hold no decay, so the sum over all slots is the token's.
    query = None if elapsed is None else elapsed.cut(-1, None)
    sums = exact_sums(kernel, token, state.far, state.sinks, recent, visible, query, elapsed)
    real = (token.segments[0] != 0).astype(jnp.int32)
    return state._replace(recent=recent, fill=state.fill + real), sums


def shift_window(kernel: Kernel, state: AttentionState, chunk_size: int) -> AttentionState:
    """Where the chunk that is being filled is full, the window's oldest chunk moves to the far state."""
    full = state.fill == chunk_size
    oldest = slice_recent(state.recent, 0, chunk_size)
    decay = None if oldest.decays is None else to_end(running_sum(oldest.decays))
    far, sinks = fold(kernel, state.far, state.sinks, oldest, decay)
    blank = jax.tree.map(jnp.zeros_like, oldest)
    shifted = state._replace(
        far=far,
        sinks=sinks,
        recent=join_recent(slice_recent(state.recent, chunk_size, None), blank),
        fill=jnp.zeros_like(state.fill),
    )
    return jax.tree.map(lambda new, old: jnp.where(full, new, old), shifted, state)


def join_recent(first: Recent, second: Recent) -> Recent:
    """Concatenates along tokens."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b.astype(a.dtype)]), first, second)


def slice_recent(recent: Recent, start: int, stop: int | None) -> Recent:
    """Tokens start:stop."""
    return jax.tree.map(lambda leaf: leaf[start:stop], recent)


def write_recent(recent: Recent, new: Recent, start: Int[Array, ""]) -> Recent:
    """Overwrites the tokens from `start` on."""
    return jax.tree.map(
        lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), start, axis=0), recent, new
    )
