"""config.json of published checkpoints, in the forms of transformers 4 and 5, and what is refused."""

import pytest

from darkformer_jax.errors import UserError
from darkformer_jax.pretrained.families import FAMILIES, canonical, family_of, fitting_family
from darkformer_jax.pretrained.families.family import kinds_of, layer_fields
from darkformer_jax.pretrained.hf_config import HFConfig
from tests.pretrained.tiny_sources import CONFIG

GEMMA_2B = {  # the paper's model, as it was published
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "model_type": "gemma",
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 256000,
}
GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
LLAMA32_1B_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def read(values):
    config = HFConfig(values, "config.json")
    return family_of(config).read(config)


def test_gemma_2b():
    fields = read(GEMMA_2B)
    assert fields["activation"] == "gelu_tanh" and fields["tie_embeddings"] and fields["scale_embeddings"]
    assert (fields["num_kv_heads"], fields["head_dim"], fields["norm_plus_one"]) == (1, 256, True)
    assert (fields["attention.kind"], fields["attention.pattern"], fields["attention.query_scale"]) == (
        "softmax",
        "",
        0,
    )


def test_gemma_3_1b_has_five_windowed_layers_to_a_global_one():
    fields = read(GEMMA3_1B)
    assert fields["attention.pattern"] == ",".join(["softmax_local"] * 5 + ["softmax"])
    assert (fields["attention.local_window"], fields["rope_theta"], fields["rope_local_theta"]) == (512, 1e6, 1e4)
    assert fields["qk_norm"] and fields["post_norms"] and fields["tie_embeddings"]


def test_the_scaling_of_llama_32_in_both_forms():
    old = read(CONFIG | {"rope_theta": 500000.0, "rope_scaling": LLAMA32_1B_ROPE})
    parameters = {"rope_parameters": LLAMA32_1B_ROPE | {"rope_theta": 500000.0}}
    new = read({name: value for name, value in CONFIG.items() if name != "rope_theta"} | parameters)
    assert old == new
    assert (old["rope_scaling"], old["rope_factor"], old["rope_original_length"]) == ("llama3", 32.0, 8192)


def test_llama_1_says_nothing_about_rope_and_kv_heads():
    fields = read({name: v for name, v in CONFIG.items() if name not in ("rope_theta", "num_key_value_heads")})
    assert (fields["rope_theta"], fields["num_kv_heads"]) == (10000.0, 4)


def test_yarn_reads_deepseeks_pair_of_scales_as_one_number():
    yarn = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
    assert read(CONFIG | {"rope_scaling": yarn})["rope_attention_factor"] == 0.0
    assert (
        read(CONFIG | {"rope_scaling": yarn | {"mscale": 1.0, "mscale_all_dim": 1.0}})["rope_attention_factor"] == 1.0
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mamba"},
            'config.json: model_type = "mamba": unsupported architecture; allowed: llama, mistral',
        ),
        ({"model_type": "gpt2"}, "its learned positions, LayerNorm and ungated MLP"),
        ({"model_type": "gemma3"}, "only its text models"),
        ({"model_type": ["llama"]}, 'model_type = ["llama"]: unsupported architecture'),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier = 12.0: no such multiplier is supported"),
        ({"rope_theta": 10**400}, "rope_theta = 1000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: must be a whole number from 1 to 10000"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": "no"}}, 'truncate = "no": must be true or false'),
        ({"model_type": None}, "model_type = null: unsupported architecture"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "allowed for llama: LlamaForCausalLM"),
        ({"rope_scaling": {"rope_type": "longrope"}}, 'rope_scaling: rope_type = "longrope": allowed: default, linear'),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'rope_scaling: type = "dynamic": allowed'),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: the field factor is missing"),
        ({"rope_scaling": "linear"}, 'rope_scaling = "linear": must be an object'),
        ({"rope_theta": -1.0}, "rope_theta = -1.0: must be a positive number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: only rotation of the whole head"),
        ({"attention_bias": True}, "attention_bias = true: biases of q, k, v and o are not supported"),
        ({"mlp_bias": True}, "mlp_bias = true: biases of the MLP are not supported"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu": allowed: silu'),
        ({"hidden_size": None}, "the field hidden_size is missing"),
        ({"hidden_size": 18}, "hidden_size = 18: must be a multiple of num_attention_heads = 4"),
        ({"model_type": "qwen2", "architectures": None, "hidden_size": 18}, "hidden_size = 18: not a multiple of"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mrope_section": [1]}}, "mrope_section = [1]: not"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, 'full_attention = {"rope_theta": 5.0}: not'),
        ({"num_hidden_layers": "two"}, 'num_hidden_layers = "two": must be a whole number from 1 to'),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1: must be true or false"),
        ({"quantization_config": {"bits": 4}}, "quantised safetensors are not read"),
        ({"model_type": "qwen2", "architectures": None, "layer_types": ["linear_attention"] * 2}, "'linear_attention'"),
        ({"model_type": "qwen3", "architectures": None, "layer_types": ["full_attention"]}, "1 entries for 2 layers"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(changes, message):
    with pytest.raises(UserError) as error:
        read(CONFIG | changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_shortest_pattern():
    assert layer_fields(["softmax", "softmax_local"] * 2, 8)["attention.pattern"] == "softmax,softmax_local"
    assert layer_fields(["softmax"] * 2 + ["softmax_local"], 8)["attention.pattern"] == "softmax,softmax,softmax_local"
    fields = layer_fields(["softmax_local"] * 3, 8)
    assert fields == {"attention.kind": "softmax_local", "attention.pattern": "", "attention.local_window": 8}
    assert kinds_of(fields | {"num_layers": 2}) == ["softmax_local"] * 2


def test_a_model_goes_out_as_the_family_that_has_it():
    llama = read(CONFIG)
    assert fitting_family(llama, "w").model_type == "llama"
    assert fitting_family(llama, "w", preferred="mistral").model_type == "mistral"
    assert fitting_family(llama | {"qk_norm": True}, "w", preferred="llama").model_type == "qwen3"
    assert fitting_family(read(GEMMA3_1B), "w").model_type == "gemma3_text"
    without_effect = {"rope_low_freq_factor": 2.0, "attention.query_scale": 0.5, "rope_local_theta": 5.0}
    assert canonical(llama | without_effect) == canonical(llama)
    assert set(FAMILIES) == {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"}


def test_a_model_that_no_family_has_is_refused_with_what_the_nearest_lacks():
    with pytest.raises(UserError, match=r"runs/x: no Hugging Face family has this model; .*model.logit_softcap = 30"):
        fitting_family(read(CONFIG) | {"logit_softcap": 30.0}, "runs/x")
    with pytest.raises(UserError, match="no Hugging Face family"):
        fitting_family(read(CONFIG) | {"qk_norm": True, "qkv_bias": True}, "runs/x")
    with pytest.raises(UserError, match=r"model.causal = False \(llama: True\)"):  # a field that no family reads
        fitting_family(read(CONFIG) | {"causal": False}, "runs/x")
    for name, value in (("decay", "gate"), ("positions", "alibi"), ("conv_width", 4)):  # of every mechanism
        with pytest.raises(UserError, match=rf"lacks model.attention.{name} = '?{value}"):
            fitting_family(read(CONFIG) | {f"attention.{name}": value}, "runs/x")
