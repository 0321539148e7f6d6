"""The backward TPU kernel: chunks from the last to the first, with the gradients of z and S^T handed on in VMEM.

Features are computed again; the states before each chunk are those that the forward pass saved.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.dtypes import float0
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from darkformer_jax.ops import pallas_fast, pallas_safe
from darkformer_jax.ops.decay import RunningSum
from darkformer_jax.ops.features import RandomFeatures
from darkformer_jax.ops.pallas_blocks import Blocks, Has, Inputs, Sizes, directions_of, segments_of_chunks
from darkformer_jax.ops.pallas_chunk import OfChunk, Segments, State, take_refs
from darkformer_jax.ops.pallas_forward import Saved
from darkformer_jax.ops.state import FarState


def backward(
    sizes: Sizes,
    inputs: Inputs,
    segments: Int[Array, "b n"],
    saved: Saved,
    gradient: tuple[FarState, Array],
) -> Inputs:
    """The gradients of `inputs`, from those of the far state after the tokens and of the output."""
    blocks = Blocks(sizes, inputs, last_first=True)
    length = segments.shape[1]
    segments = jnp.pad(segments, [(0, 0), (0, blocks.length - length)])
    of_chunk, before, _ = segments_of_chunks(segments, inputs.far.segment, sizes.chunk)
    far, of_out = gradient
    rows = (blocks.batch, blocks.heads)
    learned = blocks.shapes_of_head
    states = [far.normalizer[:, :, None], jnp.swapaxes(far.values, 2, 3)]
    values = blocks.of_queries(blocks.value_dim)
    widths = (blocks.dim, blocks.value_dim)
    of_keys = [((*rows, blocks.length, width), inputs.keys.dtype, blocks.of_keys(width)) for width in widths]
    of_queries = (*rows, blocks.group, blocks.length, blocks.dim)
    integers: Any = np.zeros(inputs.far.segment.shape, float0)
    decays = inputs.decays
    of_decays = [] if decays is None else [((*rows, 1, blocks.length), jnp.float32, blocks.of_keys_in_a_row(1))]
    dq, dk, dv, *rest = blocks.call(
        _chunk,
        (before, of_chunk),
        [
            *blocks.tokens(segments),
            *((x, blocks.of_head(x.shape[1:])) for x in blocks.per_head),
            *((x, blocks.of_chunk(x.shape[3:])) for x in (saved.rows, saved.S)),
            (saved.inverses, blocks.of_keys_in_a_row(blocks.group)),
            (blocks.in_front(of_out), values),
            *((x, blocks.of_row(x.shape[2:])) for x in states),
        ],
        [
            (of_queries, inputs.queries.dtype, blocks.of_queries(blocks.dim)),
            *of_keys,
            *of_decays,
            *(((*rows, *shape), jnp.float32, blocks.of_row(shape)) for shape in [*blocks.state_shapes, *learned]),
        ],
        [*((2, *shape) for shape in blocks.state_shapes[1:]), *learned],
    )
    if decays is not None:  # the two parts of the sum's value have no derivatives
        decays = RunningSum(jnp.zeros_like(decays.whole), jnp.zeros_like(decays.rest), rest.pop(0)[:, :, 0])
    dc, dz, dS, *of_head = rest
    dq, dk, dv = (blocks.back(x, length) for x in (dq, dk, dv))
    return Inputs(
        of_features(inputs.features, sizes.scale, of_head),
        FarState(dc[:, :, 0], dz[:, :, 0], jnp.swapaxes(dS, 2, 3), integers),
        dq,
        dk,
        dv,
        decays,
    )


def of_features(features: RandomFeatures, scale: float, of_head: list[Array]) -> RandomFeatures:
    """The gradients of w, M and log weights, from `OfHead` of each row of the batch."""
    w, geometry, log_weights = features
    of_directions, *others = [jnp.sum(x, axis=0) for x in of_head]
    _, pull_back = jax.vjp(directions_of, w, geometry)
    of_w, of_geometry = pull_back(math.sqrt(scale) * jnp.swapaxes(of_directions, 1, 2))
    if geometry is not None:
        of_geometry += others.pop(0).astype(geometry.dtype)
    if log_weights is not None:
        log_weights = others.pop(0)[:, 0].astype(log_weights.dtype)
    return RandomFeatures(of_w, of_geometry, log_weights)


class _Given(NamedTuple):
    """References to what the backward kernel gets besides `Blocks.tokens` and `Blocks.per_head`."""

    rows: Any  # of `Saved`
    S: Any
    inverses: Any
    of_out: Any
    of_normalizer: Any  # of the state after the tokens: of z, of S^T
    of_values: Any

    def state(self) -> State:
        """Before the chunk."""
        return State(self.rows[0, 0, 0, 0:1], self.rows[0, 0, 0, 1:2], self.S[0, 0, 0].astype(jnp.float32))

    def arguments(self, of_z: Array, of_S: Array) -> tuple[Any, ...]:
        """What `pallas_fast` and `pallas_safe` want, from the state on."""
        of_out = self.of_out[0, 0].reshape(-1, self.of_out.shape[-1]).astype(jnp.float32)
        return self.state(), of_out, of_z, of_S, self.rows[0, 0, 0, 2:3]


def _chunk(before: Any, of_chunk: Any, *refs: Any, scale: float, has: Has) -> None:
    """The gradients of a chunk, and those of the state before it, which move as the state of the forward kernel does.

    What a chunk adds to the head's gradients is added in the next step: until then, `pallas_safe` may replace it.
    """
    head, chunk, rest = take_refs(refs, scale, has)
    given, (dq, dk, dv, *rest) = _Given(*rest[:6]), rest[6:]
    dG = [rest.pop(0)] if has.decays else []
    (dc_out, dz_out, dS_out), rest = rest[:3], rest[3:]
    count = 1 + has.geometry + has.log_weights
    of_head, (dz, dS), added = rest[:count], rest[count:-count], rest[-count:]
    index = pl.program_id(2)
    place = pl.num_programs(2) - 1 - index
    row = pl.program_id(0) * pl.num_programs(2) + place
    segments = Segments(before[row], of_chunk[row])
    old = jax.lax.rem(index, 2)
    new = 1 - old

    @pl.when(index == 0)
    def _start() -> None:
        dz[0], dS[0] = given.of_normalizer[0, 0], given.of_values[0, 0]
        for ref in (*of_head, *added):
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    def add() -> None:
        for ref, x in zip(of_head, added, strict=True):
            ref[0, 0] += x[...]

    def write(gradients: OfChunk) -> None:
        of_decays = [] if gradients.decays is None else [gradients.decays]
        for ref, x in zip([dq, dk, dv, *dG], [gradients.q, gradients.k, gradients.v, *of_decays], strict=True):
            ref[0, 0] = x.reshape(ref.shape[2:]).astype(ref.dtype)
        dz[new], dS[new] = gradients.z, gradients.S
        for ref, x in zip(added, gradients.head.arrays(), strict=True):
            ref[...] = x

    add()
    inverses = given.inverses[0, 0]
    write(pallas_fast.backward(head, chunk, segments, *given.arguments(dz[old], dS[old]), inverses=inverses))

    @pl.when(jnp.min(inverses) == 0.0)  # the forward pass, too, did this chunk so
    def _again() -> None:
        write(pallas_safe.backward(head, chunk, segments, *given.arguments(dz[old], dS[old])))

    @pl.when(place == 0)
    def _end() -> None:
        dz_out[0, 0], dS_out[0, 0] = dz[new], dS[new]
        _, z, S = given.state()
        dc_out[0, 0] = z * dz[new] + jnp.sum(S * dS[new], axis=0, keepdims=True)
        add()
