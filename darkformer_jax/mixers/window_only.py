"""The control for every hybrid: its exact window and sinks, without features."""

from jaxtyping import Array

from darkformer_jax.mixers.features import WINDOW_FIELDS, FeatureAttention, Inputs, mean_exact_keys
from darkformer_jax.mixers.spec import MixerSpec


class WindowOnly(FeatureAttention):
    """Exact attention to the query's own chunk, the window before it and the sinks."""

    role = "control"
    uses = WINDOW_FIELDS | {"exact_kv_heads"}
    needs = frozenset({"window"})
    bidirectional = False

    def __init__(self, spec: MixerSpec, layer: int | Array) -> None:
        super().__init__(spec, layer)
        self.num_features = 0

    @classmethod
    def feature_flops(cls, spec: MixerSpec, length: int) -> float:
        """4 H d n, with the n keys that are seen exactly."""
        return 4 * spec.num_heads * spec.head_dim * mean_exact_keys(spec, length)

    def inputs(self, q: Array, k: Array, positions: Array) -> Inputs:
        return Inputs(q, k, None, None)
