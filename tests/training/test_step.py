import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from darkformer_jax.config.specs import model_spec
from darkformer_jax.mixers.features import draw_layer
from darkformer_jax.model.network import Network
from darkformer_jax.model.trainable import trained_paths
from darkformer_jax.tasks.next_token import NextToken, predict, token_sums
from darkformer_jax.training.step import TrainState, from_saved, make_train_step, to_saved
from tests.tiny_runs import experiment_of, fresh_state, random_batch, tiny_config

Z_LOSS = 0.3


@functools.cache
def network(kind="softmax"):
    return Network.of(model_spec(tiny_config(model__attention__kind=kind), 257))


# Gradient descent that keeps the last gradient: parameters' differences would be rounded to the parameters' precision.
SGD = optax.chain(optax.trace(decay=0.0), optax.scale(-0.5))


@functools.cache
def step_function(kind="softmax", accumulation_steps=1, redraw_every=0):
    make = make_train_step(
        network(kind),
        NextToken(257, 32, Z_LOSS),
        SGD,
        lambda step: jnp.float32(0.5),
        accumulation_steps=accumulation_steps,
        redraw_every=redraw_every,
        trained=trained_paths(network(kind), "all"),
    )
    return jax.jit(make)


@functools.cache
def start(kind="softmax"):
    params, projections = jax.jit(network(kind).init)(jax.random.key(1))
    return TrainState(jnp.zeros((), jnp.int32), params, projections, SGD.init(params))


def gradients_of(new_state):
    return jax.tree.map(np.float64, new_state.optimizer[0].trace)


def relative_difference(a, b):
    """|a - b| / |b|, the largest over the arrays."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in pairs)


@functools.cache
def sums_of():
    return jax.jit(lambda batch: token_sums(predict(network().bind(*start()[1:3]), batch), batch))


def direct_gradient(batch):
    """The gradient of mean nll + Z_LOSS * mean log_normalizer^2, written down again."""
    state, inputs = start(), [jnp.asarray(batch[name]) for name in ("inputs", "segment_ids", "positions")]

    def loss(params):
        logits, _ = network().bind(params, state.projections)(*inputs)
        log_normalizer = jax.nn.logsumexp(logits, axis=-1)
        nll = log_normalizer - jnp.sum(logits * jax.nn.one_hot(batch["targets"], 257), axis=-1)
        weights = batch["weights"] / batch["weights"].sum()
        return jnp.sum(weights * nll) + Z_LOSS * jnp.sum(weights * log_normalizer**2)

    return jax.jit(jax.grad(loss))(state.params)


def test_accumulation_over_four_micro_batches_is_one_batch_whatever_their_token_counts():
    batch = random_batch(0, rows=8)
    counts = batch["weights"].sum(axis=1)
    assert counts.max() > 5 * counts.min()
    whole, metrics = step_function()(start(), batch)
    parts, metrics_of_parts = step_function(accumulation_steps=4)(start(), batch)
    assert relative_difference(gradients_of(parts), gradients_of(whole)) < 1e-6
    for name in ("loss", "accuracy", "tokens", "grad_norm"):
        np.testing.assert_allclose(metrics_of_parts[name], metrics[name], rtol=1e-6, err_msg=name)
    # The mean of the micro-batches' means is something else, by far more than the tolerance.
    sums = [sums_of()({name: rows[a::4] for name, rows in batch.items()}) for a in range(4)]
    of_means = np.mean([float(part["nll"] / part["weight"]) for part in sums])
    assert abs(of_means / float(metrics["loss"]) - 1) > 1e-4


def test_accumulation_of_dark_is_the_sum_of_its_micro_batches():
    batch = random_batch(0, rows=8)
    state, metrics = step_function("dark", accumulation_steps=4)(start("dark"), batch)
    accumulated, total = gradients_of(state), float(metrics["tokens"])
    of_parts = []
    for a in range(4):
        part, metrics = step_function("dark")(start("dark"), {name: rows[a::4] for name, rows in batch.items()})
        of_parts.append(jax.tree.map(lambda g, tokens=float(metrics["tokens"]): g * tokens / total, gradients_of(part)))
    assert relative_difference(accumulated, jax.tree.map(lambda *parts: sum(parts), *of_parts)) < 1e-6


def test_a_micro_batch_of_padding_alone_changes_nothing():
    batch = random_batch(1, rows=8)
    for values in batch.values():
        values[1::4] = 0
    whole, _ = step_function()(start(), batch)
    parts, _ = step_function(accumulation_steps=4)(start(), batch)
    assert relative_difference(gradients_of(parts), gradients_of(whole)) < 1e-6


def test_a_batch_of_padding_alone_is_harmless():
    nothing = {name: np.zeros_like(values) for name, values in random_batch(0, rows=8).items()}
    state, metrics = step_function()(start(), nothing)
    assert float(metrics["loss"]) == float(metrics["grad_norm"]) == float(metrics["tokens"]) == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, start().params)
    assert int(state.step) == 1


def test_what_padding_holds_does_not_matter():
    batch = random_batch(2, rows=8)
    other = dict(batch)
    for name in ("inputs", "targets"):
        other[name] = np.where(batch["weights"] == 0, 99, batch[name]).astype(np.int32)
    a, metrics_a = step_function()(start(), batch)
    b, metrics_b = step_function()(start(), other)
    assert float(metrics_a["loss"]) == float(metrics_b["loss"])
    assert relative_difference(gradients_of(a), gradients_of(b)) < 1e-6


def test_the_gradient_is_that_of_the_mean_over_real_tokens_with_z_loss():
    batch = random_batch(3, rows=8)
    state, metrics = step_function()(start(), batch)
    wanted = direct_gradient(batch)
    assert relative_difference(gradients_of(state), wanted) < 1e-5
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(wanted), rtol=1e-5)
    sums = sums_of()(batch)
    np.testing.assert_allclose(metrics["z_loss"], Z_LOSS * sums["z"] / sums["weight"], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], sums["nll"] / sums["weight"], rtol=1e-5)  # without the z-loss
    assert float(metrics["learning_rate"]) == 0.5


def test_redraws_come_at_their_steps_and_a_resumed_run_makes_the_same_ones():
    step, batch = step_function("dark", redraw_every=2), random_batch(4, rows=8)
    spec = network("dark").spec.pattern[0]
    state, states = start("dark"), []
    for _ in range(6):
        state, _ = step(state, batch)
        states.append(state)
    drawn = [np.asarray(s.projections["blocks_0"]["attention"]["mechanism"]["projections"][0]) for s in states]
    for made, projections in enumerate(drawn):  # `made` updates before this one
        wanted = jax.jit(draw_layer, static_argnums=(0, 1))(spec, 0, made // 2)
        np.testing.assert_allclose(projections, wanted, rtol=1e-5, atol=1e-6, err_msg=f"update {made}")
    assert not np.allclose(drawn[1], drawn[2]) and not np.allclose(drawn[3], drawn[4])
    # Through the saved form, from a state before a redraw.
    resumed = from_saved(jax.tree.map(np.asarray, to_saved(states[2])), states[2])
    for _ in range(3):
        resumed, _ = step(resumed, batch)
    jax.tree.map(np.testing.assert_array_equal, resumed, states[5])


def test_without_redraws_projections_stay():
    state, _ = step_function("dark")(start("dark"), random_batch(0, rows=8))
    jax.tree.map(np.testing.assert_array_equal, state.projections, start("dark").projections)


@pytest.mark.parametrize("kind", ["dark", "softmax"])  # softmax has no projections: an empty dict
def test_saved_form_and_back(kind):
    experiment = experiment_of(tiny_config(model__attention__kind=kind))
    state = fresh_state(experiment)
    saved = to_saved(state)
    assert all(jax.tree.leaves(branch) for branch in saved.values())  # a checkpoint holds no empty dict
    assert ("projections" in saved) == (kind == "dark")
    again = from_saved(saved, experiment.abstract)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)
