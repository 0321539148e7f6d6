"""The interface of every mixer, and what each kind states about itself."""

import abc
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import jax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from darkformer_jax.errors import UserError
from darkformer_jax.mixers.spec import MixerSpec

Role = Literal["exact", "estimator", "control"]


@runtime_checkable
class Mixer(Protocol):
    """x -> (y, state): one call serves training (no state), prefill (a fresh state) and decoding."""

    def init_state(self, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> Any:
        """The state of `batch` sequences before their first token; `max_length` bounds what a cache must hold."""
        ...

    def __call__(
        self, x: Float[Array, "b n d"], segment_ids: Int[Array, "b n"], positions: Int[Array, "b n"], state: Any = None
    ) -> tuple[Float[Array, "b n d"], Any]:
        """Mixes the tokens of each segment; segment 0 is padding. The returned state is None if none was given."""
        ...


class MixerKind(nnx.Module, abc.ABC):
    """A class of mixers: one row of MIXERS.

    Attributes:
      role: exact = softmax attention itself; estimator = estimates its kernel or has its own; control = a baseline that
        others are compared with.
      uses: the fields of model.attention and model that change what it computes, and optimizer.geometry_learning_rate
        if it has a geometry. Each field that is not off must be used by a layer of the model.
      needs: the fields among them that must not be off.
      bidirectional: whether `causal = False` is possible.
      is_local: whether a token sees only the tokens shortly before it. A conversion leaves such layers as they are.
    """

    role: ClassVar[Role]
    uses: ClassVar[frozenset[str]]
    needs: ClassVar[frozenset[str]] = frozenset()
    bidirectional: ClassVar[bool] = False
    is_local: ClassVar[bool] = False

    @classmethod
    @abc.abstractmethod
    def build(cls, spec: MixerSpec, layer: int | Array, *, rngs: nnx.Rngs) -> Mixer:
        """The mixer of a layer. Fixed random arrays are functions of (spec.seed, layer)."""

    @classmethod
    @abc.abstractmethod
    def flops(cls, spec: MixerSpec, length: int) -> float:
        """Forward FLOPs per token, averaged over a sequence of `length` tokens; a multiply-add is 2."""

    @classmethod
    def in_effect(cls, spec: MixerSpec) -> frozenset[str]:
        """Of `uses`, the fields that change what this layer computes or learns beyond rounding.

        Fields that need another one, which is off, need not be left out: `config.usage` does that.
        """
        return cls.uses

    @classmethod
    def check(cls, spec: MixerSpec) -> None:
        """Raises UserError for options that contradict each other. The config checks ranges."""
        cls.check_direction(spec)

    @classmethod
    def check_direction(cls, spec: MixerSpec) -> None:
        """Raises UserError if the mixer cannot be causal, or nothing else, and is to be."""
        if not spec.causal and not cls.bidirectional:
            raise UserError(f"model.causal = False: {spec.kind!r} is causal only; allowed: True")

    @classmethod
    def check_mesh(cls, spec: MixerSpec, mesh: Mesh) -> None:
        """Raises UserError if the mesh's devices cannot train the layer."""

    @classmethod
    def check_stretch(cls, spec: MixerSpec, length: int) -> None:
        """Raises UserError if the devices that split a sequence cannot have `length` tokens each."""
