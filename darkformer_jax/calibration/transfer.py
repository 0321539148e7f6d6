"""Attention transfer: a layer's mechanism learns to give the output of exact attention for the same q, k and v."""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from darkformer_jax.mixers.spec import Geometry
from darkformer_jax.model.transformer import Block, Transformer
from darkformer_jax.ops.linear import Sums, log_far_weight

_QUERY_STRIDE = 4
_FASTER = 5.0  # the learning rate of projections and gains, over that of M
_SMALLEST_ERROR = 1e-3  # below it, a relative error hardly counts; the square root of 0 has no derivative


class LayerTensors(NamedTuple):
    """Inputs and exact output of one layer's attention on n passages of L tokens, one document each.

    log_decay is 0 in a model without a decay.
    """

    q: Float[Array, "n l hq d"]
    k: Float[Array, "n l hkv d"]
    v: Float[Array, "n l hkv d"]
    exact: Float[Array, "n l hq d"]
    log_decay: Float[Array, "n l hkv"]


class FittedMechanism(NamedTuple):
    """A mechanism in parts: its structure, what transfer trains (M, learned projections, gain), and the rest."""

    graphdef: Any
    trainable: nnx.State
    fixed: nnx.State

    @classmethod
    def of(cls, module: nnx.Module) -> "FittedMechanism":
        parts: Any = nnx.split(module, Geometry, ...)
        return cls(*parts)

    def near(self, tensors: LayerTensors) -> Sums | None:
        """What queries see exactly, if that does not depend on the trainable part; then it is computed once."""
        module: Any = nnx.merge(self.graphdef, self.trainable, self.fixed)
        if not getattr(module, "near_is_fixed", False):
            return None

        def one_passage(passage: LayerTensors) -> Sums:
            return module.near(*(x[None] for x in passage[:3]))

        return jax.tree.map(lambda leaf: leaf[:, 0], jax.lax.map(one_passage, tensors))

    def attend(
        self, trained: nnx.State, tensors: LayerTensors, near: Sums | None = None, stride: int = 1
    ) -> Float[Array, "n p hq d"]:
        """The mechanism's output for the passages, with `trained` in place of its trainable part.

        Args:
          near: saves time: what `self.near` returned for these passages.
          stride: q and `near` are of every stride-th token only, and so is the output; needs `near`.
        """
        module: Any = nnx.merge(self.graphdef, trained, self.fixed)
        segment_ids, positions = _one_document_each(tensors.k)
        if near is not None:
            return module.beside(near, tensors.q, tensors.k, tensors.v, positions, stride)
        log_decay = tensors.log_decay if module.spec.has_decay else None
        places = {"segment_ids": segment_ids, "positions": positions}
        out, _ = module(tensors.q, tensors.k, tensors.v, **places, log_decay=log_decay)
        return out


def teacher_layers(model: Transformer, tokens: Int[Array, "n l"]) -> Iterator[LayerTensors]:
    """The exact model's attention on `tokens`, layer by layer. Only one layer's tensors exist at a time."""
    x = [model.embed(row[None]) for row in tokens]
    for index in range(model.spec.num_layers):
        graphdef, arrays = nnx.split(model.layer(index))
        made = [_run_layer(graphdef, arrays, row) for row in x]
        x = [after for _, after in made]
        yield jax.tree.map(lambda *rows: jnp.concatenate(rows), *(tensors for tensors, _ in made))


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(graphdef: Any, arrays: nnx.State, x: Array) -> tuple[LayerTensors, Array]:
    block: Block = nnx.merge(graphdef, arrays)
    segment_ids, positions = _one_document_each(x)
    attention: Any = block.attention
    normed = block.attention_norm(x)
    (q, k, v), _ = attention.project(normed, segment_ids, positions)
    log_decay = None if attention.forgetting is None else attention.forgetting(normed)
    places = {"segment_ids": segment_ids, "positions": positions}
    exact, _ = attention.mechanism(q, k, v, **places, log_decay=log_decay)
    after, _ = block(x, segment_ids, positions, None)
    decays = jnp.broadcast_to(0.0 if log_decay is None else log_decay, (*k.shape[:2], k.shape[2]))
    wide = (leaf.astype(jnp.float32) for leaf in (q, k, v, exact, decays))
    return LayerTensors(*wide), after


@functools.partial(jax.jit, static_argnames=("scale", "chunk_size", "window", "num_sinks", "far_horizon"))
def matched_log_gain(
    tensors: LayerTensors,
    geometry: Float[Array, "hkv d d"],
    *,
    scale: float,
    chunk_size: int,
    window: int,
    num_sinks: int,
    far_horizon: int = 0,
) -> Float[Array, "hq"]:
    """The log-gain that gives the far part about the weight that exact attention gives it.

    Exact attention weights keys by exp(s), s = scale q.k. Features with M estimate exp(s'), s' = scale Mq.Mk. Where M
    shrinks, far weights are too small compared with the window's; where it stretches, they are too large. The gain of
    a head is the mean over queries of log sum_far exp(s) - log sum_far exp(s'), weighted by the far share of the
    query's attention.

    Args:
      tensors: q, k and decays of passages, one document each.
      geometry: M of each key/value head.
      scale: of q.k.
      chunk_size, window, num_sinks: decide which keys are near, as in `dark_attention`.
      far_horizon: of `dark_attention`; the gain comes on top of it.
    """
    length, num_queries = tensors.q.shape[1:3]
    key, query = jnp.arange(length)[None], jnp.arange(length)[:, None]
    near = (key >= query // chunk_size * chunk_size - window) | (key < num_sinks)
    causal = key <= query
    group = num_queries // tensors.k.shape[2]

    def one_head(arrays: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:  # [l, d], [l, d], [d, d], [l]
        q, k, m, log_decay = arrays
        decay = jnp.cumsum(log_decay)[:, None] - jnp.cumsum(log_decay)[None]
        with jax.default_matmul_precision("highest"):
            exact, estimated = scale * q @ k.T + decay, scale * (q @ m.T) @ (k @ m.T).T + decay
        far, estimated_far, all_keys = (
            jax.nn.logsumexp(jnp.where(seen, scores, -jnp.inf), axis=-1)
            for scores, seen in ((exact, causal & ~near), (estimated, causal & ~near), (exact, causal))
        )
        if far_horizon:
            estimated_far = estimated_far + log_far_weight(far_horizon, jnp.arange(length, dtype=estimated_far.dtype))
        share = jnp.exp(far - all_keys)  # 0 where a query has no far key
        return share.sum(), jnp.sum(jnp.where(share > 0, share * (far - estimated_far), 0.0))

    def flat(x: Array) -> Array:  # [n, l, h, ...] -> [n * h, l, ...]
        return jnp.swapaxes(x, 1, 2).reshape(-1, length, *x.shape[3:])

    k, decays = (flat(jnp.repeat(x, group, axis=2)) for x in (tensors.k, tensors.log_decay))
    m = jnp.tile(jnp.repeat(geometry, group, axis=0), (len(tensors.k), 1, 1))
    shares, gains = jax.lax.map(one_head, (flat(tensors.q), k, m, decays))
    shares, gains = (jnp.sum(x.reshape(-1, num_queries), axis=0) for x in (shares, gains))
    return jnp.where(shares > 0, gains / jnp.where(shares > 0, shares, 1.0), 0.0)


@functools.partial(jax.jit, static_argnames=("steps", "passages", "learning_rate"))
def fit(
    mechanism: FittedMechanism, tensors: LayerTensors, key: Array, *, steps: int, passages: int, learning_rate: float
) -> nnx.State:
    """The trainable part after `steps` of Adam on the mean over heads of |out - exact| / |exact|.

    With its square, the heads that features cannot follow would decide what heads that share their M learn.

    A step draws passages. If what is seen exactly is computed once (`FittedMechanism.near`), it also draws every
    fourth query of them. That takes less than half the time: far states have as many keys as before, but a quarter of
    the readers.

    Args:
      mechanism: its trainable part is the start.
      key: decides the `passages` that each step draws.
      learning_rate: of M in the first step; it falls to zero along a cosine. Projections and gains learn five times as
        fast.
    """
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(learning_rate, max(steps, 1)))
    )
    near = mechanism.near(tensors)
    stride = 1 if near is None else _query_stride(mechanism, tensors)

    def loss(trained: nnx.State, drawn: LayerTensors, near: Sums | None) -> Array:
        difference = mechanism.attend(trained, drawn, near, stride) - drawn.exact
        return jnp.mean(jnp.sqrt(_squared_norms(difference) / _squared_norms(drawn.exact) + _SMALLEST_ERROR**2))

    def step(carry: tuple[nnx.State, Any], key: Array) -> tuple[tuple[nnx.State, Any], None]:
        trained, state = carry
        gradients = jax.grad(loss)(trained, *_draw(tensors, near, key, passages, stride))
        updates, state = optimizer.update(gradients, state, trained)
        updates = jax.tree_util.tree_map_with_path(_faster, updates)
        return (optax.apply_updates(trained, updates), state), None

    start = (mechanism.trainable, optimizer.init(mechanism.trainable))
    (trained, _), _ = jax.lax.scan(step, start, jax.random.split(key, steps))
    return trained


def _faster(path: tuple[Any, ...], update: Array) -> Array:
    """The updates of w and of gains, several times as large as those of M.

    The entries of a start of M are 0 or a half, those of w about 1. A step of Adam changes all entries by up to the
    learning rate, so the largest singular value of M by up to d times that: fast steps kill the far part of some heads,
    which no gradient then revives.
    """
    return update if path[0].key == "M" else _FASTER * update


def _query_stride(mechanism: FittedMechanism, tensors: LayerTensors) -> int:
    module: Any = nnx.merge(mechanism.graphdef, mechanism.trainable, mechanism.fixed)
    stride = math.gcd(_QUERY_STRIDE, module.spec.chunk_size)
    return stride if stride <= tensors.q.shape[1] else 1


def _draw(
    tensors: LayerTensors, near: Sums | None, key: Array, passages: int, stride: int
) -> tuple[LayerTensors, Sums | None]:
    """Some passages, and of these every stride-th query."""
    row_key, offset_key = jax.random.split(key)
    count, length = tensors.q.shape[:2]
    rows = jax.random.choice(row_key, count, (passages,), replace=False)
    if stride == 1:
        return jax.tree.map(lambda leaf: leaf[rows], (tensors, near))
    offset = jax.random.randint(offset_key, (), 0, stride)
    places = offset + stride * jnp.arange(length // stride)

    def read(leaf: Array) -> Array:
        return leaf[rows[:, None], places[None]]

    q, exact, near = jax.tree.map(read, (tensors.q, tensors.exact, near))
    k, v, log_decay = (leaf[rows] for leaf in (tensors.k, tensors.v, tensors.log_decay))
    return LayerTensors(q, k, v, exact, log_decay), near


@jax.jit
def errors(mechanism: FittedMechanism, trained: nnx.State, tensors: LayerTensors) -> Float[Array, "hq"]:
    """|out - exact| / |exact| of every head, with norms over all passages, tokens and dimensions."""

    def one_passage(passage: LayerTensors) -> Array:  # one at a time, because exact windows of many take much memory
        passage = jax.tree.map(lambda leaf: leaf[None], passage)
        return _squared_norms(mechanism.attend(trained, passage) - passage.exact)

    squared = jnp.sum(jax.lax.map(one_passage, tensors), axis=0)
    return jnp.sqrt(squared / _squared_norms(tensors.exact))


def _squared_norms(x: Float[Array, "n l hq d"]) -> Float[Array, "hq"]:
    return jnp.einsum("nlhd,nlhd->h", x, x)


def _one_document_each(x: Array) -> tuple[Int[Array, "n l"], Int[Array, "n l"]]:
    """(segment_ids, positions) of rows of x [n, l, ...]."""
    shape = x.shape[:2]
    return jnp.ones(shape, jnp.int32), jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
