"""Configuration of a DARKFormer model that darkformer_jax exported."""

from typing import Any

import transformers

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(f"a DARKFormer model needs transformers 5.0 or later; this is {transformers.__version__}")

FORMAT = 2  # of `darkformer` in config.json
POOLINGS = ("last", "mean")
# Fields that are stated twice -> their names in `darkformer["model"]`, which the model reads.
_TWICE = {
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
}


class DarkformerConfig(transformers.PreTrainedConfig):
    """The fields of a stock model (hidden_size, num_hidden_layers, ...), and `darkformer`: what it lacks.

    `darkformer["model"]` holds every field of the model as darkformer_jax knows them, and `darkformer["pattern"]` the
    attention of successive layers, repeated over the depth. Each entry has the kind and the options of one layer, with
    `frequencies` (radians per token of each rotary pair; null = no rotary positions) and `amplitude` of the rotation.
    `darkformer["task"]` says what a classifier reads, and how.
    """

    model_type = "darkformer"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012  # transformers expects a list

    def __init__(
        self,
        darkformer: dict[str, Any] | None = None,
        use_cache: bool = True,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.darkformer = darkformer
        self.use_cache = use_cache
        self.initializer_range = initializer_range
        super().__init__(**kwargs)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the model by their names in darkformer_jax."""
        return self._described()["model"]

    @property
    def pooling(self) -> str:
        """How a classifier makes one hidden state of a row's: that of its `last` token, or their `mean`."""
        pooling = self._described().get("task", {}).get("pooling", "last")  # a language model has no task
        if pooling not in POOLINGS:
            raise ValueError(f"darkformer.task.pooling = {pooling!r}: must be one of {', '.join(POOLINGS)}")
        return pooling

    def check(self) -> None:
        """Raises ValueError for another format, and for a field that says something else than `darkformer` does."""
        for name, own in _TWICE.items():
            value = getattr(self, name, self.fields[own])
            if value != self.fields[own]:
                raise ValueError(f"{name} = {value}, but darkformer.model.{own} = {self.fields[own]}: they must agree")

    def layer(self, index: int) -> dict[str, Any]:
        """Kind and options of one layer's attention."""
        pattern = self._described()["pattern"]
        return pattern[index % len(pattern)]

    def _described(self) -> dict[str, Any]:
        if self.darkformer is None:
            raise ValueError("config.json has no `darkformer`: it was not written by darkformer_jax")
        if self.darkformer.get("format") != FORMAT:
            raise ValueError(f"darkformer.format = {self.darkformer.get('format')!r}; this code reads {FORMAT}")
        return self.darkformer
