"""The config of a run that starts from another run's weights, perhaps with another mechanism.

The other run determines the model: `runs.inherit` fills fields that are None here from its config.json. Pretrained
queries and keys are too large for features alone to estimate their products. A mechanism that can have a window
therefore gets one of 64 tokens and 4 sinks, which keeps the pretrained kernel. M starts at half the identity, where the
variance of the features is small.
"""

from typing import Any

import ml_collections
from ml_collections import config_dict

from darkformer_jax.config import base
from darkformer_jax.config.pattern import ATTENTION
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from darkformer_jax.mixers.attention import ATTENTION_FIELDS

COMPUTATION = ("attention", "dtype", "remat", "lora_rank")  # how a model is computed and trained, not what it is
_INHERITED_BY_ATTENTION = (
    *("pattern", "query_scale", "softcap", "local_window", "far_gain", "far_horizon", "learn_projections", "balanced"),
    "exact_kv_heads",  # `calibrate` ordered the heads for it
    # Positions, decay and convolution belong to the transformer, not to the mechanism.
    *sorted(name for name in ATTENTION_FIELDS if ATTENTION + name in base.fields()),
)
_OF_A_WINDOW: dict[str, Any] = {
    "num_features": 64,
    "chunk_size": 64,
    "window": 64,
    "num_sinks": 4,
    "window_kernel": "softmax",
    "geometry_init": 0.5,
}


def conversion_config(kind: str) -> ml_collections.ConfigDict:
    """The base config with the mechanism `kind`; the model's sizes and the data's tokenizer are those of `init_from`.

    Raises UserError for an unknown kind.
    """
    if kind not in MIXERS:
        raise UserError(f"model.attention.kind = {kind!r}: allowed: {', '.join(MIXERS)}")
    c = _inheriting_config()
    a = c.model.attention
    for name in _INHERITED_BY_ATTENTION:
        _inherit(a, name)
    a.kind = kind
    if "window" in MIXERS[kind].uses:
        a.update({name: value for name, value in _OF_A_WINDOW.items() if name in MIXERS[kind].uses})
    return c


def continuation_config() -> ml_collections.ConfigDict:
    """The base config with the whole model of `init_from`: its layers are kept, whatever their mechanisms."""
    c = _inheriting_config()
    for name in set(c.model.attention) - {"backend"}:  # which is of the run and its devices
        _inherit(c.model.attention, name)
    return c


def _inheriting_config() -> ml_collections.ConfigDict:
    c = base.get_config()
    for name in set(c.model) - set(COMPUTATION):
        _inherit(c.model, name)
    c.data.tokenizer = ""
    return c


def without_window(c: ml_collections.ConfigDict) -> None:
    """Turns off the fields that need a window if the config has none. What another run determines stays None."""
    for name, field in base.fields().items():
        if name.startswith(ATTENTION) and field.needs == "window" and not c.model.attention.window:
            c.update_from_flattened_dict({name: field.off})


def _inherit(section: ml_collections.ConfigDict, name: str) -> None:
    """Makes a field None until `runs.inherit` fills it in. The type of overrides is still checked."""
    section[name] = config_dict.placeholder(type(section[name]))
