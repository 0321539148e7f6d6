"""`dark_attention` under the names of `jax.nn.dot_product_attention`, and as Flax's `attention_fn`."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from darkformer_jax.errors import UserError
from darkformer_jax.ops.dark_attention import dark_attention


def dark_attention_fn(**options: Any) -> Callable[..., Array]:
    """A function that takes the place of `jax.nn.dot_product_attention`, or of `attention_fn` in Flax's attention.

        attend = dark_attention_fn(projections=w, geometry=M)
        out = attend(query, key, value, is_causal=True)
        layer = flax.nnx.MultiHeadAttention(..., attention_fn=attend)

    query, key and value are [batch..., n, heads, d], or [n, heads, d] without a batch, with as many queries as keys;
    out has the shape of query with value's d. As in jax.nn, every query sees all keys unless `is_causal`.

    Args:
      options: of `dark_attention`, `projections` at least; not causal, scale, state, return_state.

    Raises:
      UserError: when it is called with what linear attention cannot do: a mask, a bias, dropout, weights to sow.
    """
    taken = {"causal", "scale", "state", "return_state"} & options.keys()
    if taken or "projections" not in options:
        named = f"{min(taken)} is not one of them" if taken else "projections is missing"
        raise UserError(f"dark_attention_fn takes options of dark_attention: {named}")

    def attend(
        query: Float[Array, "... n hq d"],
        key: Float[Array, "... n hkv d"],
        value: Float[Array, "... n hkv dv"],
        bias: Array | None = None,
        mask: Array | None = None,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = True,
        dtype: jax.typing.DTypeLike | None = None,
        **others: Any,
    ) -> Float[Array, "... n hq dv"]:
        if bias is not None or mask is not None:
            raise UserError("bias or mask: linear attention has no scores that they change; allowed: None, is_causal")
        if dropout_rate and not deterministic:
            raise UserError(f"dropout_rate = {dropout_rate}: linear attention has no weights to drop; allowed: 0")
        if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
            raise UserError(f"query {query.shape}, key {key.shape} and value {value.shape} differ in their batch axes")
        _refuse_others(others)
        inputs = (query, key, value) if dtype is None else tuple(x.astype(dtype) for x in (query, key, value))
        q, k, v = (x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:]) for x in inputs)
        out = dark_attention(q, k, v, causal=is_causal, scale=scale, **options)
        return out.reshape(*query.shape[:-3], *out.shape[1:])

    return attend


# Flax passes these with every call. Without dropout they change nothing.
_OF_DROPOUT = {"dropout_rng", "broadcast_dropout"}


def _refuse_others(others: dict[str, Any]) -> None:
    for name, value in others.items():
        if value is not None and name not in _OF_DROPOUT:
            raise UserError(f"{name}: dark_attention_fn does not support it; allowed: None")
