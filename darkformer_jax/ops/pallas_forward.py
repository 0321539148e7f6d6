"""The forward TPU kernel: chunks follow each other and hand the far state (c, z, S^T) on in VMEM."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from darkformer_jax.ops.pallas_chunk import (
    Blocks,
    Has,
    Inputs,
    Sizes,
    dot,
    fold_weights,
    look,
    segments_of_chunks,
    take_refs,
)
from darkformer_jax.ops.state import FarState


class Saved(NamedTuple):
    """The states before each chunk, for the backward pass. S in v's dtype: products take no more of it."""

    c: Float[Array, "b h chunks 1 m"]
    z: Float[Array, "b h chunks 1 m"]
    S: Float[Array, "b h chunks dv m"]


def forward(
    sizes: Sizes, inputs: Inputs, segments: Int[Array, "b n"], *, save: bool
) -> tuple[FarState, Float[Array, "b n h g dv"], Saved | None]:
    """(the far state after the tokens, out in v's dtype, what the backward pass needs if it is to come)."""
    blocks = Blocks(sizes, inputs, last_first=False)
    length = segments.shape[1]
    segments = jnp.pad(segments, [(0, 0), (0, blocks.length - length)])
    of_chunk, before, after = segments_of_chunks(segments, inputs.far.segment, sizes.chunk)
    arrays = [*blocks.tokens(segments), *((x, blocks.of_head(x.shape[1:])) for x in blocks.per_head)]
    far, out, saved = run_forward(blocks, _chunk, (before, of_chunk), arrays, after, save=save)
    return far, blocks.back(out, length), saved


def run_forward(
    blocks: Blocks,
    body: Callable[..., None],
    scalars: Sequence[Int[Array, "b chunks"]],
    arrays: Sequence[tuple[Array, pl.BlockSpec]],
    after: Int[Array, "b"],
    *,
    save: bool,
) -> tuple[FarState, Float[Array, "b h g t dv"], Saved | None]:
    """`body` for every chunk, with the far state after `arrays`: (that after the tokens, out, the states for later).

    after: the segment of the state after the tokens.
    """
    far, dtype, shapes = blocks.inputs.far, blocks.inputs.values.dtype, blocks.state_shapes
    states = [far.key_max[:, :, None], far.normalizer[:, :, None], jnp.swapaxes(far.values, 2, 3)]
    rows = (blocks.batch, blocks.heads)
    outputs: list[Any] = [((*rows, *shape), jnp.float32, blocks.of_row(shape)) for shape in shapes]
    outputs.append(((*rows, blocks.group, blocks.length, blocks.value_dim), dtype, blocks.of_queries(blocks.value_dim)))
    if save:
        dtypes = (jnp.float32, jnp.float32, dtype)
        outputs += [
            ((*rows, blocks.chunks, *shape), kind, blocks.of_chunk(shape))
            for shape, kind in zip(shapes, dtypes, strict=True)
        ]
    of_states = [(x, blocks.of_row(x.shape[2:])) for x in states]
    c, z, S, out, *saved = blocks.call(body, scalars, [*arrays, *of_states], outputs, shapes)
    far = FarState(c[:, :, 0], z[:, :, 0], jnp.swapaxes(S, 2, 3), after)
    return far, out, Saved(*saved) if save else None


def _chunk(before: Any, of_chunk: Any, *refs: Any, scale: float, has: Has) -> None:
    """Reads the far state and the chunk, then folds the chunk in; `chunk_features` for one program."""
    _, chunk, rest = take_refs(refs, scale, has)
    c_in, z_in, S_in, c_out, z_out, S_out, out_ref, *saved, c, z, S = rest
    index = pl.program_id(2)
    place = pl.program_id(0) * pl.num_programs(2) + index
    far_segment, own_segment = before[place], of_chunk[place]

    @pl.when(index == 0)
    def _start() -> None:
        c[...], z[...], S[...] = c_in[0, 0], z_in[0, 0], S_in[0, 0]

    for ref, x in zip(saved, (c, z, S), strict=False):
        ref[0, 0, 0] = x[...].astype(ref.dtype)
    seen, dtype = look(chunk, c[...], z[...], far_segment), chunk.v.dtype
    numerator = dot(seen.far_weights, S[...], (1, 1), dtype) + dot(seen.weights, chunk.v, (1, 0), dtype)
    out_ref[0, 0] = (numerator / seen.denominator).reshape(out_ref.shape[2:]).astype(out_ref.dtype)

    folded = fold_weights(chunk.column, chunk.log_k, chunk.decay, c[...], far_segment, own_segment)
    c[...] = folded.key_max
    z[...] = z[...] * folded.keep + jnp.sum(folded.weights, axis=0, keepdims=True)
    S[...] = S[...] * folded.keep + dot(chunk.v, folded.weights, (0, 0), dtype)

    @pl.when(index == pl.num_programs(2) - 1)
    def _end() -> None:
        c_out[0, 0], z_out[0, 0], S_out[0, 0] = c[...], z[...], S[...]
