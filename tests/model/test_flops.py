import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.config.specs import model_spec
from darkformer_jax.mixers.features import mean_exact_keys
from darkformer_jax.mixers.spec import MixerSpec
from darkformer_jax.model.flops import peak_flops, train_step_flops
from darkformer_jax.model.spec import ModelSpec
from tests.tiny_runs import tiny_config
from tests.tiny_specs import mixer_spec

MLP_AND_LOGITS = 6 * 32 * 96 + 2 * 32 * 257


def model(*mixers: MixerSpec) -> ModelSpec:
    config = tiny_config(model__mlp_dim=96)
    return dataclasses.replace(model_spec(config, 257), pattern=mixers, num_layers=len(mixers))


def mixer(kind: str, **changes: Any) -> MixerSpec:
    return mixer_spec(kind, **{"embed_dim": 32, "num_features": 16, "chunk_size": 16, **changes})


def layer(kind: str, sequence_length: int = 64, **changes: Any) -> float:
    """Forward FLOPs per token of one layer's attention, without the MLP and the logits."""
    return train_step_flops(model(mixer(kind, **changes)), sequence_length, tokens=1) / 3 - MLP_AND_LOGITS


def test_a_layer_by_hand() -> None:
    # D 32, H d 32, G d 16, m 16, L 64, C 16. Projections: q 2*32*32, k and v 2*32*16 each, o 2*32*32.
    projections = 2 * 32 * (32 + 16 + 16 + 32)
    assert layer("softmax") == projections + 4 * (2 * 8 + 2 * 8) * 32.5
    features = (4 + 2) * 2 * 16 * 8
    state, read = 2 * 2 * 16 * 8, 4 * 2 * 16 * 8
    chunk = 4 * (2 * 16 + 2 * 8) * 8.5
    assert layer("performer") == layer("lfk") == projections + features + state + read + chunk
    assert layer("dark") == layer("performer") + (4 + 2) * 2 * 8 * 8
    assert layer("constant") == projections / 2
    assert layer("random") == projections / 2 + 4 * 2 * 8 * 32.5
    assert layer("random", causal=False) == projections / 2 + 4 * 2 * 8 * 64
    # Own chunk 8.5; then 16 before it for three chunks of four.
    exact = 4 * (2 * 8 + 2 * 8) * (8.5 + 16 * 3 / 4)
    assert layer("window_only", window=16) == projections + exact
    # 1, 2, 3, then 4 keys.
    assert layer("softmax_local", local_window=4) == projections + 4 * (2 * 8 + 2 * 8) * (4 - 6 / 64)
    assert layer("performer", window=16) == projections + features + state + read + exact


def test_a_window_over_the_whole_sequence_is_exact_attention() -> None:
    assert layer("window_only", window=64) == layer("softmax")
    assert layer("softmax_local", local_window=64) == layer("softmax_local", local_window=99) == layer("softmax")


def test_model_is_the_sum_of_its_layers_and_grows_with_tokens() -> None:
    mixed = train_step_flops(model(mixer("softmax"), mixer("dark")), sequence_length=64, tokens=100)
    assert mixed == pytest.approx(3 * 100 * (layer("softmax") + layer("dark") + MLP_AND_LOGITS + 6 * 32 * 96))


def test_linear_attention_costs_the_same_a_token_at_any_length() -> None:
    assert layer("dark", sequence_length=65_536) == layer("dark", sequence_length=4_096)
    assert layer("softmax", sequence_length=65_536) > 10 * layer("dark", sequence_length=65_536)


def test_exact_layers_agree_with_the_compiler() -> None:
    # XLA counts the same matmuls (and a little for the softmax, which is not counted here); it computes all L^2 pairs.
    length, heads, dim, width = 64, 4, 8, 32

    def attention(x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, o: jax.Array) -> jax.Array:
        split = [(x @ w).reshape(length, heads, dim) for w in (q, k, v)]
        weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", split[0], split[1]), axis=-1)
        return jnp.einsum("hqk,khd->qhd", weights, split[2]).reshape(length, width) @ o

    matrix = jax.ShapeDtypeStruct((width, width), jnp.float32)
    compiled = jax.jit(attention).lower(jax.ShapeDtypeStruct((length, width), jnp.float32), *[matrix] * 4).compile()
    counted: Any = compiled.cost_analysis()
    projections = 4 * 2 * width * width
    ours = projections + (layer("softmax", num_kv_heads=4) - projections) * length / ((length + 1) / 2)
    assert counted["flops"] == pytest.approx(ours * length, rel=0.1)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 100])
@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (16, 0), (16, 4), (32, 20), (0, 4)])
def test_exact_keys_against_a_mask(length: int, window: int, sinks: int) -> None:
    q, k = np.arange(length)[:, None], np.arange(length)[None, :]
    near = k >= q // 16 * 16 - window
    seen = (k <= q) & (near | (k < sinks))
    spec = dataclasses.replace(mixer("dark"), window=window, num_sinks=sinks)
    assert mean_exact_keys(spec, length) == pytest.approx(seen.sum() / length)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("TPU v4 lite", None),
        ("cpu", None),
    ],
)
def test_peak_of_known_devices(kind: str, peak: float | None) -> None:
    assert peak_flops(kind) == peak


def test_no_peak_is_claimed_for_this_cpu() -> None:
    assert peak_flops(jax.devices("cpu")[0].device_kind) is None


@pytest.mark.parametrize(("kind", "convolved"), [("softmax", 4 + 2 + 2), ("constant", 2)])  # heads of q, k and v; of v
def test_a_convolution_and_a_gate_add_their_own_products(kind, convolved):
    plain, width, head_dim = layer(kind), 3, 8
    assert layer(kind, conv_width=width) - plain == 2 * width * convolved * head_dim
    assert layer(kind, decay="gate") - plain == 2 * 32 * 2  # embed_dim and key/value heads
    assert layer(kind, decay="learned") == layer(kind, positions="alibi") == plain
