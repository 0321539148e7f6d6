"""What the mechanisms of linear attention share: each calls one op."""

import abc
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from darkformer_jax.distributed.sharding import context_size, splits_rows
from darkformer_jax.errors import UserError
from darkformer_jax.mixers.attention import ATTENTION_FIELDS, Mechanism
from darkformer_jax.mixers.backend import backend_of, check_backend, check_backend_on
from darkformer_jax.mixers.coordinates import BalancedCoordinates
from darkformer_jax.mixers.exact_heads import ExactHeads, SplitState, check_exact_heads, exact_part, features_part
from darkformer_jax.mixers.mixer import Role
from darkformer_jax.mixers.softmax import Softmax
from darkformer_jax.mixers.spec import Geometry, MixerSpec
from darkformer_jax.mixers.stretches import on_shards, on_stretches
from darkformer_jax.ops.context import check_stretch
from darkformer_jax.ops.dark_attention import dark_attention, feature_kernel, init_state
from darkformer_jax.ops.linear import Sums
from darkformer_jax.ops.parts import far_sums, joined, near_sums
from darkformer_jax.ops.projections import draw_projections, projection_key
from darkformer_jax.ops.state import AttentionState

WINDOW_FIELDS = ATTENTION_FIELDS | {"query_scale", "chunk_size", "window", "num_sinks"}
FAR_FIELDS = frozenset({"far_gain", "far_horizon"})
PROJECTION_FIELDS = ATTENTION_FIELDS | {"query_scale", "chunk_size", "num_features", "projections", "redraw_every"}


def draw_layer(spec: MixerSpec, layer: int | Array, epoch: int | Array) -> Array:
    """Projections [Hkv, m, d] of one layer in one redraw epoch: a function of (seed, layer, epoch) alone."""
    key = projection_key(spec.seed, layer, epoch)
    return draw_projections(key, spec.num_features, spec.head_dim, spec.projections, num_heads=spec.num_kv_heads)


class LinearMechanism(Mechanism):
    """A mechanism with a state of constant size. Subclasses set that size and call `run`."""

    role: ClassVar[Role] = "estimator"
    bidirectional = True

    key_dim: int  # width of the keys that the op gets
    num_features: int

    def __init__(self, spec: MixerSpec, layer: int | Array) -> None:
        super().__init__(spec, layer)
        self.key_dim = spec.head_dim
        self.num_features = spec.num_features

    @classmethod
    def check(cls, spec: MixerSpec) -> None:
        super().check(spec)
        if not spec.causal and spec.window:
            raise UserError(f"model.causal = False with window = {spec.window}: allowed: 0, features everywhere")
        if spec.window % spec.chunk_size:
            raise UserError(
                f"model.attention.window = {spec.window} is not a multiple of chunk_size = {spec.chunk_size}"
            )

    @classmethod
    def in_effect(cls, spec: MixerSpec) -> frozenset[str]:
        return cls.uses if spec.window else cls.uses - {"chunk_size"}

    @classmethod
    def check_stretch(cls, spec: MixerSpec, length: int) -> None:
        if not spec.causal:
            raise UserError("model.causal = False with mesh.context > 1: allowed: mesh.context = 1")
        check_stretch(length, spec.chunk_size, spec.window)

    def init_state(self, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> AttentionState:
        s = self.spec
        sizes = (s.num_kv_heads - s.exact_kv_heads, self.key_dim, s.head_dim, self.num_features)
        return init_state(batch, *sizes, jnp.dtype(dtype), s.chunk_size, s.window, s.num_sinks, s.has_decay)

    def run(
        self, attend: Callable[..., Any], q: Array, k: Array, v: Array, state: AttentionState | None, **arrays: Any
    ) -> tuple[Array, Any]:
        """(`attend(q, k, v, **arrays)`, new state), on each device's own stretch where the mesh splits sequences."""
        attend = functools.partial(attend, causal=self.spec.causal, chunk_size=self.spec.chunk_size)
        backend = backend_of(self.spec, state)
        if backend != "scan":  # which ops that know no other do not ask for
            attend = functools.partial(attend, backend=backend)
        if backend == "pallas":  # the compiler cannot split a kernel by itself
            return on_shards(attend, q, k, v, **arrays), None
        if context_size() > 1:
            return on_stretches(attend, q, k, v, state=state, **arrays), None
        if state is None and splits_rows(q.shape[0]):
            # The compiler would sum the gradient of M over the devices in every chunk; here it does so once.
            return on_shards(attend, q, k, v, **arrays), None
        result = attend(q, k, v, **arrays, state=state, return_state=state is not None)
        return result if state is not None else (result, None)


class Inputs(NamedTuple):
    """The arrays of a layer that `dark_attention` gets."""

    queries: Array
    keys: Array
    projections: Array | None
    geometry: Array | None


class FeatureAttention(LinearMechanism):
    """`dark_attention` with an optional exact window. Subclasses define the kernel in `inputs`."""

    uses = PROJECTION_FIELDS | WINDOW_FIELDS | FAR_FIELDS | {"exact_kv_heads", "geometry_learning_rate", "backend"}
    has_geometry = False  # whether q and k are mapped by M first
    learns_kernel = False  # whether it has M or learned projections; they learn at geometry_learning_rate, as gains do

    def __init__(self, spec: MixerSpec, layer: int | Array) -> None:
        super().__init__(spec, layer)
        self.log_gain = Geometry(jnp.zeros(spec.num_heads), axes=("heads",)) if spec.far_gain else None
        self.coordinates = BalancedCoordinates(spec) if spec.balanced else None
        # Arrays have a place for every head, so that a choice of exact heads does not change their shapes.
        self.exact = ExactHeads(spec, layer) if spec.exact_kv_heads else None

    @classmethod
    def check(cls, spec: MixerSpec) -> None:
        super().check(spec)
        check_exact_heads(spec)
        check_backend(spec)

    @classmethod
    def check_mesh(cls, spec: MixerSpec, mesh: Mesh) -> None:
        check_backend_on(spec, mesh)

    @classmethod
    def in_effect(cls, spec: MixerSpec) -> frozenset[str]:
        names = super().in_effect(spec) - {"backend"}
        return names if cls.learns_kernel or spec.far_gain else names - {"geometry_learning_rate"}

    @abc.abstractmethod
    def inputs(self, q: Array, k: Array, positions: Array) -> Inputs:
        """The q, k, w and M that the op gets."""

    @classmethod
    def mixing_flops(cls, spec: MixerSpec, length: int) -> float:
        """Those of the exact heads, as for `Softmax`, and those of `feature_flops` of the others."""
        if not spec.exact_kv_heads:
            return cls.feature_flops(spec, length)
        return Softmax.mixing_flops(exact_part(spec), length) + cls.feature_flops(features_part(spec), length)

    @classmethod
    def feature_flops(cls, spec: MixerSpec, length: int) -> float:
        """With H query and G key/value heads, and n keys that are seen one by one (`mean_exact_keys`), per token:

        geometry  2 d^2 (H + G)     M x, if there is an M; and again if q and k are mapped to other coordinates
        features  2 m d (H + G)
        state     2 m d (H + G)     the update S += phi(k) v, and the reading phi(q) S
        local     (2 m + 2 d) H n   the own chunk through features (window = 0), or
                  4 H d n           the own chunk, window and sinks exactly
        """
        m, d = spec.num_features, spec.head_dim
        width = (spec.num_heads + spec.num_kv_heads) * d
        features_and_state = 4 * m * width
        geometry = 2 * d * width * (cls.has_geometry + spec.balanced)
        per_key = 4 * spec.num_heads * d if spec.window else 2 * spec.num_heads * (m + d)
        return features_and_state + geometry + per_key * mean_exact_keys(spec, length)

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        segment_ids: Array,
        positions: Array,
        log_decay: Array | None = None,
        state: Any = None,
    ) -> tuple[Array, Any]:
        places = {"segment_ids": segment_ids, "positions": positions}
        if self.exact is None:
            return self._through_features(q, k, v, **places, log_decay=log_decay, state=state)
        return self.exact.beside(self._through_features, q, k, v, **places, log_decay=log_decay, state=state)

    def _through_features(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        segment_ids: Array,
        positions: Array,
        log_decay: Array | None,
        state: AttentionState | None,
    ) -> tuple[Array, Any]:
        """Of the last heads, those that are not exact."""
        gain = self._gain()
        queries, keys, projections, geometry = self.inputs(*self.in_coordinates(q, k), positions)
        attend = functools.partial(
            dark_attention,
            scale=self.spec.query_scale or None,
            window=self.spec.window,
            num_sinks=self.spec.num_sinks,
            window_kernel=self.spec.window_kernel,
            far_horizon=self.spec.far_horizon,
        )
        arrays: dict[str, Any] = {
            "projections": None if projections is None else projections[-k.shape[2] :],
            "geometry": None if geometry is None else geometry[-k.shape[2] :],
            "log_gain": None if gain is None else gain[-q.shape[2] :],
            "segment_ids": segment_ids,
            "log_decay": log_decay,
        }
        return self.run(attend, queries, keys, v, state, **arrays)

    def init_state(self, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> Any:
        sums = super().init_state(batch, max_length, dtype)
        return sums if self.exact is None else SplitState(self.exact.init_state(batch, max_length, dtype), sums)

    def in_coordinates(self, q: Array, k: Array) -> tuple[Array, Array]:
        """q and k as the kernel gets them: all logits, sinks and keys of a cache are in these coordinates."""
        return (q, k) if self.coordinates is None else self.coordinates(q, k)

    def _gain(self) -> Array | None:
        return None if self.log_gain is None else self.log_gain[...].astype(jnp.float32)

    @property
    def near_is_fixed(self) -> bool:
        """Whether what a query sees exactly depends neither on M nor on w: `near` and `far` then are the two parts."""
        s = self.spec
        own = self.has_geometry and s.window_kernel == "dark"
        return bool(s.causal and s.window and s.num_features and not (own or s.has_decay or s.exact_kv_heads))

    def near(self, q: Array, k: Array, v: Array) -> Sums:
        """What queries of whole documents, one per row, see exactly."""
        s = self.spec
        places = {"chunk_size": s.chunk_size, "window": s.window, "num_sinks": s.num_sinks}
        q, k = self.in_coordinates(q, k)
        return near_sums(q, k, v, scale=s.scale, **places)

    def beside(self, near: Sums, q: Array, k: Array, v: Array, positions: Array, stride: int = 1) -> Array:
        """The output for whole documents, one per row, from what they see exactly.

        stride: q and near are of every stride-th token only; see `ops.parts.far_sums`.
        """
        s = self.spec
        queries, keys, projections, geometry = self.inputs(*self.in_coordinates(q, k), positions)
        window: dict[str, Any] = {"window": s.window, "window_kernel": s.window_kernel, "far_horizon": s.far_horizon}
        kernel = feature_kernel(
            queries, keys, projections=projections, geometry=geometry, scale=s.scale, log_gain=self._gain(), **window
        )
        places = {"chunk_size": s.chunk_size, "window": s.window, "num_sinks": s.num_sinks}
        far = far_sums(kernel, queries, keys, v, **places, stride=stride)
        return joined(near, far, s.num_features).astype(v.dtype)


def mean_exact_keys(spec: MixerSpec, length: int) -> float:
    """The number of keys that a query sees outside the state, averaged over a sequence of `length` tokens.

    They are the query's own chunk (up to itself if attention is causal), the `window` tokens before the chunk, and the
    first `num_sinks` tokens. Each key counts once.
    """
    total = 0
    for start in range(0, length, spec.chunk_size):
        size = min(spec.chunk_size, length - start)
        before = min(spec.window, start)
        sinks = min(spec.num_sinks, start - before)
        own = size * (size + 1) // 2 if spec.causal else size * size
        total += own + size * (before + sinks)
    return total / length
