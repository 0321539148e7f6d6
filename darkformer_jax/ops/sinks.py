"""The sinks of the hybrid as every chunk finds them, without a scan: for a kernel that takes all chunks at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from darkformer_jax.ops.pallas_blocks import held_segments, last_segments
from darkformer_jax.ops.state import Recent, Sinks


class PlacedSinks(NamedTuple):
    """The sinks before each of n chunks, and after the last."""

    keys: Float[Array, "b n1 h s d"]
    values: Float[Array, "b n1 h s dv"]
    segments: Int[Array, "b n1 s"]  # 0 where a sink is not there

    def after_all(self) -> Sinks:
        """Those of the state after the chunks."""
        return Sinks(self.keys[:, -1], self.values[:, -1], self.segments[:, -1] != 0)


def place_sinks(sinks: Sinks, far_segment: Int[Array, "b"], leaving: Recent, chunk: int) -> PlacedSinks:
    """What `linear.fold` makes of the sinks, chunk by chunk. There is no decay.

    Args:
      sinks, far_segment: before the first chunk.
      leaving: [b, n c, ...], the blocks that leave the window after chunk 0, 1, ...; segments 0 where none does.
    """
    batch, length = leaving.segments.shape
    chunks, num_sinks = length // chunk, sinks.filled.shape[1]
    own = last_segments(leaving.segments, chunk)
    before, after = held_segments(own, far_segment)
    blocks = jax.tree.map(lambda leaf: leaf.reshape(batch, chunks, chunk, *leaf.shape[2:]), leaving)
    member = (blocks.segments == own[:, :, None]) & (blocks.segments != 0)
    slots = jnp.arange(num_sinks, dtype=jnp.int32)[None, None, :, None] == blocks.positions[:, :, None]
    slots &= member[:, :, None]

    # 0 is the state before the first chunk, i + 1 is block i.
    number = jnp.arange(1, chunks + 1, dtype=jnp.int32)
    newest = lambda there, number: jnp.pad(jax.lax.cummax(jnp.where(there, number, 0), axis=1), _FIRST[there.ndim])
    found = newest(jnp.any(slots, axis=3), number[None, :, None])
    start = newest((own != 0) & (own != before), number[None])  # of the segment that the far state has
    filled = (found >= start[:, :, None]) & ((found > 0) | sinks.filled[:, None])
    held = jnp.concatenate([before, after[:, None]], axis=1)

    def pick(old: Array, new: Array) -> Array:
        # Exactly: by default accelerators would round the rows in the product.
        rows = jnp.einsum("bnsc,bnchd->bnhsd", slots.astype(new.dtype), new, precision=jax.lax.Precision.HIGHEST)
        rows = jnp.concatenate([old[:, None].astype(new.dtype), rows], axis=1)
        return jnp.take_along_axis(rows, found[:, :, None, :, None], axis=1)

    keys, values = pick(sinks.keys, blocks.keys), pick(sinks.values, blocks.values)
    return PlacedSinks(keys, values, jnp.where(filled, held[:, :, None], 0))


_FIRST = {2: ((0, 0), (1, 0)), 3: ((0, 0), (1, 0), (0, 0))}  # a row of zeros in front of axis 1
