"""How TPU kernels get their arrays: a program of the grid (B, Hkv, chunks) treats one chunk of one key/value head."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from darkformer_jax.errors import UserError
from darkformer_jax.ops.decay import RunningSum
from darkformer_jax.ops.features import RandomFeatures
from darkformer_jax.ops.state import FarState

LANES = 128
LOG2E = math.log2(math.e)  # TPUs have the power of two
VMEM_BYTES = 48 * 2**20  # that a kernel may have: the backward one of many query heads needs more than the usual 16


class Sizes(NamedTuple):
    """What a compiled kernel depends on besides shapes."""

    scale: float
    chunk: int
    interpret: bool


class Inputs(NamedTuple):
    """What has gradients."""

    features: RandomFeatures
    far: FarState
    queries: Float[Array, "b n h g d"]
    keys: Float[Array, "b n h d"]
    values: Float[Array, "b n h dv"]
    decays: RunningSum | None  # [b, h, t], of whole chunks; each chunk's sum begins with its first token


class Has(NamedTuple):
    """Which arrays a call has, of those that it need not have."""

    decays: bool
    geometry: bool
    log_weights: bool


class Blocks:
    """How the arrays of a call are cut into blocks. Heads are in front of tokens, and whole chunks of them.

    Args:
      sizes, inputs: `Sizes` and `Inputs`, or those of `pallas_window`.
      last_first: whether the chunks come in reverse.
    """

    def __init__(self, sizes: Any, inputs: Any, *, last_first: bool) -> None:
        self.sizes, self.inputs = sizes, inputs
        self.batch, length, self.heads, self.group, self.dim = inputs.queries.shape
        self.value_dim, self.features = inputs.values.shape[-1], inputs.features.projections.shape[1]
        self.chunks = -(-length // sizes.chunk)
        self.length = self.chunks * sizes.chunk
        self.last_first = last_first

    def in_front(self, x: Float[Array, "b n *heads d"]) -> Float[Array, "b *heads t d"]:
        """[b, n, heads, d] -> [b, heads, tokens of whole chunks, d]."""
        return jnp.moveaxis(jnp.pad(x, [(0, 0), (0, self.length - x.shape[1])] + [(0, 0)] * (x.ndim - 2)), 1, -2)

    def back(self, x: Float[Array, "b *heads t d"], length: int) -> Float[Array, "b n *heads d"]:
        """The inverse."""
        return jnp.moveaxis(x, -2, 1)[:, :length]

    @property
    def per_head(self) -> list[Array]:
        """The directions sqrt(scale) log2(e) w M, and M and the log weights if there are any."""
        w, geometry, log_weights = self.inputs.features
        dtype, units = self.inputs.queries.dtype, math.sqrt(self.sizes.scale) * LOG2E
        arrays = [(units * directions_of(w, geometry)).astype(dtype)]
        arrays += [] if geometry is None else [geometry.astype(dtype)]
        return arrays + ([] if log_weights is None else [log_weights.astype(jnp.float32)[:, None]])

    @property
    def shapes_of_head(self) -> list[tuple[int, ...]]:
        """Of `OfHead`."""
        return [(self.dim, self.features), *(x.shape[1:] for x in self.per_head[1:])]

    @property
    def static(self) -> dict[str, Any]:
        """What `body` gets besides references."""
        _, geometry, log_weights = self.inputs.features
        has = Has(self.inputs.decays is not None, geometry is not None, log_weights is not None)
        return {"scale": self.sizes.scale, "has": has}

    @property
    def state_shapes(self) -> list[tuple[int, int]]:
        """c, z and S^T of one head."""
        return [(1, self.features), (1, self.features), (self.value_dim, self.features)]

    def tokens(self, segments: Int[Array, "b n"]) -> list[tuple[Array, pl.BlockSpec]]:
        """q, k, v, the segments, as a column and as a row, and the decays, with their blocks."""
        q, k, v = map(self.in_front, self.inputs[2:5])
        column = pl.BlockSpec((1, self.sizes.chunk, 1), lambda b, h, n, *_: (b, self._place(n), 0))
        row = pl.BlockSpec((1, 1, self.sizes.chunk), lambda b, h, n, *_: (b, 0, self._place(n)))
        return [
            (q, self.of_queries(self.dim)),
            (k, self.of_keys(self.dim)),
            (v, self.of_keys(self.value_dim)),
            (segments[:, :, None], column),
            (segments[:, None, :], row),
            *self._decays(),
        ]

    def _decays(self) -> list[tuple[Array, pl.BlockSpec]]:
        if self.inputs.decays is None:
            return []
        whole, rest, _ = self.inputs.decays
        return [(jnp.stack([whole, rest], axis=2), self.of_keys_in_a_row(2))]

    def of_queries(self, width: int) -> pl.BlockSpec:
        shape = (1, 1, self.group, self.sizes.chunk, width)
        return pl.BlockSpec(shape, lambda b, h, n, *_: (b, h, 0, self._place(n), 0))

    def of_keys(self, width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, self.sizes.chunk, width), lambda b, h, n, *_: (b, h, self._place(n), 0))

    def of_keys_in_a_row(self, height: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, height, self.sizes.chunk), lambda b, h, n, *_: (b, h, 0, self._place(n)))

    def of_chunk(self, shape: tuple[int, ...]) -> pl.BlockSpec:
        """Of an array [b, h, chunks, *shape]."""
        return pl.BlockSpec((1, 1, 1, *shape), lambda b, h, n, *_: (b, h, self._place(n), 0, 0))

    def output_of_chunks(self, shape: tuple[int, int], dtype: Any) -> tuple[tuple[int, ...], Any, pl.BlockSpec]:
        """An output [b, h, chunks, *shape], as `call` takes it."""
        return (self.batch, self.heads, self.chunks, *shape), dtype, self.of_chunk(shape)

    def of_row(self, shape: tuple[int, ...]) -> pl.BlockSpec:
        """Of an array [b, h, *shape], which stays while the chunks pass."""
        return pl.BlockSpec((1, 1, *shape), lambda b, h, n, *_: (b, h, *len(shape) * (0,)))

    def of_head(self, shape: tuple[int, ...]) -> pl.BlockSpec:
        """Of an array [h, *shape]."""
        return pl.BlockSpec((1, *shape), lambda b, h, n, *_: (h, *len(shape) * (0,)))

    def _place(self, n: Any) -> Any:
        return self.chunks - 1 - n if self.last_first else n

    def call(
        self,
        body: Callable[..., None],
        scalars: Sequence[Array],
        inputs: Sequence[tuple[Array, pl.BlockSpec]],
        outputs: Sequence[tuple[tuple[int, ...], Any, pl.BlockSpec]],
        scratch: Sequence[tuple[int, ...]],
    ) -> Any:
        """`body` for every chunk.

        Args:
          scalars: [b, chunks]. `body` gets them flat: of two axes, a TPU's scalar memory takes 128 numbers per row.
          inputs: arrays with blocks.
          outputs: shapes, dtypes and blocks.
          scratch: shapes.
        """
        kind = jax.typeof(self.inputs.keys).manual_axis_type
        grid = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(self.batch, self.heads, self.chunks),
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, _, spec in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        )
        # XLA computes a kernel's steps, or within a shard_map, whose types it does not know there, a simulated TPU.
        interpreter: Any = pltpu.InterpretParams() if kind.varying else True
        kernel = pl.pallas_call(
            functools.partial(body, **self.static),
            grid_spec=grid,
            out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind) for shape, dtype, _ in outputs],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
            ),
            interpret=interpreter if self.sizes.interpret else False,
        )
        once = jax.custom_jvp(kernel)
        once.defjvp(_refuse_derivatives)
        with jax.enable_x64(False):  # or the kernel's constants would be float64, which a TPU lacks
            return once(*(x.ravel() for x in scalars), *(x for x, _ in inputs))


def _refuse_derivatives(*_: Any) -> Any:
    """Of a kernel: those of attention, which has another kernel for them, are asked for a second time."""
    raise UserError("backend = 'pallas' has first derivatives only: use backend = 'scan'")


def segments_of_chunks(
    segments: Int[Array, "b n"], first: Int[Array, "b"], chunk: int
) -> tuple[Int[Array, "b c"], Int[Array, "b c"], Int[Array, "b"]]:
    """Per chunk, its last segment (0: padding only) and that of the far state before it; and the last far state's."""
    of_chunk = last_segments(segments, chunk)
    return of_chunk, *held_segments(of_chunk, first)


def last_segments(segments: Int[Array, "b n"], chunk: int) -> Int[Array, "b c"]:
    """Each chunk's last segment; 0 where it is padding only."""
    ids = segments.reshape(segments.shape[0], -1, chunk)
    places = jnp.where(ids != 0, jnp.arange(chunk, dtype=jnp.int32)[None, None], -1)
    last = jnp.argmax(places, axis=-1, keepdims=True)  # the first one where all are padding, which is 0
    return jnp.take_along_axis(ids, last, axis=-1)[..., 0]


def held_segments(of_chunk: Int[Array, "b c"], first: Int[Array, "b"]) -> tuple[Int[Array, "b c"], Int[Array, "b"]]:
    """The far state's segment before each chunk, and after the last: the newest that entered it, `first` before any."""
    known = jnp.concatenate([first[:, None], of_chunk], axis=1)
    newest = jax.lax.cummax(jnp.where(known != 0, jnp.arange(known.shape[1], dtype=jnp.int32)[None], 0), axis=1)
    held = jnp.take_along_axis(known, newest, axis=1)
    return held[:, :-1], held[:, -1]


def directions_of(w: Float[Array, "h m r"], geometry: Float[Array, "h r d"] | None) -> Float[Array, "h m d"]:
    """w M of every head, in float32."""
    w = w.astype(jnp.float32)
    if geometry is None:
        return w
    return jnp.einsum("hmr,hrd->hmd", w, geometry.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
