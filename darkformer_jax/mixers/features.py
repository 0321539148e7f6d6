"""The mechanisms that are one call of `dark_attention`: they differ in w, in M, and in what they show it of q and k."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from darkformer_jax.distributed.sharding import context_size
from darkformer_jax.errors import UserError
from darkformer_jax.mixers.spec import AttentionSpec, Geometry, Projection
from darkformer_jax.mixers.stretches import on_stretches
from darkformer_jax.ops.dark_attention import dark_attention, init_state
from darkformer_jax.ops.projections import draw_projections, projection_key
from darkformer_jax.ops.state import AttentionState


def draw_layer(spec: AttentionSpec, layer: int | Array, epoch: int | Array) -> Array:
    """Projections [Hkv, m, d] of one layer in one redraw epoch: a function of (seed, layer, epoch) alone."""
    key = projection_key(spec.seed, layer, epoch)
    return draw_projections(key, spec.num_features, spec.head_dim, spec.projections, num_heads=spec.num_kv_heads)


class Inputs(NamedTuple):
    """What `dark_attention` sees of a layer."""

    queries: Array
    keys: Array
    projections: Array | None
    geometry: Array | None


class FeatureAttention(nnx.Module):
    """Linear attention with an optional exact window. Subclasses say what the kernel is made of, in `inputs`."""

    key_dim: int  # of what `inputs` returns
    num_features: int

    def __init__(self, spec: AttentionSpec, layer: int | Array) -> None:
        self.spec = spec
        self.key_dim = spec.head_dim
        self.num_features = spec.num_features
        self.log_gain = Geometry(jnp.zeros(spec.num_heads), axes=("heads",)) if spec.far_gain else None

    def inputs(self, q: Array, k: Array, positions: Array) -> Inputs:
        raise NotImplementedError

    def init_state(self, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> AttentionState:
        s = self.spec
        sizes = (s.num_kv_heads, self.key_dim, s.head_dim, self.num_features)
        return init_state(batch, *sizes, jnp.dtype(dtype), s.chunk_size, s.window, s.num_sinks)

    def __call__(
        self, q: Array, k: Array, v: Array, *, segment_ids: Array, positions: Array, state: AttentionState | None = None
    ) -> tuple[Array, Any]:
        queries, keys, projections, geometry = self.inputs(q, k, positions)
        attend = functools.partial(
            dark_attention,
            scale=self.spec.query_scale or None,
            chunk_size=self.spec.chunk_size,
            window=self.spec.window,
            num_sinks=self.spec.num_sinks,
            window_kernel=self.spec.window_kernel,
        )
        arrays: dict[str, Any] = {
            "projections": projections,
            "geometry": geometry,
            "log_gain": None if self.log_gain is None else self.log_gain[...].astype(jnp.float32),
            "segment_ids": segment_ids,
        }
        if context_size() > 1:
            return on_stretches(attend, queries, keys, v, state=state, **arrays), None
        result = attend(queries, keys, v, **arrays, state=state, return_state=state is not None)
        return result if state is not None else (result, None)


class Performer(FeatureAttention):
    """The softmax kernel, w drawn isotropically and M = I (Choromanski et al., arXiv 2009.14794)."""

    def __init__(self, spec: AttentionSpec, layer: int | Array) -> None:
        super().__init__(spec, layer)
        self.projections: Projection | Geometry = Projection(
            draw_layer(spec, layer, 0), axes=("kv_heads", "features", None)
        )

    def inputs(self, q: Array, k: Array, positions: Array) -> Inputs:
        return Inputs(q, k, self.projections[...].astype(jnp.float32), None)


class Dark(Performer):
    """exp(q^T M^T M k), M learned per key/value head and shared by its queries (Farzam et al., arXiv 2603.04127).

    With `learn_projections` w is trained as well, and the features estimate no kernel any more.
    """

    def __init__(self, spec: AttentionSpec, layer: int | Array) -> None:
        super().__init__(spec, layer)
        if spec.learn_projections:
            self.projections = Geometry(self.projections[...], axes=("kv_heads", "features", None))
        identity = jnp.eye(spec.head_dim, dtype=jnp.float32)
        start = jnp.tile(spec.geometry_init * identity, (spec.num_kv_heads, 1, 1))
        self.M = Geometry(start, axes=("kv_heads", None, None))

    def inputs(self, q: Array, k: Array, positions: Array) -> Inputs:
        return Inputs(q, k, self.projections[...].astype(jnp.float32), self.M[...].astype(jnp.float32))


class LearnedFeatures(FeatureAttention):
    """LFK, the paper's learned feature kernel: w is trained, M = I. It starts as a draw, then estimates no kernel."""

    def __init__(self, spec: AttentionSpec, layer: int | Array) -> None:
        super().__init__(spec, layer)
        self.projections = Geometry(draw_layer(spec, layer, 0), axes=("kv_heads", "features", None))

    def inputs(self, q: Array, k: Array, positions: Array) -> Inputs:
        return Inputs(q, k, self.projections[...].astype(jnp.float32), None)


class WindowOnly(FeatureAttention):
    """The control of every hybrid: its exact window and sinks with nothing behind them."""

    def __init__(self, spec: AttentionSpec, layer: int | Array) -> None:
        if not spec.window:
            raise UserError("model.attention.kind = 'window_only' needs model.attention.window > 0")
        super().__init__(dataclasses.replace(spec, far_gain=False), layer)
        self.num_features = 0

    def inputs(self, q: Array, k: Array, positions: Array) -> Inputs:
        return Inputs(q, k, None, None)


def _refuse_window(spec: AttentionSpec, kind: str) -> None:
    if spec.window or spec.num_sinks:
        raise UserError(
            f"model.attention.kind = {kind!r} does not look at q and k: it takes no window = {spec.window} and no sinks"
        )


class Random(Performer):
    """Fixed random weights: Performer on q and k replaced by N(0, I) vectors of (seed, layer, position, head).

    The weight of position j for position n is thus a fixed positive random number, at linear cost and with a constant
    state. The DARKFormer paper names this floor and does not define it; the definition is this project's own.
    """

    def __init__(self, spec: AttentionSpec, layer: int | Array) -> None:
        _refuse_window(spec, "random")
        super().__init__(spec, layer)
        self.noise_key = NoiseKey(jax.random.key_data(projection_key(spec.seed + 1, layer, 0)), axes=(None,))

    def inputs(self, q: Array, k: Array, positions: Array) -> Inputs:
        key = jax.random.wrap_key_data(self.noise_key[...])
        num_heads, num_kv_heads, dim = q.shape[2], k.shape[2], q.shape[3]

        def draw(position: Array) -> Array:
            # Drawn in float32: another dtype would give other weights, not rounded ones.
            noise = jax.random.normal(jax.random.fold_in(key, position), (num_heads + num_kv_heads, dim), jnp.float32)
            return noise.astype(q.dtype)

        noise = jax.vmap(jax.vmap(draw))(positions)
        return Inputs(noise[:, :, :num_heads], noise[:, :, num_heads:], self.projections[...].astype(jnp.float32), None)


class NoiseKey(Projection):
    """Key data of the positions' noise; not redrawn."""


class Constant(FeatureAttention):
    """The mean of the visible values: one feature, equal to one for every query and key.

    The DARKFormer paper names this floor and does not define it; the definition is this project's own.
    """

    def __init__(self, spec: AttentionSpec, layer: int | Array) -> None:
        _refuse_window(spec, "constant")
        super().__init__(spec, layer)
        self.key_dim = self.num_features = 1

    def inputs(self, q: Array, k: Array, positions: Array) -> Inputs:
        return Inputs(jnp.zeros_like(q[..., :1]), jnp.zeros_like(k[..., :1]), jnp.zeros((1, 1)), None)
