"""Specs of small mixers, made the way a config's are."""

from typing import Any

from darkformer_jax.config import base
from darkformer_jax.config.specs import mixer_specs
from darkformer_jax.mixers.positions import RopeSpec
from darkformer_jax.mixers.spec import MixerSpec

SMALL = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "chunk_size": 8, "dtype": "float32"}


def mixer_spec(kind: str = "dark", **changes: Any) -> MixerSpec:
    """The spec of a layer of `kind`; what it does not use is off, as ever."""
    config = base.get_config()
    for name, value in {"kind": kind, **SMALL, **changes}.items():
        section = next(s for s in (config.model.attention, config.model, config) if name in s)
        section[name] = value
    return mixer_specs(config)[0]


def rope_spec(theta: float = 1e4, scaling: str = "none", **changes: Any) -> RopeSpec:
    """The rotary positions of a config with these fields, `rope_` left out."""
    fields = {"theta": theta, "scaling": scaling, **changes}
    return mixer_spec(**{f"rope_{name}": value for name, value in fields.items()}).rope
