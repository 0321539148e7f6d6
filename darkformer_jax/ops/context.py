"""Linear attention over a sequence that is split over devices. Each device has one stretch of it.

Each device summarises its stretch in a far state (c, z, S). One all-gather exchanges the far states; its size does not
depend on the length. Each device then merges the far states of the devices before it, which gives the state that a
single device's scan would have carried there.

With a window, a stretch's first queries see the last `window` tokens of the left neighbour exactly, so the neighbour
sends these tokens. They are summarised by the device that gets them, not by the one that sends them.

Everything runs inside `jax.shard_map`, manual over the axis `axis`. Arrays have the batch in front.
"""

import functools
import operator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from darkformer_jax.errors import UserError
from darkformer_jax.ops.decay import RunningSum, fold_decay, running_sum
from darkformer_jax.ops.linear import Kernel, Tokens, document_places, fold
from darkformer_jax.ops.lowering import dtype_of_sums
from darkformer_jax.ops.scan import FAR_AXES, SINK_AXES, TOKEN_AXES, heads_first, over_heads, split_chunks
from darkformer_jax.ops.state import NEG, AttentionState, FarState, Recent, Sinks, merge_far

Tree = TypeVar("Tree")


def check_stretch(length: int, chunk_size: int, window: int) -> None:
    """Raises UserError where a stretch of `length` tokens per device does not fit the chunks or the window."""
    if window and (length % chunk_size or window > length):
        raise UserError(
            f"each device has {length} tokens of a sequence: with a window that must be a multiple of chunk_size = "
            f"{chunk_size} and at least window = {window}"
        )


def vary_like(x: Any, tree: Tree) -> Tree:
    """`tree`, which shard_map then takes to differ between devices wherever an array of x does.

    What a loop carries must have that type from its start. What a loop reads must have it too: otherwise the gradients
    of arrays that all devices share are summed over the devices in every iteration instead of once after the loop.
    Outside of a shard_map there is nothing to say.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    some = [jnp.sum(leaf.ravel()[:1]) == 0 for leaf in jax.tree.leaves(x)]  # of an empty array, too
    either = functools.reduce(operator.and_, some)
    return jax.tree.map(lambda leaf: jax.lax.select(either, leaf, leaf), tree)


def place_stretch(
    state: AttentionState, segment_ids: Int[Array, "b n"] | None, length: int, axis: str
) -> AttentionState:
    """The empty `state` with the document that is open where this device's stretch begins, and its length so far."""
    if segment_ids is None:
        return state._replace(document_length=state.document_length + jax.lax.axis_index(axis) * length)
    _, *own = jax.vmap(document_places)(segment_ids, state.last_segment, state.document_length)
    last_segments, document_lengths = jax.lax.all_gather(tuple(own), axis)
    segment, member = _open_before(last_segments, axis)
    document_length = jnp.sum(jnp.where(member, document_lengths, 0), axis=0, dtype=jnp.int32)
    return state._replace(last_segment=segment, document_length=document_length)


def state_before(
    kernel: Kernel, state: AttentionState, tokens: Tokens, *, axis: str, chunk_size: int, window: int
) -> AttentionState:
    """What the tokens before this device's stretch leave: `state`, which is empty, filled by the other devices.

    Args:
      kernel: has the arrays of all key/value heads.
      state: gives shapes and dtypes.
      tokens: of the stretch.
      axis: the mesh axis; the device's place on it is the stretch's place in the sequence.
      chunk_size, window: as in `dark_attention`.
    """
    keys = tokens.recent()
    if window:
        left = _from_left(jax.tree.map(lambda leaf: leaf[:, -window:], keys), axis)
        keys = jax.tree.map(lambda a, b: jnp.concatenate([a, b[:, :-window]], axis=1), left, keys)
        blank = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[:, :chunk_size]), left)  # the chunk that is being filled
        recent = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), left, blank)
        state = state._replace(recent=heads_first(recent))
    total = None if keys.decays is None else jnp.sum(keys.decays, axis=1)
    far, sinks = _merge_before(*_summarize(kernel, state, keys, chunk_size), total, axis)
    return state._replace(far=far, sinks=sinks)


def _summarize(kernel: Kernel, state: AttentionState, keys: Recent, chunk_size: int) -> tuple[FarState, Sinks]:
    """The far state and the sinks after all of `keys`, from the empty ones in `state`."""
    axes = (FAR_AXES, SINK_AXES, TOKEN_AXES.recent(), 1)
    fold_heads = over_heads(kernel, _fold_with_sums, axes, (FAR_AXES, SINK_AXES))
    chunks = split_chunks(keys, chunk_size)
    elapsed = None if chunks.decays is None else running_sum(chunks.decays, axis=2)
    # Recomputed from the keys alone: the backward pass does not keep the sums between chunks.
    summarize = jax.checkpoint(lambda *chunk: fold_heads(state.far, state.sinks, *chunk), prevent_cse=False)

    def body(
        carry: tuple[FarState, Sinks], xs: tuple[Recent, RunningSum | None]
    ) -> tuple[tuple[FarState, Sinks], None]:
        far, sinks = carry
        new_far, new_sinks = summarize(*xs)
        decay = None if xs[1] is None else xs[1].value()[:, -1]
        sinks = _merge_sinks(sinks, new_sinks, far.segment, new_far.segment, decay)
        return (merge_far(far, new_far, decay), sinks), None

    return jax.lax.scan(body, (state.far, state.sinks), (chunks, elapsed))[0]


def _fold_with_sums(
    kernel: Kernel, far: FarState, sinks: Sinks, chunk: Recent, elapsed: RunningSum | None
) -> tuple[FarState, Sinks]:
    """`fold` of a chunk with its running decays."""
    return fold(kernel, far, sinks, chunk, fold_decay(elapsed))


def _merge_sinks(
    first: Sinks, second: Sinks, first_segment: Array, second_segment: Array, decay: Float[Array, "b h"] | None
) -> Sinks:
    """Like `merge_far`: the second part's sinks, and the first part's in slots that the second has not filled.

    The first part's count only if both parts are of one segment. `decay` is theirs over the second part.
    """
    same = (first_segment == second_segment) | (second_segment == 0)
    found = second.filled[:, None, :, None]
    decays = None
    if decay is not None and first.decays is not None and second.decays is not None:
        decays = jnp.where(found[..., 0], second.decays, first.decays + decay[..., None])
    return Sinks(
        jnp.where(found, second.keys, first.keys),
        jnp.where(found, second.values, first.values),
        (first.filled & same[:, None]) | second.filled,
        decays,
    )


def _merge_before(far: FarState, sinks: Sinks, total: Float[Array, "b h"] | None, axis: str) -> tuple[FarState, Sinks]:
    """Merges what all devices before this one have: far states as `merge_far` does, sinks as `_merge_sinks` does.

    total: the log decay over this device's stretch.
    """
    sums = jnp.concatenate([far.key_max[..., None], far.normalizer[..., None], far.values], axis=-1)
    # Sinks in float32, so that their gradients are summed over the devices in float32.
    wide = (sinks.keys.astype(sums.dtype), sinks.values.astype(sums.dtype), sinks.filled, sinks.decays)
    gathered = jax.lax.all_gather((sums, far.segment, wide, total), axis)  # [devices, b, ...]
    sums, segments, (keys, values, filled, decays), totals = gathered
    segment, member = _open_before(segments, axis)
    is_member = member[:, :, None, None]
    after = None if totals is None else _decay_after(totals, axis)
    decayed = sums[..., 0] if after is None else sums[..., 0] + after[..., None]
    largest = jax.lax.stop_gradient(jnp.max(jnp.where(is_member, decayed, NEG), axis=0))
    key_max = jax.lax.stop_gradient(sums[..., 0])
    gap = key_max - largest[None] if after is None else (key_max - largest[None]) + after[..., None]
    weights = jnp.where(is_member, jnp.exp(jnp.where(is_member, gap, 0)), 0)
    normalizer = jnp.sum(weights * sums[..., 1], axis=0)
    summed_values = jnp.sum(weights[..., None] * sums[..., 2:], axis=0)
    filled &= member[:, :, None]
    found = filled[:, :, None, :, None]  # a slot's token is on one device
    keys, values = (jnp.sum(jnp.where(found, x, 0), axis=0) for x in (keys, values))
    if after is not None:
        decays = jnp.sum(jnp.where(filled[:, :, None], decays + after[..., None], 0), axis=0)
    merged = Sinks(keys.astype(sinks.keys.dtype), values.astype(sinks.values.dtype), jnp.any(filled, axis=0), decays)
    return FarState(largest, normalizer, summed_values, segment), merged


def _decay_after(totals: Float[Array, "p b h"], axis: str) -> Float[Array, "p b h"]:
    """The log decay from the end of each device's stretch to the start of this device's."""
    index = jnp.arange(totals.shape[0])
    between = (index[None, :] > index[:, None]) & (index[None, :] < jax.lax.axis_index(axis))
    return jnp.einsum("pr,rbh->pbh", between.astype(totals.dtype), totals, precision=jax.lax.Precision.HIGHEST)


def _open_before(segments: Int[Array, "p b"], axis: str) -> tuple[Int[Array, "b"], Bool[Array, "p b"]]:
    """(the segment that is open where this device's stretch begins, 0 for none; which devices before it end in it)."""
    index = jnp.arange(segments.shape[0])[:, None]
    earlier = (index < jax.lax.axis_index(axis)) & (segments != 0)
    last = jnp.max(jnp.where(earlier, index, -1), axis=0)
    segment = jnp.sum(jnp.where(index == last[None], segments, 0), axis=0, dtype=segments.dtype)
    return segment, earlier & (segments == segment[None])


def gather_sequence(x: Shaped[Array, "b n *rest"], axis: str) -> Shaped[Array, "b t *rest"]:
    """The stretches of all devices, in their order."""
    return jax.lax.all_gather(x.astype(dtype_of_sums(x.dtype)), axis, axis=1, tiled=True).astype(x.dtype)


def _from_left(recent: Recent, axis: str) -> Recent:
    """The left neighbour's tokens. The first device gets zeros, which are no tokens: their segment is 0."""
    size = jax.lax.axis_size(axis)
    return jax.lax.ppermute(recent, axis, [(i, i + 1) for i in range(size - 1)])
