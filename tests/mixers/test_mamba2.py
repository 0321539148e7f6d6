"""Mamba-2 beside transformers' own, with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from darkformer_jax.mixers.mamba2 import Mamba2
from tests.mixers.test_recurrent import assert_is_theirs, make
from tests.tiny_runs import experiment_of, fresh_state, tiny_config
from tests.tiny_specs import mixer_spec


def transformers_mixer(layer, spec):
    """transformers' mixer with the weights of ours, and an empty cache for it."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers import DynamicCache, Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        num_heads=8, head_dim=8, hidden_size=32, state_size=6, expand=2, n_groups=1, chunk_size=16, num_hidden_layers=1,
        layer_norm_epsilon=spec.norm_eps,
    )  # fmt: skip
    theirs = Mamba2Mixer(config, 0).eval()
    rows = lambda kernel: np.asarray(kernel[...]).reshape(32, -1).T
    columns = lambda *kernels: np.concatenate([np.asarray(k[...]).reshape(4, -1).T for k in kernels])[:, None, ::-1]
    convolutions = layer.conv_x, layer.conv_B, layer.conv_C
    weights = {
        "in_proj.weight": np.concatenate(
            [rows(part.kernel) for part in (layer.z, layer.x, layer.B, layer.C, layer.dt)]
        ),
        "conv1d.weight": columns(*(part.kernel for part in convolutions)),
        "conv1d.bias": np.concatenate([np.asarray(part.bias[...]).ravel() for part in convolutions]),
        "A_log": layer.A_log[...],
        "dt_bias": layer.dt_bias[...],
        "D": layer.D[...],
        "norm.weight": layer.norm.scale[...],
        "out_proj.weight": np.asarray(layer.out_proj.kernel[...]).reshape(-1, 32).T,
    }
    theirs.load_state_dict({name: torch.tensor(np.array(x, np.float32)) for name, x in weights.items()})
    return theirs, DynamicCache(config=config)


def test_it_is_transformers_mixer_in_one_pass_and_token_by_token():
    layer, _ = make("mamba2", embed_dim=32)
    random = np.random.default_rng(0)
    for parameter in (layer.D, layer.norm.scale, layer.conv_x.bias, layer.conv_B.bias, layer.conv_C.bias):
        parameter[...] = jnp.asarray(1 + 0.5 * random.standard_normal(parameter.shape), jnp.float32)
    theirs, cache = transformers_mixer(layer, layer.spec)
    assert_is_theirs(layer, theirs, cache)


def test_its_parameters_start_as_in_the_paper():
    layer = Mamba2(mixer_spec("mamba2", num_heads=64, embed_dim=16), rngs=nnx.Rngs(params=0))
    rates, steps = np.exp(layer.A_log[...]), np.log1p(np.exp(np.asarray(layer.dt_bias[...], np.float64)))
    assert rates.shape == steps.shape == (128,) and np.all(np.asarray(layer.D[...]) == 1)
    assert 1 <= rates.min() < 2 and 15 < rates.max() <= 16 and abs(np.median(rates) - 8.5) < 1.5
    assert 0.00099 < steps.min() < 0.002 and 0.05 < steps.max() < 0.101
    assert abs(np.median(np.log10(steps)) + 2) < 0.25
    assert np.abs(layer.conv_x.kernel[...]).max() == pytest.approx(0.5, abs=0.01)


@pytest.mark.standard_promotion
def test_rates_steps_and_skips_have_no_weight_decay():
    experiment = experiment_of(tiny_config(model__attention__kind="mamba2", model__attention__state_size=8))
    params = fresh_state(experiment).params
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = experiment.optimizer.update(zeros, experiment.optimizer.init(params), params)
    own = updates["blocks_0"]["attention"]
    changed = {name for name, x in own.items() if any(map(np.any, jax.tree.leaves(x)))}
    assert changed == {"z", "x", "B", "C", "dt", "conv_x", "conv_B", "conv_C", "out_proj"}
    assert not any(np.any(own[name]["bias"]) for name in ("conv_x", "conv_B", "conv_C"))


def test_its_state_has_the_size_of_its_heads_whatever_the_length():
    layer, _ = make("mamba2")
    state = layer.init_state(3, 10**6, jnp.bfloat16)
    assert state.scan.values.shape == (3, 8, 6, 8) and state.scan.values.dtype == jnp.float32
    assert [x.shape for x in state.convolution.inputs] == [(3, 3, 8, 8), (3, 3, 1, 6), (3, 3, 1, 6)]
    assert Mamba2.flops(layer.spec, 16) == (
        2 * 24 * (2 * 64 + 2 * 6 + 8) + 2 * 64 * 24  # projections
        + 8 * (64 + 12)  # convolution
        + 4 * 6 * 64  # state
        + 2 * (6 + 64) * 4.5  # own chunk: 1 to 8 tokens
    )  # fmt: skip
