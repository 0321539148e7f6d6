"""What the mechanisms share that a causal model cannot have: each token's output depends on later tokens."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from darkformer_jax.errors import UserError
from darkformer_jax.mixers.attention import Mechanism
from darkformer_jax.mixers.mixer import Role
from darkformer_jax.mixers.spec import MixerSpec


class EncoderMechanism(Mechanism):
    """A mechanism for `causal = False` alone. All tokens of a row but padding are one document."""

    role: ClassVar[Role] = "estimator"
    uses = frozenset({"positions", "qk_norm", "qkv_bias", "query_scale", "num_features"})
    bidirectional = True

    @classmethod
    def check_direction(cls, spec: MixerSpec) -> None:
        if spec.causal:
            raise UserError(
                f"model.causal = True: in {spec.kind!r} a token depends on later ones; allowed: False, in a "
                "classification or a regression"
            )

    @classmethod
    def check(cls, spec: MixerSpec) -> None:
        super().check(spec)
        if spec.has_alibi:
            raise UserError(
                f"model.attention.positions = {spec.positions!r}: {spec.kind!r} has no pairs of tokens, which could "
                "decay with their distance; allowed: rope, none"
            )

    @classmethod
    def check_stretch(cls, spec: MixerSpec, length: int) -> None:
        raise UserError("model.causal = False with mesh.context > 1: allowed: mesh.context = 1")

    def init_state(self, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> Any:
        """There is none."""
        raise UserError(f"{self.spec.kind!r} cannot continue a text: a token depends on later ones")


def places_in_row(segment_ids: Int[Array, "b n"]) -> tuple[Int[Array, "b n"], Int[Array, "b"]]:
    """(number of each real token in its row, from 0; how many there are). Padding has that of the token before."""
    is_real = segment_ids != 0
    return jnp.maximum(jnp.cumsum(is_real, axis=1) - 1, 0), jnp.sum(is_real, axis=1)


def per_query_head(x: Float[Array, "b n hkv d"], num_heads: int) -> Float[Array, "b n hq d"]:
    """Keys or values, once per query head."""
    return jnp.repeat(x, num_heads // x.shape[2], axis=2)
