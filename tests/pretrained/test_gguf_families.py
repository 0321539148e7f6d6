"""GGUF files of every architecture: the logits are transformers', whose models they were written from."""

import numpy as np
import pytest

from darkformer_jax.errors import UserError
from darkformer_jax.pretrained.export import export_workdir
from darkformer_jax.pretrained.families import canonical, family_of
from darkformer_jax.pretrained.hf_config import HFConfig
from darkformer_jax.pretrained.source import open_source
from darkformer_jax.runs.workdir import Workdir
from tests.pretrained.tiny_gguf import byte_level_vocabulary, common_fields, converted_arrays, flags, write_gguf
from tests.pretrained.tiny_models import VOCAB, load_theirs, our_logits, random_model, their_logits
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
    "llama": (
        "llama",
        {"head_dim": 16},
        "llama",
        {"{arch}.rope.freq_base": 10000.0, "{arch}.rope.dimension_count": 16},
    ),
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
# Sizes at which transformers' own reader, which takes soft-caps, scales and the scaling of RoPE from its defaults and
# not from the file, is right.
THEIR_DEFAULTS = {"head_dim": 256, "query_pre_attn_scalar": 256}
READ_BY_TRANSFORMERS = {
    "llama": {},
    "qwen2": {},
    "gemma2": THEIR_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": THEIR_DEFAULTS
    | {
        "final_logit_softcapping": None,
        "rope_parameters": GEMMA_ROPE | {"full_attention": {"rope_type": "default", "rope_theta": 50000.0}},
    },
}
NOT_IN_THE_FILE = dict.fromkeys((*CAPS, "rope.scaling.type", "rope.scaling.factor"))


def write(path, name, changes=(), **fields):
    """The file of a random model, and the model. `changes` are the model's; `fields` replace metadata, None removes."""
    model_type, standard, architecture, own = FILES[name]
    model = random_model(model_type, standard | dict(changes))
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    arrays = converted_arrays(state, architecture, model.config)
    metadata = common_fields(model.config) | own | {f"{{arch}}.{key}": value for key, value in fields.items()}
    written = {key: value for key, value in metadata.items() if value is not None}
    return write_gguf(path, architecture, written, byte_level_vocabulary(VOCAB), arrays), model


def everything(source):
    """All arrays of a source, by Hugging Face's names."""
    return {name: source.read(name, tuple(slice(0, n) for n in a.shape)) for name, a in source.arrays.items()}


def fields_of(config):
    return canonical(family_of(config).read(config))


@pytest.mark.parametrize("name", FILES)
def test_the_arrays_and_fields_are_those_of_the_model_it_was_written_from(tmp_path, name):
    path, model = write(tmp_path / "m.gguf", name)
    source = open_source(str(path))
    ours, theirs = fields_of(source.config), fields_of(HFConfig(model.config.to_dict(), "config.json"))
    assert ours == theirs
    arrays = everything(source)
    assert arrays.keys() == model.state_dict().keys() - ({"lm_head.weight"} if ours["tie_embeddings"] else set())
    for key, value in arrays.items():
        np.testing.assert_allclose(value, model.state_dict()[key].numpy(), atol=1e-7, rtol=0, err_msg=key)


@pytest.mark.parametrize("name", ["mistral", "gemma", "gemma2", "gemma3"])
def test_the_logits_are_those_of_the_model_it_was_written_from(tmp_path, name):
    path, model = write(tmp_path / "m.gguf", name)
    ours = our_logits(import_source(path, tmp_path / "workdir"))
    np.testing.assert_allclose(ours, their_logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_own_reader_has_the_same_model(tmp_path, name):
    path, model = write(tmp_path / "m.gguf", name, READ_BY_TRANSFORMERS[name], **NOT_IN_THE_FILE)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file="m.gguf", attn_implementation="eager", dtype="float32"
    )
    np.testing.assert_allclose(their_logits(theirs), their_logits(model), atol=1e-5, rtol=1e-5)
    source = open_source(str(path))
    assert fields_of(source.config) == fields_of(HFConfig(model.config.to_dict(), "config.json"))
    for key, value in everything(source).items():
        np.testing.assert_array_equal(value, theirs.state_dict()[key].numpy(), err_msg=key)


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_scale_of_27b_follows_from_the_depth(tmp_path, name, layers):
    """No file states it. The released models have 4608 / 32 = 144 and 5376 / 32 = 168, not their head size of 128."""
    for depth, scale in ((layers, 12), (layers - 1, 16)):
        shape = {"num_hidden_layers": depth, "hidden_size": 48, "head_dim": 16}
        path, _ = write(tmp_path / f"{depth}.gguf", name, shape)
        assert open_source(str(path)).config.values["query_pre_attn_scalar"] == scale


def types(path):
    return "".join({"s": "1", "f": "0"}[kind[0]] for kind in open_source(str(path)).config.values["layer_types"])


def test_the_windowed_layers_are_those_of_llama_cpp(tmp_path):
    window = "attention.sliding_window_pattern"
    for number, (name, pattern, expected) in enumerate(
        (
            ("gemma2", None, "101"),
            ("gemma3", None, "1111101"),
            ("gemma3", 3, "1101101"),
            ("gemma3", 1, "0000000"),
            ("gemma3", 0, "1111111"),
            ("gemma3", flags("0110011"), "0110011"),
        )
    ):
        path, _ = write(tmp_path / f"{number}.gguf", name, **{window: pattern})
        assert types(path) == expected
    path, _ = write(tmp_path / "without.gguf", "gemma3", **{"attention.sliding_window": None})
    assert types(path) == "0000000"


def test_what_a_file_of_gemma_2_leaves_out_is_gemma_2s(tmp_path):
    path, _ = write(tmp_path / "m.gguf", "gemma2", **dict.fromkeys((*CAPS, "attention.sliding_window")))
    fields = fields_of(open_source(str(path)).config)
    found = [fields[name] for name in ("attention.softcap", "logit_softcap", "attention.local_window")]
    assert found == [50.0, 30.0, 4096]


def test_an_export_of_a_gguf_is_the_family_again(tmp_path):
    path, model = write(tmp_path / "m.gguf", "gemma3")
    import_source(path, tmp_path / "workdir")
    export_workdir(Workdir(tmp_path / "workdir"), str(tmp_path / "exported"))
    exported, _ = load_theirs(tmp_path / "exported")
    assert type(exported) is type(model)
    np.testing.assert_allclose(their_logits(exported), their_logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("gemma3", {"rope.freq_base": None}, "gemma3: the field rope.freq_base is missing"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0: a soft-cap of attention is not"),
        ("gemma3", {"attention.sliding_window_pattern": flags("01")}, "must be a whole number, or true or false for"),
        ("gemma2", {"rope.freq_base_swa": 500.0}, "another RoPE in windowed layers is not supported"),
        ("gemma", {"attention.sliding_window": 6}, "attention.sliding_window = 6: sliding windows are not supported"),
        ("qwen3", {"attention.sliding_window": 6}, "attention.sliding_window = 6: sliding windows are not supported"),
        ("mistral3", {"attention.temperature_scale": 0.1}, "a scale of q.k that depends on the position is not"),
        ("mistral3", {"rope.scaling.type": "yarn"}, 'rope.scaling.type = "yarn": allowed: none, linear'),
        ("llama", {"attention.causal": False}, "attention.causal = false: only causal attention is supported"),
        ("gemma2", {"attention.scale": 0.1}, "another scale of q.k is not supported"),
    ],
)
def test_what_another_model_would_be_is_refused(tmp_path, name, fields, message):
    path, _ = write(tmp_path / "m.gguf", name, **fields)
    with pytest.raises(UserError) as error:
        open_source(str(path))
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
