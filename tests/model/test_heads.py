import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from darkformer_jax.config.specs import model_spec
from darkformer_jax.errors import UserError
from darkformer_jax.model.heads import pool
from darkformer_jax.model.network import Network
from darkformer_jax.model.trainable import trained_paths
from tests.tiny_runs import tiny_config


def network_of(num_outputs=3, **fields):
    return Network.of(model_spec(tiny_config(**fields), 257, num_outputs))


def test_the_last_real_token_or_the_mean_over_real_tokens_by_hand():
    hidden = jnp.arange(12, dtype=jnp.float32).reshape(3, 4, 1)
    segments = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    assert pool(hidden, segments, "last")[:, 0].tolist() == [3.0, 5.0, 0.0]
    assert pool(hidden, segments, "mean")[:, 0].tolist() == [1.5, 4.5, 0.0]
    assert pool(hidden.astype(jnp.bfloat16), segments, "mean").dtype == jnp.float32


@pytest.mark.parametrize("tied", [True, False])
def test_a_classifier_is_a_language_model_with_another_head(tied):
    with_head, without = network_of(model__tie_embeddings=tied), network_of(0, model__tie_embeddings=tied)
    params, others = (flatten_dict(network.init(jax.random.key(0))[0]) for network in (with_head, without))
    assert params.keys() - others.keys() == {("classifier", "kernel"), ("classifier", "bias")}
    assert others.keys() - params.keys() == (set() if tied else {("head",)})
    for path in params.keys() & others.keys():
        np.testing.assert_array_equal(params[path], others[path])
    assert params["classifier", "kernel"].shape == (32, 3)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("kind", ["dark", "softmax"])
def test_padding_changes_no_output(kind, pooling):
    network = network_of(model__attention__kind=kind)
    network = Network.of(dataclasses.replace(network.spec, pooling=pooling))
    params, projections = network.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 20), 0, 257)

    def outputs(length):
        index = jnp.arange(length)
        segments = jnp.broadcast_to((index < 20).astype(jnp.int32), (2, length))
        padded = jnp.pad(tokens, ((0, 0), (0, length - 20)))
        model = network.bind(params, projections)
        return model.outputs(padded, segments, jnp.broadcast_to(index, (2, length)))

    np.testing.assert_allclose(
        jax.jit(outputs, static_argnums=0)(20), jax.jit(outputs, static_argnums=0)(40), atol=2e-5
    )


@pytest.mark.parametrize("regime", ["qkv_geometry", "geometry", "lora"])
def test_every_regime_trains_the_head_that_no_pretrained_model_has(regime):
    rank = 2 if regime == "lora" else 0
    network = network_of(model__lora_rank=rank, optimizer__train=regime)
    assert {("classifier", "kernel"), ("classifier", "bias")} < trained_paths(network, regime)


def test_a_head_alone_is_no_geometry():
    with pytest.raises(UserError, match="a model of softmax layers has no M"):
        trained_paths(network_of(model__attention__kind="softmax"), "geometry")
