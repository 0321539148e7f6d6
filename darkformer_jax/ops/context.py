"""Linear attention over a sequence that is split over devices. Each device has one stretch of it.

Each device summarises its stretch in a far state (c, z, S). One all-gather exchanges the far states; its size does not
depend on the length. Each device then merges the far states of the devices before it, which gives the state that a
single device's scan would have carried there.

With a window, a stretch's first queries see the last `window` tokens of the left neighbour exactly, so the neighbour
sends these tokens. They are summarised by the device that gets them, not by the one that sends them.

Everything runs inside `jax.shard_map`, manual over the axis `axis`. Arrays have the batch in front.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from darkformer_jax.errors import UserError
from darkformer_jax.ops.linear import Kernel, Tokens, document_places, fold
from darkformer_jax.ops.lowering import target_platform
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


def vary_like(x: Array, tree: Tree) -> Tree:
    """`tree`, which shard_map then takes to differ between devices wherever x does.

    What a loop carries must have that type from its start. What a loop reads must have it too: otherwise the gradients
    of arrays that all devices share are summed over the devices in every iteration instead of once after the loop.
    """
    some = x.ravel()[0] == 0
    return jax.tree.map(lambda leaf: jax.lax.select(some, leaf, leaf), tree)


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
    far, sinks = vary_like(tokens.keys, (state.far, state.sinks))
    state = state._replace(far=far, sinks=sinks)
    keys = tokens.recent()
    if window:
        left = _from_left(Recent(*(leaf[:, -window:] for leaf in keys)), axis)
        keys = Recent(*(jnp.concatenate([a, b[:, :-window]], axis=1) for a, b in zip(left, keys, strict=True)))
        blank = Recent(*(jnp.zeros_like(leaf[:, :chunk_size]) for leaf in left))  # the chunk that is being filled
        recent = Recent(*(jnp.concatenate(pair, axis=1) for pair in zip(left, blank, strict=True)))
        state = state._replace(recent=heads_first(recent))
    far, sinks = _merge_before(*_summarize(kernel, state, keys, chunk_size), axis)
    return state._replace(far=far, sinks=sinks)


def _summarize(kernel: Kernel, state: AttentionState, keys: Recent, chunk_size: int) -> tuple[FarState, Sinks]:
    """The far state and the sinks after all of `keys`, from the empty ones in `state`."""
    fold_heads = over_heads(kernel, fold, (FAR_AXES, SINK_AXES, TOKEN_AXES.recent()), (FAR_AXES, SINK_AXES))
    # Recomputed from the keys alone: the backward pass does not keep the sums between chunks.
    summarize = jax.checkpoint(lambda chunk: fold_heads(state.far, state.sinks, chunk), prevent_cse=False)

    def body(carry: tuple[FarState, Sinks], chunk: Recent) -> tuple[tuple[FarState, Sinks], None]:
        far, sinks = carry
        new_far, new_sinks = summarize(chunk)
        return (merge_far(far, new_far), _merge_sinks(sinks, new_sinks, far.segment, new_far.segment)), None

    return jax.lax.scan(body, (state.far, state.sinks), split_chunks(keys, chunk_size))[0]


def _merge_sinks(first: Sinks, second: Sinks, first_segment: Array, second_segment: Array) -> Sinks:
    """Like `merge_far`: the second part's sinks, and the first part's in slots that the second has not filled.

    The first part's count only if both parts are of one segment.
    """
    same = (first_segment == second_segment) | (second_segment == 0)
    found = second.filled[:, None, :, None]
    return Sinks(
        jnp.where(found, second.keys, first.keys),
        jnp.where(found, second.values, first.values),
        (first.filled & same[:, None]) | second.filled,
    )


def _merge_before(far: FarState, sinks: Sinks, axis: str) -> tuple[FarState, Sinks]:
    """Merges what all devices before this one have: far states as `merge_far` does, sinks as `_merge_sinks` does."""
    sums = jnp.concatenate([far.key_max[..., None], far.normalizer[..., None], far.values], axis=-1)
    # Sinks in float32, so that their gradients are summed over the devices in float32.
    wide = (sinks.keys.astype(sums.dtype), sinks.values.astype(sums.dtype), sinks.filled)
    sums, segments, (keys, values, filled) = jax.lax.all_gather((sums, far.segment, wide), axis)  # [devices, b, ...]
    segment, member = _open_before(segments, axis)
    is_member = member[:, :, None, None]
    key_max = jax.lax.stop_gradient(jnp.where(is_member, sums[..., 0], NEG))
    largest = jnp.max(key_max, axis=0)
    weights = jnp.where(is_member, jnp.exp(key_max - largest[None]), 0)
    normalizer = jnp.sum(weights * sums[..., 1], axis=0)
    summed_values = jnp.sum(weights[..., None] * sums[..., 2:], axis=0)
    filled &= member[:, :, None]
    found = filled[:, :, None, :, None]  # a slot's token is on one device
    keys, values = (jnp.sum(jnp.where(found, x, 0), axis=0) for x in (keys, values))
    merged = Sinks(keys.astype(sinks.keys.dtype), values.astype(sinks.values.dtype), jnp.any(filled, axis=0))
    return FarState(largest, normalizer, summed_values, segment), merged


def _open_before(segments: Int[Array, "p b"], axis: str) -> tuple[Int[Array, "b"], Bool[Array, "p b"]]:
    """(the segment that is open where this device's stretch begins, 0 for none; which devices before it end in it)."""
    index = jnp.arange(segments.shape[0])[:, None]
    earlier = (index < jax.lax.axis_index(axis)) & (segments != 0)
    last = jnp.max(jnp.where(earlier, index, -1), axis=0)
    segment = jnp.sum(jnp.where(index == last[None], segments, 0), axis=0, dtype=segments.dtype)
    return segment, earlier & (segments == segment[None])


def gather_sequence(x: Shaped[Array, "b n *rest"], axis: str) -> Shaped[Array, "b t *rest"]:
    """The stretches of all devices, in their order."""
    # XLA's CPU backend aborts on the gradient's sum over devices in bfloat16.
    wide = jnp.float32 if x.dtype == jnp.bfloat16 and target_platform() == "cpu" else x.dtype
    return jax.lax.all_gather(x.astype(wide), axis, axis=1, tiled=True).astype(x.dtype)


def _from_left(recent: Recent, axis: str) -> Recent:
    """The left neighbour's tokens. The first device gets zeros, which are no tokens: their segment is 0."""
    size = jax.lax.axis_size(axis)
    return Recent(*(jax.lax.ppermute(leaf, axis, [(i, i + 1) for i in range(size - 1)]) for leaf in recent))
