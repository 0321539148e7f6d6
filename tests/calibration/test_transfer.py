"""Attention transfer on tensors small enough to check by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.calibration.transfer import (
    FittedMechanism,
    LayerTensors,
    errors,
    fit,
    matched_log_gain,
    teacher_layers,
)
from darkformer_jax.config.specs import model_spec
from darkformer_jax.mixers import MIXERS
from darkformer_jax.model.network import Network
from tests.tiny_runs import tiny_config

pytestmark = pytest.mark.standard_promotion  # optax


def exact_network(**changes):
    config = tiny_config(model__attention__kind="softmax", model__num_layers=3, **changes)
    return Network.of(model_spec(config, 257))


@pytest.mark.parametrize("decay", ["none", "gate"])
def test_the_teacher_runs_layer_by_layer_as_the_model_does(decay):
    network = exact_network(
        model__attention__pattern="softmax_local,softmax",
        model__attention__local_window=5,
        model__attention__decay=decay,
        model__post_norms=True,
        model__num_kv_heads=1,
        model__qk_norm=True,
    )
    model = network.bind(*network.init(jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 257)
    ones, positions = jnp.ones((2, 12), jnp.int32), jnp.tile(jnp.arange(12), (2, 1))
    x = model.embed(tokens)
    count = 0
    for index, tensors in enumerate(teacher_layers(model, tokens)):
        block = model.layer(index)
        wanted, _ = block.attention.project(block.attention_norm(x), jnp.ones_like(positions), positions)
        for found, part in zip(tensors[:3], wanted, strict=True):
            np.testing.assert_allclose(found, part, atol=1e-5)
        itself = FittedMechanism.of(block.attention.mechanism)
        assert np.max(errors(itself, itself.trainable, tensors)) < 1e-6
        x, _ = block(x, ones, positions, None)
        count += 1
    assert count == 3
    np.testing.assert_allclose(model.final_norm(x), model.hidden(tokens, ones, positions)[0], atol=1e-5)


def sharp_tensors(passages=6, length=48, heads=2):
    """q and k of which a few directions are large, as in pretrained models, and what exact attention makes of them."""
    keys = jax.random.split(jax.random.key(2), 3)
    size = jnp.where(jnp.arange(8) < 2, 3.0, 0.3)
    q, k, v = (jax.random.normal(key, (passages, length, heads, 8)) for key in keys)
    network = exact_network()
    exact = FittedMechanism.of(MIXERS["softmax"](network.spec.pattern[0], 0))
    tensors = LayerTensors(q * size[None, None, None], k * size[None, None, None], v, v, jnp.zeros(k.shape[:3]))
    return network.spec.pattern[0], tensors._replace(exact=exact.attend(exact.trainable, tensors))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_matched_gain_gives_the_far_part_its_exact_weight(decay):
    random = np.random.default_rng(0)
    q, k = random.normal(size=(2, 48, 4, 8)), random.normal(size=(2, 48, 2, 8))
    m = random.normal(size=(2, 8, 8)) / 3
    decays = -decay * random.random((2, 48, 2))
    summed = np.cumsum(decays, axis=1)
    tensors = LayerTensors(*(jnp.asarray(x, jnp.float32) for x in (q, k, k, q, decays)))
    found = matched_log_gain(tensors, jnp.asarray(m, jnp.float32), scale=0.5, chunk_size=8, window=16, num_sinks=3)
    for head in range(4):
        gains, shares = [], []
        for passage, i in np.ndindex(2, 48):
            far = [j for j in range(i + 1) if j >= 3 and j < i // 8 * 8 - 16]
            kept = np.exp(summed[passage, i, head // 2] - summed[passage, : i + 1, head // 2])
            exact = np.exp(0.5 * k[passage, : i + 1, head // 2] @ q[passage, i, head]) * kept
            mq, mk = m[head // 2] @ q[passage, i, head], k[passage, far, head // 2] @ m[head // 2].T
            if far:
                gains.append(np.log(exact[far].sum() / (np.exp(0.5 * mk @ mq) * kept[far]).sum()))
                shares.append(exact[far].sum() / exact.sum())
        np.testing.assert_allclose(found[head], np.average(gains, weights=shares), rtol=1e-5, atol=1e-5)
    none = matched_log_gain(tensors, jnp.asarray(m, jnp.float32), scale=0.5, chunk_size=48, window=0, num_sinks=0)
    assert not none.any()  # no query has a far key


@pytest.mark.parametrize("kind", ["dark", "lfk"])
def test_fitting_brings_attention_closer_on_passages_it_has_not_seen(kind):
    spec, tensors = sharp_tensors()
    train, test = (jax.tree.map(lambda leaf, part=part: leaf[part], tensors) for part in (slice(2, 6), slice(0, 2)))
    mechanism = FittedMechanism.of(MIXERS[kind](spec, 0))
    trained = fit(mechanism, train, jax.random.key(0), steps=60, passages=2, learning_rate=0.03)
    before, after = (np.mean(errors(mechanism, state, test)) for state in (mechanism.trainable, trained))
    assert after < 0.95 * before
    again = fit(mechanism, train, jax.random.key(0), steps=60, passages=2, learning_rate=0.03)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), trained, again))


def test_the_error_is_relative_and_a_heads_own():
    spec, tensors = sharp_tensors()
    mechanism = FittedMechanism.of(MIXERS["performer"](spec, 0))
    out = np.asarray(mechanism.attend(mechanism.trainable, tensors), np.float64)
    exact = np.asarray(tensors.exact, np.float64)
    wanted = [np.linalg.norm((out - exact)[:, :, h]) / np.linalg.norm(exact[:, :, h]) for h in range(2)]
    np.testing.assert_allclose(errors(mechanism, mechanism.trainable, tensors), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("dark", {"window_kernel": "softmax", "far_gain": True, "far_horizon": 20, "learn_projections": True}),
        ("dark", {"window_kernel": "softmax", "window": 16, "num_sinks": 3}),
        ("performer", {"far_gain": True, "num_sinks": 0}),
        ("lfk", {"query_scale": 0.7}),
    ],
)
def test_what_is_seen_exactly_is_computed_once_and_nothing_else_changes(kind, changes):
    """Outputs and gradients are those of the mechanism itself, also where the last chunk is not full."""
    spec, tensors = sharp_tensors(length=45, heads=4)
    sizes = {"kind": kind, "num_heads": 4, "num_kv_heads": 2, "window": 8, "chunk_size": 8, "num_sinks": 5}
    spec = dataclasses.replace(spec, **{**sizes, "num_features": 16, **changes})
    tensors = tensors._replace(k=tensors.k[:, :, :2], v=tensors.v[:, :, :2])
    mechanism = FittedMechanism.of(MIXERS[kind](spec, 0))
    near = mechanism.near(tensors)
    assert near is not None

    def out_and_gradient(near):
        def loss(trained):
            out = mechanism.attend(trained, tensors, near)
            return jnp.sum(jnp.square(out - tensors.exact)), out

        (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(mechanism.trainable)
        return out, gradient

    (found, gradient), (wanted, other) = out_and_gradient(near), out_and_gradient(None)
    np.testing.assert_allclose(found, wanted, atol=1e-5)  # logits of 30, rounded in float32
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True)
    assert all(np.abs(b).max() > 1e-3 for _, b in pairs), "nothing to compare"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max()), gradient, other)


def test_a_part_of_the_queries_gets_what_it_gets_among_all():
    """Every fourth one, from any start; the last chunk has one of them, or none."""
    spec, tensors = sharp_tensors(length=41)
    sizes = {"window": 8, "chunk_size": 8, "num_sinks": 3, "window_kernel": "softmax"}
    mechanism = FittedMechanism.of(MIXERS["dark"](dataclasses.replace(spec, kind="dark", **sizes), 0))
    near = mechanism.near(tensors)
    all_of_them = mechanism.attend(mechanism.trainable, tensors, near)
    for start in range(4):
        places = np.arange(start, 40, 4)
        some = tensors._replace(q=tensors.q[:, places])
        few = jax.tree.map(lambda leaf, places=places: leaf[:, places], near)
        found = mechanism.attend(mechanism.trainable, some, few, stride=4)
        np.testing.assert_allclose(found, all_of_them[:, places], atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"window_kernel": "dark"}, {"window": 0, "num_sinks": 0}, {"decay": "learned", "window_kernel": "softmax"}],
)
def test_what_is_seen_exactly_is_not_reused_where_it_learns_or_decays(changes):
    spec, tensors = sharp_tensors()
    spec = dataclasses.replace(spec, **{"kind": "dark", "window": 8, "chunk_size": 8, **changes})
    assert FittedMechanism.of(MIXERS["dark"](spec, 0)).near(tensors) is None
