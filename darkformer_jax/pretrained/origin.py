"""What config.json and generation_config.json of a checkpoint say beside its weights; see `runs.origin`."""

import os
from typing import Any

from darkformer_jax.pretrained.hf_config import HFConfig

GENERATION_FILE = "generation_config.json"

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LENGTH = "max_position_embeddings"


def origin_of(model_type: str, config: HFConfig, directory: str, vocab_size: int) -> dict[str, Any]:
    """What config.json and `directory`'s generation_config.json, if it has one, say of ids and lengths.

    Raises UserError for ids that are none of the vocabulary.
    """
    kept = {name: config.token_ids(name, vocab_size) for name in _IDS if name in config.values}
    if config.values.get(_LENGTH) is not None:
        kept[_LENGTH] = config.integer(_LENGTH)
    origin: dict[str, Any] = {"model_type": model_type, "config": kept}
    path = os.path.join(directory, GENERATION_FILE)
    if os.path.isfile(path):
        generation = HFConfig.read(path)
        for name in _IDS:
            generation.token_ids(name, vocab_size)
        origin["generation_config"] = dict(generation.values)
    return origin
