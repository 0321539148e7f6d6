"""Configuration of a DARKFormer model that darkformer_jax exported."""

from typing import Any

from transformers import PreTrainedConfig


class DarkformerConfig(PreTrainedConfig):
    """The fields of a stock model (hidden_size, num_hidden_layers, ...), and `darkformer`: what it lacks.

    `darkformer["model"]` holds every field of the model as darkformer_jax knows them, and `darkformer["pattern"]` the
    attention of successive layers, repeated over the depth. Each entry has the kind and the options of one layer, with
    `frequencies` (radians per token of each rotary pair; null = no rotary positions) and `amplitude` of the rotation.
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

    def layer(self, index: int) -> dict[str, Any]:
        """Kind and options of one layer's attention."""
        pattern = self._described()["pattern"]
        return pattern[index % len(pattern)]

    def _described(self) -> dict[str, Any]:
        if self.darkformer is None:
            raise ValueError("config.json has no `darkformer`: it was not written by darkformer_jax")
        return self.darkformer
