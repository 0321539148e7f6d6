"""Gated DeltaNet beside the layer of transformers' Qwen3-Next, with the same weights."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from darkformer_jax.mixers.gated_deltanet import GatedDeltaNet
from tests.mixers.test_recurrent import assert_is_theirs, make
from tests.tiny_specs import mixer_spec


def transformers_layer(layer, spec):
    """transformers' layer with the weights of ours, and an empty cache for it."""
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    from transformers import DynamicCache, Qwen3NextConfig

    config = Qwen3NextConfig(
        hidden_size=32, linear_num_value_heads=4, linear_num_key_heads=4, linear_key_head_dim=8, num_hidden_layers=1,
        linear_value_head_dim=16, linear_conv_kernel_dim=4, rms_norm_eps=spec.norm_eps,
        layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = module.Qwen3NextGatedDeltaNet(config, 0).eval()
    rows = lambda *parts: np.concatenate([np.asarray(part.kernel[...]) for part in parts], axis=-1).reshape(32, -1).T
    scalars = lambda *parts: np.stack([np.asarray(part.kernel[...]) for part in parts], axis=-1).reshape(32, -1).T
    convolutions = layer.conv_q, layer.conv_k, layer.conv_v
    columns = [np.asarray(part.kernel[...]).reshape(4, -1).T[:, None, ::-1] for part in convolutions]
    weights = {
        "in_proj_qkvz.weight": rows(layer.in_q, layer.in_k, layer.in_v, layer.in_z),  # head by head
        "in_proj_ba.weight": scalars(layer.in_b, layer.in_a),
        "conv1d.weight": np.concatenate(columns),
        "A_log": layer.A_log[...],
        "dt_bias": layer.dt_bias[...],
        "norm.weight": layer.norm.scale[...],
        "out_proj.weight": np.asarray(layer.out_proj.kernel[...]).reshape(-1, 32).T,
    }
    theirs.load_state_dict({name: torch.tensor(np.array(x, np.float32)) for name, x in weights.items()})
    return theirs, DynamicCache(config=config)


def test_it_is_the_layer_of_transformers_in_one_pass_and_token_by_token():
    layer, _ = make("gated_deltanet", embed_dim=32)
    random = np.random.default_rng(0)
    layer.norm.scale[...] = jnp.asarray(1 + 0.5 * random.standard_normal(16), jnp.float32)
    theirs, cache = transformers_layer(layer, layer.spec)
    assert_is_theirs(layer, theirs, cache)


def test_its_parameters_start_as_in_the_paper():
    layer = GatedDeltaNet(mixer_spec("gated_deltanet", num_heads=128, embed_dim=16), rngs=nnx.Rngs(params=0))
    rates, steps = np.exp(layer.A_log[...]), np.log1p(np.exp(np.asarray(layer.dt_bias[...], np.float64)))
    assert rates.shape == steps.shape == (128,)
    assert 0 < rates.min() < 1 and 15 < rates.max() <= 16
    assert 0.00099 < steps.min() < 0.002 and 0.05 < steps.max() < 0.101


def test_its_state_has_the_size_of_its_heads_whatever_the_length():
    layer, _ = make("gated_deltanet")
    state = layer.init_state(3, 10**6, jnp.bfloat16)
    assert state.scan.values.shape == (3, 4, 8, 16) and state.scan.values.dtype == jnp.float32
    assert [x.shape for x in state.convolution.inputs] == [(3, 3, 4, 8), (3, 3, 4, 8), (3, 3, 4, 16)]
    assert GatedDeltaNet.flops(layer.spec, 16) == (
        2 * 24 * 4 * (16 + 32 + 2) + 2 * 64 * 24  # projections
        + 8 * 4 * (16 + 16)  # convolution
        + 6 * 4 * 8 * 16  # state
        + 4 * 4 * (8 + 16) * 4.5  # own chunk: 1 to 8 tokens
    )  # fmt: skip
