import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from darkformer_jax.data.tokenizers import BytesTokenizer
from darkformer_jax.errors import UserError
from darkformer_jax.model.token_loss import kl_divergence
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.next_token import NextToken
from darkformer_jax.tasks.teacher import Teacher
from darkformer_jax.training.step import TrainState, make_train_step
from tests.tiny_runs import (
    experiment_of,
    fresh_state,
    metrics_without_time,
    random_batch,
    run,
    saved_arrays,
    tiny_config,
    write_text,
    write_workdir,
)

pytestmark = pytest.mark.standard_promotion  # an optimizer runs

WEIGHT, Z_LOSS = 0.3, 0.1
STUDENT = {"model__attention__kind": "softmax"}  # which compiles fastest
TEACHER = STUDENT | {"model__mlp_dim": 48, "seed": 5}


@functools.cache
def experiment(**changes):
    return experiment_of(tiny_config(**STUDENT | changes))


@functools.cache
def teacher():
    """A model of another width; sharper than a fresh one, which is nearly uniform."""
    state = fresh_state(experiment(**TEACHER))
    return jax.tree.map(lambda leaf: 3 * leaf, state.params), state.projections


def kl_by_hand(p_logits, q_logits):
    p, q = (np.exp(np.float64(x)) for x in (p_logits, q_logits))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return (p * np.log(p / q)).sum(-1)


def test_the_divergence_is_the_sum_over_the_vocabulary():
    p, q = np.random.default_rng(0).normal(size=(2, 3, 5, 11)).astype(np.float32) * 4
    np.testing.assert_allclose(kl_divergence(p, q), kl_by_hand(p, q), rtol=1e-5, atol=1e-6)
    assert kl_by_hand(p, q).min() > 0.5 and np.abs(kl_by_hand(p, q) - kl_by_hand(q, p)).max() > 1
    np.testing.assert_allclose(kl_divergence(p, p + 7), 0, atol=1e-5)
    far = jnp.array([0.0, -1e4, 1e4])  # probabilities that float32 rounds to zero
    assert np.isfinite(kl_divergence(far, -far)) and float(kl_divergence(far, far)) == 0


@functools.cache
def one_step(accumulation_steps=1, distilled=True):
    """The student's state, and the gradient and the metrics of one step on rows of very unequal length."""
    e, optimizer = experiment(), optax.trace(decay=0.0)  # which keeps the gradient
    objective = NextToken(257, 32, Z_LOSS)
    if distilled:
        objective = dataclasses.replace(objective, teacher=experiment(**TEACHER).network, teacher_weight=WEIGHT)
    options = {"accumulation_steps": accumulation_steps, "redraw_every": 0, "trained": e.trained}
    step = jax.jit(make_train_step(e.network, objective, optimizer, e.schedule, **options))
    start = fresh_state(e)
    start = TrainState(start.step, start.params, start.projections, optimizer.init(start.params))
    state, metrics = step(start, random_batch(0), *((teacher(),) if distilled else ()))
    return start, state.optimizer.trace, metrics


def relative_difference(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(np.linalg.norm(np.float64(x) - y) / np.linalg.norm(np.float64(y)) for x, y in pairs)


def test_loss_and_gradient_are_those_of_the_weighted_sum_over_real_tokens():
    start, gradients, metrics = one_step()
    batch = random_batch(0)
    inputs = [jnp.asarray(batch[name]) for name in ("inputs", "segment_ids", "positions")]
    wanted = experiment(**TEACHER).network.bind(*teacher())(*inputs)[0]
    weights = batch["weights"] / batch["weights"].sum()

    def loss(params):
        logits, _ = experiment().network.bind(params, start.projections)(*inputs)
        log_q, p = jax.nn.log_softmax(logits), jax.nn.softmax(wanted)
        nll = -jnp.sum(log_q * jax.nn.one_hot(batch["targets"], 257), axis=-1)
        divergence = jnp.sum(p * (jax.nn.log_softmax(wanted) - log_q), axis=-1)
        z = jnp.square(jax.nn.logsumexp(logits, axis=-1))
        total = jnp.sum(weights * ((1 - WEIGHT) * nll + WEIGHT * divergence + Z_LOSS * z))
        return total, (logits, jnp.sum(weights * nll))

    direct, (logits, nll) = jax.jit(jax.grad(loss, has_aux=True))(start.params)
    assert relative_difference(gradients, direct) < 2e-5
    np.testing.assert_allclose(metrics["loss"], nll, rtol=1e-5)  # cross-entropy alone, whatever the weight
    by_hand = np.sum(weights * kl_by_hand(wanted, logits))
    np.testing.assert_allclose(metrics["distill"], by_hand, rtol=1e-5)
    assert by_hand > 0.5
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(direct), rtol=1e-4)


def test_micro_batches_add_up_and_without_a_teacher_nothing_is_reported():
    _, gradients, metrics = one_step()
    _, of_parts, metrics_of_parts = one_step(accumulation_steps=2)
    assert relative_difference(of_parts, gradients) < 5e-6
    for name in ("loss", "distill", "accuracy"):
        np.testing.assert_allclose(metrics_of_parts[name], metrics[name], rtol=1e-6)
    _, plain, plain_metrics = one_step(distilled=False)
    assert "distill" not in plain_metrics and relative_difference(plain, gradients) > 0.01
    np.testing.assert_allclose(plain_metrics["loss"], metrics["loss"], rtol=1e-6)


def test_what_is_no_teacher_of_this_model(tmp_path):
    def load(fingerprint=BytesTokenizer.fingerprint, workdir=tmp_path, **changes):
        config = tiny_config(**STUDENT | changes, distill__workdir=str(workdir), distill__weight=WEIGHT)
        return Teacher.of(config, 257, fingerprint)

    with pytest.raises(UserError, match=f"{tmp_path}/none/config.json cannot be read"):
        load(workdir=tmp_path / "none")
    state = write_workdir(tmp_path, experiment(**TEACHER).config)
    loaded = load()
    jax.tree.map(np.testing.assert_array_equal, loaded.arrays, (state.params, state.projections))
    embedding = loaded.arrays[0]["embedding"]
    assert loaded.step == 3 and embedding.sharding == experiment().shardings.params["embedding"]
    with pytest.raises(UserError, match=f"distill.workdir = {tmp_path}: its tokenizer .* is not the data's"):
        load("0" * 64)
    with pytest.raises(UserError, match=f"distill.workdir = {tmp_path}: its model has 257 ids, this one 300"):
        load(model__vocab_size=300)


def test_a_run_that_does_not_fit_together_reads_no_teacher(tmp_path):
    workdir = Workdir(tmp_path / "teacher")
    workdir.write_config(experiment(**TEACHER).config.to_dict())
    BytesTokenizer().save(str(workdir))
    config = tiny_config(
        **STUDENT,
        data__files=write_text(tmp_path / "text.txt"),
        optimizer__train="geometry",
        distill__workdir=str(workdir),
        distill__weight=WEIGHT,
    )
    with pytest.raises(UserError, match="a model of softmax layers has no M"):
        run(config, tmp_path / "run")
    config.optimizer.train = "all"
    config.model.vocab_size = 300
    with pytest.raises(UserError, match="its model has 257 ids, this one 300"):
        run(config, tmp_path / "run")
    config.model.vocab_size = 0
    with pytest.raises(UserError, match="no checkpoint in .*teacher"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_has_the_same_teacher_and_saves_none(tmp_path):
    text = write_text(tmp_path / "text.txt")
    write_workdir(tmp_path / "teacher", experiment(**TEACHER).config)
    before = saved_arrays(tmp_path / "teacher")
    config = tiny_config(
        **STUDENT,
        num_steps=2,
        data__files=text,
        optimizer__schedule="constant",
        optimizer__warmup_steps=1,
        distill__workdir=str(tmp_path / "teacher"),
        distill__weight=WEIGHT,
    )
    run(config, str(tmp_path / "run"))
    config.num_steps = 3
    run(config, str(tmp_path / "run"))
    run(config, str(tmp_path / "unbroken"))
    assert saved_arrays(tmp_path / "run") == saved_arrays(tmp_path / "unbroken")
    write_workdir(tmp_path / "plain", experiment().config)
    assert saved_arrays(tmp_path / "run").keys() == saved_arrays(tmp_path / "plain").keys()
    assert saved_arrays(tmp_path / "teacher") == before
    lines = [line for line in metrics_without_time(tmp_path / "run") if "loss" in line]
    assert lines == [line for line in metrics_without_time(tmp_path / "unbroken") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3] and all(line["distill"] > 0 for line in lines)
    heldout = [line for line in metrics_without_time(tmp_path / "run") if "heldout_loss" in line]
    assert heldout and not any("distill" in line for line in heldout)
