"""Rotary position embeddings, and the scaling of a pretrained model's frequencies to longer contexts."""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

RopeScaling = Literal["none", "linear", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """Rotary positions of one layer: theta and the scaling of the frequencies (`model.rope_*` in config/base.py)."""

    theta: float
    scaling: str  # a RopeScaling
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int
    beta_fast: float
    beta_slow: float
    attention_factor: float  # 0 = yarn's formula

    def frequencies(self, head_dim: int) -> Float[np.ndarray, "d/2"]:
        """Radians per token of each pair, float32.

        They are f_i = theta^(-2i/d) without scaling. With n_i = original_length f_i / 2 pi turns, scaling gives

            linear   f_i / factor
            llama3   (1 - s_i) f_i / factor + s_i f_i,  s_i = clip((n_i - low) / (high - low), 0, 1)
            yarn     (1 - s_i) f_i / factor + s_i f_i,  s_i falls linearly in i, from 1 where n_i = beta_fast to 0
                     where n_i = beta_slow, both rounded outwards to whole pairs (arXiv 2309.00071)

        Raises ValueError for an unknown scaling.
        """
        half = head_dim // 2
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        plain = np.float32(1) / np.float32(self.theta) ** exponents
        if self.scaling == "none":
            return plain
        slowed = plain / np.float32(self.factor)
        if self.scaling == "linear":
            return slowed
        if self.scaling == "llama3":
            turns = self.original_length * plain / (2 * math.pi)
            kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        elif self.scaling == "yarn":
            first = max(math.floor(self._pair_of_turns(self.beta_fast, head_dim)), 0)
            last = min(math.ceil(self._pair_of_turns(self.beta_slow, head_dim)), head_dim - 1)
            kept = 1 - (np.arange(half) - first) / ((last - first) or 0.001)
        else:
            raise ValueError(f"rope scaling {self.scaling!r} is unknown")
        kept = np.clip(kept, 0, 1).astype(np.float32)
        return (1 - kept) * slowed + kept * plain

    def _pair_of_turns(self, turns: float, head_dim: int) -> float:
        """The index i, not rounded, of the pair that makes `turns` turns in the original length."""
        return head_dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

    @property
    def amplitude(self) -> float:
        """The factor on the rotated q and k: 1 except for yarn."""
        if self.scaling != "yarn":
            return 1.0
        return self.attention_factor or 0.1 * math.log(self.factor) + 1


def rope(x: Float[Array, "b n h d"], positions: Int[Array, "b n"], spec: RopeSpec) -> Float[Array, "b n h d"]:
    """Rotates the pairs (x_i, x_{i + d/2}) by the angle positions * f_i, in float32; f are the spec's frequencies.

    This is the half-split layout of Hugging Face's Llama and Gemma. Source: Su et al., arXiv 2104.09864.
    """
    frequencies = jnp.asarray(spec.frequencies(x.shape[-1]))
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies[None, None, None, :]
    sin, cos = jnp.sin(angles) * spec.amplitude, jnp.cos(angles) * spec.amplitude
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
