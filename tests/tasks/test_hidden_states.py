"""The student's hidden states against the teacher's: the loss, its gradient, and which layer is compared with which."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from darkformer_jax.errors import UserError
from darkformer_jax.tasks.hidden_states import hidden_states, matched
from darkformer_jax.tasks.next_token import NextToken
from darkformer_jax.tasks.teacher import Teacher
from darkformer_jax.training.evaluation import put_batch
from darkformer_jax.training.experiment import Experiment
from darkformer_jax.training.step import TrainState, make_train_step
from tests.tiny_runs import (
    BytesTokenizer,
    fresh_state,
    make_chunks,
    metrics_without_time,
    on_eight_devices,
    random_batch,
    run,
    saved_arrays,
    tiny_config,
    write_text,
    write_workdir,
)

pytestmark = pytest.mark.standard_promotion  # an optimizer runs

SIZES = {"model__num_layers": 3, "model__attention__kind": "softmax"}
STUDENT = SIZES | {"model__attention__pattern": "softmax,window_only", "model__attention__window": 16}
TEACHER = SIZES | {"model__mlp_dim": 48, "seed": 5}


def rows():
    """Rows of two documents and padding."""
    return jax.tree.map(jnp.asarray, random_batch(0))


@functools.cache
def experiment(**changes):
    config = tiny_config(**changes)
    return Experiment.of(config, NextToken.of(config, 257), jax.devices()[:1])


@functools.cache
def arrays(**changes):
    """(params, projections) of a fresh model."""
    state = fresh_state(experiment(**changes))
    return state.params, state.projections


def layer_outputs(network, arrays, batch):
    """What every block gives, one after another, without a scan: [layers, b, n, embed]."""
    model = network.bind(*arrays)
    x, outputs = model.embed(batch["inputs"]), []
    for index in range(network.spec.num_layers):
        x, _ = model.layer(index)(x, batch["segment_ids"], batch["positions"], None)
        outputs.append(x)
    return jnp.stack(outputs)


def error_by_hand(student, teacher, batch):
    """The mean over real tokens and layers of |h - t|^2 / |t|^2 in float64."""
    student, teacher = np.float64(student), np.float64(teacher)
    squared = np.square(student - teacher).sum(-1) / np.square(teacher).sum(-1)
    weights = np.float64(batch["weights"])
    return (weights * squared.mean(0)).sum() / weights.sum()


def test_every_layer_is_compared_with_the_teachers_layer_of_the_same_number():
    """In float64, for a pattern of two with a layer left over, and rows of two documents and padding."""
    batch = rows()
    own, theirs = experiment(**STUDENT).network, experiment(**TEACHER).network
    wanted = error_by_hand(
        layer_outputs(own, arrays(**STUDENT), batch), layer_outputs(theirs, arrays(**TEACHER), batch), batch
    )
    _, targets = hidden_states(theirs.bind(*arrays(**TEACHER)), batch)
    np.testing.assert_allclose(targets, layer_outputs(theirs, arrays(**TEACHER), batch), rtol=1e-4, atol=1e-5)
    x, errors = matched(own.bind(*arrays(**STUDENT)), batch, targets)
    found = np.sum(batch["weights"] * errors) / batch["weights"].sum()
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert wanted > 0.1 and not np.any(errors[batch["weights"] == 0])
    straight, _ = own.bind(*arrays(**STUDENT)).hidden(*(batch[n] for n in ("inputs", "segment_ids", "positions")))
    np.testing.assert_allclose(x, straight, rtol=1e-5, atol=1e-6)


def test_a_student_that_is_its_teacher_has_no_error():
    batch, network = rows(), experiment(**STUDENT).network
    model = network.bind(*arrays(**STUDENT))
    _, errors = matched(model, batch, hidden_states(model, batch)[1])
    assert errors.shape == batch["weights"].shape and not np.any(errors)


HIDDEN, WEIGHT, Z_LOSS = 0.5, 0.2, 0.1


@functools.cache
def one_step(accumulation_steps=1, weights=(WEIGHT, HIDDEN), **changes):
    """The student's state, and the gradient and the metrics of one step on rows of very unequal length."""
    e, optimizer = experiment(**STUDENT | changes), optax.trace(decay=0.0)  # which keeps the gradient
    objective = NextToken(257, 32, Z_LOSS, experiment(**TEACHER).network, *weights)
    options = {"accumulation_steps": accumulation_steps, "redraw_every": 0, "trained": e.trained}
    step = jax.jit(make_train_step(e.network, objective, optimizer, e.schedule, **options))
    start = TrainState(jnp.zeros((), jnp.int32), *arrays(**STUDENT), optimizer.init(arrays(**STUDENT)[0]))
    state, metrics = step(start, rows(), arrays(**TEACHER))
    return state.optimizer.trace, metrics


def relative_difference(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(np.linalg.norm(np.float64(x) - y) / max(np.linalg.norm(np.float64(y)), 1e-12) for x, y in pairs)


@pytest.mark.parametrize("weights", [(0.0, 0.0), (WEIGHT, HIDDEN)], ids=["distilled or not", "hidden states"])
def test_logits_in_chunks_teach_the_same(weights, monkeypatch):
    """30 places of documents and padding in two micro-batches; 7 tokens a chunk, which do not divide them."""
    whole, metrics = one_step(accumulation_steps=2, weights=weights)
    make_chunks(monkeypatch, 7)
    chunked, metrics_of_chunks = one_step.__wrapped__(accumulation_steps=2, weights=weights)
    assert relative_difference(chunked, whole) < 2e-6
    assert metrics_of_chunks.keys() == metrics.keys() and "distill" in metrics
    for name, value in metrics.items():
        np.testing.assert_allclose(metrics_of_chunks[name], value, rtol=1e-6)


def test_the_gradient_is_that_of_the_weighted_sum_through_all_layers():
    batch = rows()
    own, theirs = experiment(**STUDENT).network, experiment(**TEACHER).network
    params, projections = arrays(**STUDENT)
    targets = layer_outputs(theirs, arrays(**TEACHER), batch)
    wanted = theirs.bind(*arrays(**TEACHER))(batch["inputs"], batch["segment_ids"], batch["positions"])[0]
    weights = batch["weights"] / batch["weights"].sum()

    def loss(params):
        outputs, model = layer_outputs(own, (params, projections), batch), own.bind(params, projections)
        logits = model.logits(model.final_norm(outputs[-1]))
        log_q = jax.nn.log_softmax(logits)
        nll = -jnp.sum(log_q * jax.nn.one_hot(batch["targets"], 257), axis=-1)
        divergence = jnp.sum(jax.nn.softmax(wanted) * (jax.nn.log_softmax(wanted) - log_q), axis=-1)
        squared = jnp.sum(jnp.square(outputs - targets), axis=-1) / jnp.sum(jnp.square(targets), axis=-1)
        z = jnp.square(jax.nn.logsumexp(logits, axis=-1))
        terms = (1 - WEIGHT - HIDDEN) * nll + WEIGHT * divergence + HIDDEN * jnp.mean(squared, axis=0) + Z_LOSS * z
        return jnp.sum(weights * terms)

    gradients, metrics = one_step()
    direct = jax.jit(jax.grad(loss))(params)
    assert relative_difference(gradients, direct) < 2e-5
    assert metrics["hidden"] > 0.1 and metrics["distill"] > 0


def test_micro_batches_add_up_and_recomputation_changes_nothing():
    gradients, metrics = one_step()
    for other, other_metrics in (one_step(accumulation_steps=2), one_step(model__remat="full")):
        assert relative_difference(other, gradients) < 1e-5
        for name in ("loss", "distill", "hidden"):
            np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=1e-6)


def test_the_hidden_states_alone_need_no_predictions():
    _, both = one_step()
    _, metrics = one_step(weights=(0.0, 1.0))
    assert "distill" not in metrics
    for name in ("loss", "hidden"):
        np.testing.assert_allclose(metrics[name], both[name], rtol=1e-6)


def test_a_teacher_with_other_layers_is_refused(tmp_path):
    write_workdir(tmp_path, experiment(**TEACHER).config)
    for name, value, theirs in (("num_layers", 2, 3), ("embed_dim", 48, 32)):
        other = STUDENT | {f"model__{name}": value, "distill__workdir": str(tmp_path)}
        Teacher.of(tiny_config(**other, distill__weight=0.5), 257, BytesTokenizer.fingerprint)
        config = tiny_config(**other, distill__hidden_weight=0.5)
        with pytest.raises(UserError, match=f"model.{name} = {theirs}, in this model {value}; allowed with"):
            Teacher.of(config, 257, BytesTokenizer.fingerprint)


def test_a_resumed_run_ends_bit_for_bit_the_same(tmp_path):
    write_workdir(tmp_path / "teacher", experiment(**TEACHER).config)
    config = tiny_config(
        **STUDENT,
        num_steps=2,
        data__files=write_text(tmp_path / "text.txt"),
        optimizer__schedule="constant",
        optimizer__warmup_steps=1,
        distill__workdir=str(tmp_path / "teacher"),
        distill__hidden_weight=1.0,
    )
    run(config, str(tmp_path / "run"))
    config.num_steps = 3
    run(config, str(tmp_path / "run"))
    run(config, str(tmp_path / "unbroken"))
    assert saved_arrays(tmp_path / "run") == saved_arrays(tmp_path / "unbroken")
    lines = [line for line in metrics_without_time(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3] and all(line["hidden"] > 0 for line in lines)


def few_steps(**mesh):
    """[hidden, loss, gradient norm] of some steps."""
    config = tiny_config(**STUDENT, **mesh)
    objective = NextToken(257, 32, 0.0, experiment(**TEACHER).network, 0.0, 1.0)
    e = Experiment.of(config, objective, jax.devices()[: 8 if mesh else 1])
    batch, result = random_batch(0), []
    with jax.set_mesh(e.mesh):
        state, step = e.initial_state(), e.train_step()
        for _ in range(3):
            state, metrics = step(state, put_batch(batch, e.batch_sharding), arrays(**TEACHER))
            result.append([float(metrics[name]) for name in ("hidden", "loss", "grad_norm")])
    return result


def test_eight_devices_learn_as_one_does(tmp_path):
    code = "import json; from tests.tasks.test_hidden_states import few_steps"
    code += "; print(json.dumps(few_steps(mesh__data=2, mesh__fsdp=2, mesh__context=2)))"
    (tmp_path / "program.py").write_text(code)
    ended = on_eight_devices(tmp_path / "program.py", tmp_path).wait()
    assert ended.status == 0, ended.err
    np.testing.assert_allclose(json.loads(ended.out.splitlines()[-1]), few_steps(), rtol=1e-5)
