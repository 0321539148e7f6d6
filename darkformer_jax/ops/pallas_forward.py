"""The forward TPU kernel: chunks follow each other and hand the far state (c, z, S^T) on in VMEM."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from darkformer_jax.ops import pallas_fast, pallas_safe
from darkformer_jax.ops.pallas_blocks import Blocks, Has, Inputs, Sizes, segments_of_chunks
from darkformer_jax.ops.pallas_chunk import Segments, State, take_refs
from darkformer_jax.ops.state import NEG, FarState


class Saved(NamedTuple):
    """What the backward pass needs. S in v's dtype, as products take it."""

    rows: Float[Array, "b h chunks 3 m"]  # c and z before each chunk, c after it: together, for a block costs time
    S: Float[Array, "b h chunks dv m"]  # before each chunk
    inverses: Float[Array, "b h g t"]  # of `pallas_fast.After`; zeros where `pallas_safe` did a chunk


def forward(
    sizes: Sizes, inputs: Inputs, segments: Int[Array, "b n"], *, save: bool
) -> tuple[FarState, Float[Array, "b n h g dv"], Saved | None]:
    """(the far state after the tokens, out in v's dtype, what the backward pass needs if it is to come)."""
    blocks = Blocks(sizes, inputs, last_first=False)
    length = segments.shape[1]
    segments = jnp.pad(segments, [(0, 0), (0, blocks.length - length)])
    of_chunk, before, after = segments_of_chunks(segments, inputs.far.segment, sizes.chunk)
    arrays = [*blocks.tokens(segments), *((x, blocks.of_head(x.shape[1:])) for x in blocks.per_head)]
    scratch = [(2, *shape) for shape in (*blocks.state_shapes, blocks.state_shapes[0])]
    inverses = (blocks.batch, blocks.heads, blocks.group, blocks.length)
    saved = [
        blocks.output_of_chunks((3, blocks.features), jnp.float32),
        blocks.output_of_chunks((blocks.value_dim, blocks.features), inputs.values.dtype),
        (inverses, jnp.float32, blocks.of_keys_in_a_row(blocks.group)),
    ]
    saved = saved if save else []
    far, out, kept = run_forward(blocks, _chunk, (before, of_chunk), arrays, after, scratch, saved)
    return far, blocks.back(out, length), Saved(*kept) if save else None


def run_forward(
    blocks: Blocks,
    body: Callable[..., None],
    scalars: Sequence[Int[Array, "b chunks"]],
    arrays: Sequence[tuple[Array, pl.BlockSpec]],
    after: Int[Array, "b"],
    scratch: Sequence[tuple[int, ...]],
    saved: Sequence[Any],
) -> tuple[FarState, Float[Array, "b h g t dv"], list[Array]]:
    """`body` for every chunk, with the far state after `arrays`: (that after the tokens, out, what is saved).

    after: the segment of the state after the tokens.
    scratch: shapes.
    saved: outputs besides the state and out, as `Blocks.call` takes them.
    """
    far, dtype, shapes = blocks.inputs.far, blocks.inputs.values.dtype, blocks.state_shapes
    states = [far.key_max[:, :, None], far.normalizer[:, :, None], jnp.swapaxes(far.values, 2, 3)]
    rows = (blocks.batch, blocks.heads)
    outputs: list[Any] = [((*rows, *shape), jnp.float32, blocks.of_row(shape)) for shape in shapes]
    outputs.append(((*rows, blocks.group, blocks.length, blocks.value_dim), dtype, blocks.of_queries(blocks.value_dim)))
    of_states = [(x, blocks.of_row(x.shape[2:])) for x in states]
    c, z, S, out, *kept = blocks.call(body, scalars, [*arrays, *of_states], [*outputs, *saved], scratch)
    far = FarState(c[:, :, 0], z[:, :, 0], jnp.swapaxes(S, 2, 3), after)
    return far, out, kept


def _chunk(before: Any, of_chunk: Any, *refs: Any, scale: float, has: Has) -> None:
    """Reads the far state and the chunk, then folds the chunk in; `chunk_features` for one program.

    The state is in one half of the scratch and goes to the other, so that `pallas_safe` finds it as it was.
    """
    head, chunk, rest = take_refs(refs, scale, has)
    c_in, z_in, S_in, c_out, z_out, S_out, out_ref, *saved, c, z, S, largest = rest
    index, is_last = pl.program_id(2), pl.program_id(2) == pl.num_programs(2) - 1
    place = pl.program_id(0) * pl.num_programs(2) + index
    segments = Segments(before[place], of_chunk[place])
    old = jax.lax.rem(index, 2)
    new = 1 - old

    @pl.when(index == 0)
    def _start() -> None:
        c[0] = jnp.where(c_in[0, 0] > 0.5 * NEG, c_in[0, 0], pallas_fast.first_scale(head, chunk))
        z[0], S[0], largest[0] = z_in[0, 0], S_in[0, 0], c_in[0, 0]

    def write(state: State, out: Float[Array, "gc dv"], inverses: Array) -> None:
        c[new], z[new], S[new] = state
        out_ref[0, 0] = out.reshape(out_ref.shape[2:]).astype(out_ref.dtype)
        if saved:
            saved[-1][0, 0] = inverses

    state = State(c[old], z[old], S[old])
    after = pallas_fast.forward(head, chunk, state, segments, largest[old], is_last)
    if saved:
        for number, x in enumerate((state.c, state.z, after.scales.c)):
            saved[0][0, 0, 0, number : number + 1] = x
        saved[1][0, 0, 0] = state.S.astype(saved[1].dtype)
    largest[new] = after.scales.largest
    write(after.state, after.out, after.inverses)

    @pl.when(jnp.logical_not(after.fits))
    def _again() -> None:
        state = State(c[old], z[old], S[old])
        out, state = pallas_safe.forward(head, chunk, state, segments, c[new])
        write(state, out, jnp.zeros_like(after.inverses))

    @pl.when(is_last)
    def _end() -> None:
        c_out[0, 0], z_out[0, 0], S_out[0, 0] = c[new], z[new], S[new]
