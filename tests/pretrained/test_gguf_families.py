"""GGUF files of every architecture: the logits are transformers', whose models they were written from."""

import numpy as np
import pytest

from darkformer_jax.errors import UserError
from darkformer_jax.pretrained.source import open_source
from tests.pretrained.tiny_gguf import byte_level_vocabulary, common_fields, converted_arrays, write_gguf
from tests.pretrained.tiny_models import SIZES, VOCAB, our_logits, random_model, their_logits
from tests.pretrained.tiny_sources import import_source

transformers = pytest.importorskip("transformers")

GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
GEMMA2 = {"head_dim": 16, "num_hidden_layers": 3, "sliding_window": 6, "query_pre_attn_scalar": 16}
GEMMA3 = {"head_dim": 16, "num_hidden_layers": 7, "sliding_window": 5, "query_pre_attn_scalar": 16}
CAPS = {"attn_logit_softcapping": 2.5, "final_logit_softcapping": 3.5}
# name -> (model_type, what differs from SIZES, architecture, metadata beside the common fields)
FILES = {
    "llama": ("llama", {"head_dim": 16}, "llama", {"{arch}.rope.freq_base": 10000.0, "{arch}.rope.dimension_count": 16}),
    "mistral": ("mistral", {"head_dim": 16, "sliding_window": None}, "llama", {"{arch}.rope.freq_base": 10000.0}),
    "mistral, with its window": (
        "mistral",
        {"head_dim": 16, "sliding_window": 7},
        "llama",
        {"{arch}.attention.sliding_window": 7},
    ),
    "mistral3": ("mistral", {"head_dim": 16, "sliding_window": None}, "mistral3", {}),
    "qwen2": ("qwen2", {"head_dim": 8}, "qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}, "qwen3", {}),
    "gemma": ("gemma", {"head_dim": 16, "num_key_value_heads": 1}, "gemma", {}),
    "gemma2": (
        "gemma2",
        GEMMA2 | CAPS,
        "gemma2",
        {"{arch}.attention.sliding_window": 6} | {f"{{arch}}.{name}": value for name, value in CAPS.items()},
    ),
    "gemma3": (
        "gemma3_text",
        GEMMA3 | {"rope_parameters": GEMMA_ROPE, "final_logit_softcapping": 3.5},
        "gemma3",
        {
            "{arch}.attention.sliding_window": 5,
            "{arch}.rope.freq_base": 50000.0,
            "{arch}.rope.scaling.type": "linear",
            "{arch}.rope.scaling.factor": 8.0,
            "{arch}.final_logit_softcapping": 3.5,
        },
    ),
}


def write(path, name, **fields):
    """The file of a random model, and the model. `fields` replace the metadata; None leaves one out."""
    model_type, changes, architecture, own = FILES[name]
    model = random_model(model_type, changes)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    arrays = converted_arrays(state, architecture, model.config)
    metadata = common_fields(model.config) | own | {f"{{arch}}.{key}": value for key, value in fields.items()}
    written = {key: value for key, value in metadata.items() if value is not None}
    return write_gguf(path, architecture, written, byte_level_vocabulary(VOCAB), arrays), model


@pytest.mark.parametrize("name", FILES)
def test_the_logits_are_those_of_the_model_it_was_written_from(tmp_path, name):
    path, model = write(tmp_path / "m.gguf", name)
    ours = our_logits(import_source(path, tmp_path / "workdir"))
    np.testing.assert_allclose(ours, their_logits(model), atol=1e-4, rtol=1e-4)
