"""Wherever config.json states a field of RoPE, the frequencies are those of transformers, or it is refused."""

import copy
import functools
import itertools

import numpy as np
import pytest

from darkformer_jax.config.base import get_config
from darkformer_jax.config.specs import mixer_specs
from darkformer_jax.errors import UserError
from darkformer_jax.pretrained.families import FAMILIES, family_of
from darkformer_jax.pretrained.families.family import LOCAL
from darkformer_jax.pretrained.hf_config import HFConfig
from tests.pretrained.tiny_models import SIZES, transformers

HEAD_DIM = 16  # eight pairs: each grid below has pairs that are kept, slowed and mixed
LAYER_TYPES = ["sliding_attention", "full_attention"]
ORIGINAL = "original_max_position_embeddings"
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "yarn-bounds": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 2.0},
    "yarn-attention": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5},
    "yarn-deepseek": {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn-one-scale": {"rope_type": "yarn", "factor": 40.0, "mscale": 2.0},
}
OTHER = {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0}  # what another section beside the named one says


def _original_type(section):
    return {"type" if name == "rope_type" else name: value for name, value in section.items()}


def _flat_places(section):
    """What config.json holds if it states the scaling in one place or the other, in either's form."""
    return {
        "rope_scaling": {"rope_scaling": section},
        "rope_scaling, type": {"rope_scaling": _original_type(section)},
        "rope_parameters": {"rope_parameters": section},
        "both": {"rope_scaling": section, "rope_parameters": OTHER},
    }


def _nested_places(section):
    """The same of a family whose parameters are nested by the type of the layer."""
    local = {"rope_type": "default", "rope_theta": 90.0}
    other = {"full_attention": OTHER, "sliding_attention": local}
    return {
        "rope_scaling": {"rope_scaling": section, "rope_local_base_freq": 80.0},
        "rope_parameters": {"rope_parameters": {"full_attention": section, "sliding_attention": local}},
        "rope_parameters, type": {"rope_parameters": {"full_attention": _original_type(section)}},
        "both": {"rope_scaling": section, "rope_parameters": other},
    }


def _grid(model_type, scaling):
    """Each value in no place, in the section, at the top level, and in both, where they differ."""
    places = _nested_places if model_type == "gemma3_text" else _flat_places
    lengths = [({}, {}), ({ORIGINAL: 512}, {}), ({}, {ORIGINAL: 256}), ({ORIGINAL: 512}, {ORIGINAL: 256})]
    thetas = [
        ({}, {}),
        ({"rope_theta": 5e3}, {}),
        ({}, {"rope_theta": 7e4}),
        ({"rope_theta": 5e3}, {"rope_theta": 7e4}),
    ]
    for (length, top_length), (theta, top_theta) in itertools.product(lengths, thetas):
        for place, stated in places(SCALINGS[scaling] | length | theta).items():
            yield place, stated | top_length | top_theta


def _values(model_type, changes):
    layers = {"layer_types": LAYER_TYPES} if model_type in ("gemma2", "gemma3_text") else {}
    act = {} if "gemma" in model_type else {"hidden_act": "silu"}
    own = {"head_dim": HEAD_DIM, "max_position_embeddings": 4096, "hidden_activation": "gelu_pytorch_tanh"}
    return copy.deepcopy({"model_type": model_type, **SIZES, **own, **layers, **act, **changes})


def ours_of(model_type, changes):
    """(frequencies, amplitude) of every kind of layer."""
    config = HFConfig(_values(model_type, changes), "config.json")
    fields = family_of(config).read(config)
    ours = get_config()
    ours.update_from_flattened_dict({f"model.{name}": value for name, value in fields.items()})
    return {
        mixer.kind == LOCAL: (mixer.rope.frequencies(HEAD_DIM), mixer.rope.amplitude) for mixer in mixer_specs(ours)
    }


@functools.cache
def _rotary_class(model_type):
    config = transformers.AutoConfig.for_model(**_values(model_type, {}))
    return type(transformers.AutoModelForCausalLM.from_config(config).model.rotary_emb)


def theirs_of(model_type, changes):
    """The same of the rotary embedding that the family's model has in transformers."""
    rotary = _rotary_class(model_type)(transformers.AutoConfig.for_model(**_values(model_type, changes)))
    if model_type != "gemma3_text":
        found = (rotary.inv_freq.numpy(), rotary.attention_scaling)
        return {False: found, True: found}
    prefixes = {name == "sliding_attention": name for name in LAYER_TYPES}
    return {
        local: (getattr(rotary, f"{name}_inv_freq").numpy(), getattr(rotary, f"{name}_attention_scaling"))
        for local, name in prefixes.items()
    }


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_frequencies_are_those_of_transformers_wherever_config_json_states_the_values(model_type, scaling):
    for place, changes in _grid(model_type, scaling):
        ours, theirs = ours_of(model_type, changes), theirs_of(model_type, changes)
        assert False in ours or model_type == "mistral"
        for local, (frequencies, amplitude) in ours.items():
            wanted, attention_scaling = theirs[local]
            np.testing.assert_allclose(frequencies, wanted, rtol=1e-6, err_msg=f"{place}: {changes}")
            assert amplitude == pytest.approx(attention_scaling), (place, changes)


YARN = SCALINGS["yarn"] | {ORIGINAL: 512}


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("llama", {"rope_scaling": YARN, ORIGINAL: 0}, f"config.json: {ORIGINAL} = 0: must be a whole number from 1"),
        ("llama", {"rope_scaling": YARN | {"truncate": None}}, "truncate = null: only yarn with rounded"),
        ("llama", {"rope_scaling": YARN | {"type": "linear"}}, 'type = "linear": contradicts rope_type = yarn'),
        ("llama", {"rope_scaling": {**YARN, "factor": None}}, "rope_scaling: the field factor is missing"),
        ("llama", {"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "only rotation of the whole head"),
        ("qwen3", {"rope_parameters": {"full_attention": YARN}}, "full_attention = {"),
        ("gemma3_text", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: only rotation of the whole head"),
        ("gemma3_text", {"rope_parameters": YARN}, "rope_parameters: factor = 4.0: allowed in Gemma 3: full_attention"),
        (
            "gemma3_text",  # transformers 4 reads it as linear, 5 as no scaling
            {"rope_scaling": {"type": "linear", "factor": 8.0}},
            'rope_scaling: type = "linear": contradicts rope_type = default',
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"type": "linear", "factor": 8.0}}},
            "scaled RoPE is not supported in windowed layers",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_theta": 1e4, "mrope_section": [1]}}},
            "sliding_attention: mrope_section = [1]: not supported",
        ),
    ],
)
def test_rope_that_is_not_supported_is_refused_in_a_line(model_type, changes, message):
    with pytest.raises(UserError) as error:
        ours_of(model_type, changes)
    assert message in str(error.value) and "\n" not in str(error.value)
