"""Attention over arrays that the mesh splits: each device calls an op on its own rows, heads and stretch of tokens."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from darkformer_jax.distributed.sharding import CONTEXT, context_size, map_shards
from darkformer_jax.errors import UserError

QUERY_AXES = ("batch", "sequence", "heads", None)
KEY_AXES = ("batch", "sequence", "kv_heads", None)
AXES: dict[str, tuple[str | None, ...]] = {
    "segment_ids": ("batch", "sequence"),
    "positions": ("batch", "sequence"),
    "projections": ("kv_heads", None, None),
    "geometry": ("kv_heads", None, None),
    "log_gain": ("heads",),
    "log_decay": ("batch", "sequence", "kv_heads"),
}


def on_shards(
    attend: Callable[..., Array],
    q: Float[Array, "b n hq d"],
    k: Float[Array, "b n hkv d"],
    v: Float[Array, "b n hkv dv"],
    **arrays: Array | None,
) -> Float[Array, "b n hq dv"]:
    """`attend(q, k, v, **arrays)` on each device's part of the arrays; see `AXES` for their names."""
    if jax.sharding.get_abstract_mesh().empty:
        return attend(q, k, v, **arrays)
    given = {name: x for name, x in arrays.items() if x is not None}

    def part(q: Array, k: Array, v: Array, *rest: Array) -> Array:
        return attend(q, k, v, **arrays | dict(zip(given, rest, strict=True)))

    in_axes = (QUERY_AXES, KEY_AXES, KEY_AXES, *(AXES[name][-x.ndim :] for name, x in given.items()))
    return map_shards(part, (q, k, v, *given.values()), in_axes, out_axes=QUERY_AXES)


def on_stretches(
    attend: Callable[..., Array],
    q: Float[Array, "b n hq d"],
    k: Float[Array, "b n hkv d"],
    v: Float[Array, "b n hkv dv"],
    *,
    state: Any = None,
    **arrays: Array | None,
) -> Float[Array, "b n hq dv"]:
    """`on_shards` of an op that joins the stretches of a sequence by its `sequence_axis`.

    Raises:
      UserError: the number of devices does not divide the length, or a state is given.
    """
    ways, length = context_size(), q.shape[1]
    if state is not None or length % ways:
        raise UserError(
            f"mesh.context = {ways} splits whole sequences whose length is a multiple of {ways}; "
            + (f"these have {length} tokens" if state is None else "decoding from a state needs context = 1")
        )
    return on_shards(functools.partial(attend, sequence_axis=CONTEXT), q, k, v, **arrays)
