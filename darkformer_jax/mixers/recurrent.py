"""What the mixers that are no attention share: a recurrence over convolved projections of the input."""

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from darkformer_jax.errors import UserError
from darkformer_jax.mixers.convolution import ActivatedConvolution, ConvolutionState, Parts
from darkformer_jax.mixers.mixer import MixerKind, Role
from darkformer_jax.mixers.spec import MixerSpec
from darkformer_jax.ops.signed_attention import SignedState

CONV_WIDTH = 4  # as in every published model


class RecurrentState(NamedTuple):
    """What a layer keeps of the tokens so far."""

    scan: SignedState
    convolution: ConvolutionState


class Recurrent(MixerKind):
    """A mixer x -> y that a subclass defines. It is causal, reads no positions and splits no sequence."""

    role: ClassVar[Role] = "estimator"

    @classmethod
    def in_effect(cls, spec: MixerSpec) -> frozenset[str]:
        return cls.uses - {"chunk_size"}

    @classmethod
    def check_stretch(cls, spec: MixerSpec, length: int) -> None:
        raise UserError(f"mesh.context > 1: {spec.kind!r} does not split sequences; allowed: mesh.context = 1")


def convolve(
    convolutions: Sequence[ActivatedConvolution], parts: Parts, segment_ids: Array, before: ConvolutionState
) -> list[Array]:
    """Each convolution of its part, which continues the tokens before."""
    pairs = zip(convolutions, parts, before.inputs, strict=True)
    return [convolution(x, segment_ids, past, before.segments) for convolution, x, past in pairs]


def log_decay_of(raw: Array, A_log: nnx.Param) -> tuple[Array, Array]:
    """(-exp(A_log) softplus(raw), softplus(raw)) of each token and head, in float32."""
    step = jax.nn.softplus(raw)
    return -jnp.exp(A_log[...].astype(jnp.float32))[None, None] * step, step


def draw_log_rates(rngs: nnx.Rngs, count: int, lowest: float) -> Array:
    """A_log of heads with A uniform in [lowest, 16]."""
    return jnp.log(jax.random.uniform(rngs.params(), (count,), jnp.float32, lowest, 16.0))


def draw_step_bias(rngs: nnx.Rngs, count: int) -> Array:
    """The bias of heads whose step, its softplus, is log-uniform in [0.001, 0.1]."""
    step = jnp.exp(jax.random.uniform(rngs.params(), (count,), jnp.float32, math.log(1e-3), math.log(1e-1)))
    return step + jnp.log(-jnp.expm1(-step))  # the inverse of softplus
