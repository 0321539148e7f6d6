"""Everything that determines a model's shape and function."""

import dataclasses

from darkformer_jax.mixers.spec import MixerSpec
from darkformer_jax.model.heads import Pooling


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The fields of a model. config/base.py explains them; `config.specs` fills them in.

    Attributes:
      pattern: the mixers of successive layers, repeated over the depth; not longer than num_layers.
      num_outputs: outputs per sequence, from a head on the pooled hidden state; 0 = logits of the next token.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    mlp_dim: int
    activation: str
    norm_eps: float
    norm_plus_one: bool
    post_norms: bool
    tie_embeddings: bool
    scale_embeddings: bool
    logit_softcap: float
    dtype: str
    remat: str
    pattern: tuple[MixerSpec, ...]
    num_outputs: int
    pooling: Pooling

    @property
    def layers(self) -> tuple[MixerSpec, ...]:
        """The mixer of every layer."""
        return tuple(self.pattern[layer % len(self.pattern)] for layer in range(self.num_layers))

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of every layer's mixer."""
        return tuple(layer.kind for layer in self.layers)

    @property
    def causal(self) -> bool:
        """Whether no token sees a later one."""
        return all(mixer.causal for mixer in self.pattern)

    def num_rows(self, place: int) -> int:
        """The number of layers at one place in the pattern, which are the rows of its stack."""
        return len(range(place, self.num_layers, len(self.pattern)))
