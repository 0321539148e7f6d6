"""Attention over sequences that the mesh splits: each device calls an op on its own stretch."""

from collections.abc import Callable
from typing import Any

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


def on_stretches(
    attend: Callable[..., Array],
    q: Float[Array, "b n hq d"],
    k: Float[Array, "b n hkv d"],
    v: Float[Array, "b n hkv dv"],
    *,
    state: Any = None,
    **arrays: Array | None,
) -> Float[Array, "b n hq dv"]:
    """`attend(q, k, v, **arrays, sequence_axis=...)` on each device's part of the arrays; see `AXES` for their names.

    Raises:
      UserError: the number of devices does not divide the length, or a state is given.
    """
    ways, length = context_size(), q.shape[1]
    if state is not None or length % ways:
        raise UserError(
            f"mesh.context = {ways} splits whole sequences whose length is a multiple of {ways}; "
            + (f"these have {length} tokens" if state is None else "decoding from a state needs context = 1")
        )
    given = {name: x for name, x in arrays.items() if x is not None}
    axes = {name: AXES[name][-x.ndim :] for name, x in given.items()}

    def stretch(q: Array, k: Array, v: Array, *rest: Array) -> Array:
        return attend(q, k, v, **arrays | dict(zip(given, rest, strict=True)), sequence_axis=CONTEXT)

    in_axes = (QUERY_AXES, KEY_AXES, KEY_AXES, *axes.values())
    return map_shards(stretch, (q, k, v, *given.values()), in_axes, out_axes=QUERY_AXES)
