"""DARKFormer in JAX: linear attention with a learned geometry, and everything to train and convert models with it."""

from importlib import metadata
from typing import TYPE_CHECKING, Any

from darkformer_jax.ops.attention_fn import dark_attention_fn
from darkformer_jax.ops.dark_attention import dark_attention
from darkformer_jax.ops.linear_attention import linear_attention
from darkformer_jax.ops.projections import draw_projections

if TYPE_CHECKING:
    from darkformer_jax.tasks.trained_model import load_model

__all__ = ["dark_attention", "dark_attention_fn", "draw_projections", "linear_attention", "load_model"]

try:
    __version__ = metadata.version("darkformer_jax")
except metadata.PackageNotFoundError:  # a clone that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name == "load_model":  # only on demand, because it imports Orbax and the tokenizers
        from darkformer_jax.tasks.trained_model import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
