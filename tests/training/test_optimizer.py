import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.config.specs import model_spec
from darkformer_jax.model.network import Network
from darkformer_jax.training.optimizer import make_optimizer, make_schedule
from tests.tiny_runs import tiny_config

LEARNING_RATE, GEOMETRY_RATE = 0.01, 0.0003


@functools.cache
def network():
    config = tiny_config(
        model__num_layers=2, model__attention__pattern="dark,lfk", model__qk_norm=True, model__qkv_bias=True
    )
    return Network.of(model_spec(config, 17))


@functools.cache
def params():
    rng = np.random.default_rng(1)
    return network().map_params(lambda _, variable: jnp.asarray(rng.normal(size=variable.shape), jnp.float32))


def config_of(**changes):
    fields = {
        "warmup_steps": 0,
        "schedule": "constant",
        "learning_rate": LEARNING_RATE,
        "geometry_learning_rate": GEOMETRY_RATE,
        "weight_decay": 0.1,
        "clip_norm": 0.0,
    } | changes
    return tiny_config(**{f"optimizer__{name}": value for name, value in fields.items()}).optimizer


def named(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def one_update(gradients, **changes):
    optimizer = make_optimizer(config_of(**changes), 100, network())
    updates, state = jax.jit(optimizer.update)(gradients, optimizer.init(params()), params())
    return named(updates), state


def is_geometry(name):
    return "['M']" in name or "['projections']" in name


def is_norm(name):
    return "norm" in name


def is_bias(name):
    return "['bias']" in name


def test_the_model_has_what_these_tests_distinguish():
    names = list(named(params()))
    assert sum(map(is_geometry, names)) == 2
    assert (
        sum(map(is_norm, names)) == 9
    )  # two norms of q and k, two of the block, for each of two places; the final one
    assert sum(map(is_bias, names)) == 6
    assert any("embedding" in name for name in names)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        # updates 1, 5, 10 (the end of warm-up), 55 (half-way), 100, 150
        ("cosine", [0.1, 0.5, 1.0, 0.2 + 0.8 * 0.5, 0.2, 0.2]),
        ("rsqrt", [0.1, 0.5, 1.0, (10 / 55) ** 0.5, (10 / 100) ** 0.5, (10 / 150) ** 0.5]),
        ("constant", [0.1, 0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules(kind, values):
    schedule = make_schedule(config_of(warmup_steps=10, schedule=kind, final_fraction=0.2), 100, 3.0)
    made_before = np.array([1, 5, 10, 55, 100, 150]) - 1
    np.testing.assert_allclose([float(schedule(count)) for count in made_before], 3.0 * np.array(values), rtol=1e-5)


def test_without_warm_up_the_first_update_is_at_the_peak():
    schedule = make_schedule(config_of(warmup_steps=0, schedule="rsqrt"), 100, 3.0)
    assert float(schedule(0)) == 3.0


def test_weight_decay_is_of_matrices_alone():
    updates, _ = one_update(jax.tree.map(jnp.zeros_like, params()))
    for name, before in named(params()).items():
        if is_geometry(name) or is_norm(name) or is_bias(name):
            np.testing.assert_array_equal(updates[name], 0, err_msg=name)
        else:
            np.testing.assert_allclose(updates[name], -LEARNING_RATE * 0.1 * before, rtol=1e-5, err_msg=name)
            assert np.abs(updates[name]).max() > 0, name


def test_m_and_learned_projections_have_their_own_learning_rate():
    updates, _ = one_update(jax.tree.map(jnp.ones_like, params()), weight_decay=0.0)
    for name, update in updates.items():
        rate = GEOMETRY_RATE if is_geometry(name) else LEARNING_RATE
        np.testing.assert_allclose(update, -rate, rtol=1e-4, err_msg=name)  # Adam's first update is the sign
    updates, _ = one_update(jax.tree.map(jnp.ones_like, params()), geometry_learning_rate=0.0)
    assert all((update == 0).all() == is_geometry(name) for name, update in updates.items())


def test_both_rates_follow_the_schedule_of_the_count_in_the_state():
    optimizer = make_optimizer(config_of(warmup_steps=10, weight_decay=0.0), 100, network())
    update, ones = jax.jit(optimizer.update), jax.tree.map(jnp.ones_like, params())
    state = optimizer.init(params())
    for count in range(1, 4):
        updates, state = update(ones, state, params())
        for name, value in named(updates).items():
            peak = GEOMETRY_RATE if is_geometry(name) else LEARNING_RATE
            np.testing.assert_allclose(value, -peak * count / 10, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(("clip_norm", "expected"), [(1.0, 1.0), (0.0, None), (1e6, None)])
def test_clipping_is_by_the_norm_of_all_gradients_together(clip_norm, expected):
    gradients = jax.tree.map(lambda x: jnp.full_like(x, 0.5), params())
    norm = np.sqrt(sum((leaf**2).sum() for leaf in named(gradients).values()))
    _, state = one_update(gradients, clip_norm=clip_norm, b1=0.9)
    adam = next(part for part in state if hasattr(part, "mu"))
    clipped = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in named(adam.mu).values())) / 0.1
    np.testing.assert_allclose(clipped, norm if expected is None else expected, rtol=1e-5)


def test_three_updates_of_a_matrix_are_adamw_as_written_in_its_paper():
    optimizer = make_optimizer(config_of(b1=0.9, b2=0.95, eps=1e-8), 100, network())
    update, state, now = jax.jit(optimizer.update), optimizer.init(params()), params()
    name = "['embedding']"
    weights = named(now)[name].astype(np.float64)
    m = v = np.zeros_like(weights)
    rng = np.random.default_rng(0)
    for t in range(1, 4):
        gradients = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), now)
        g = named(gradients)[name].astype(np.float64)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        adam = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        weights = weights - LEARNING_RATE * (adam + 0.1 * weights)
        updates, state = update(gradients, state, now)
        now = jax.tree.map(jnp.add, now, updates)
    np.testing.assert_allclose(named(now)[name], weights, atol=1e-6)
