import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.training.evaluation import make_eval_step, measure
from tests.tiny_runs import experiment_of, tiny_config


class Largest:
    """An objective whose figures need the rows: the largest input of each, beside its label."""

    def measure(self, model, batch):
        weight = batch["weight"]
        sums = {
            "weight": jnp.sum(weight),
            "by_label": jnp.stack([jnp.sum(weight * (batch["label"] == i)) for i in (0, 1)]),
        }
        return sums, {"largest": jnp.max(batch["inputs"], axis=1), "weight": weight}


def batch(seed):
    rng = np.random.default_rng(seed)
    return {
        "inputs": rng.integers(0, 257, (4, 32)).astype(np.int32),
        "label": rng.integers(0, 2, 4).astype(np.int32),
        "weight": np.array([1, 1, 1, 0], np.float32),
    }


def test_sums_are_added_and_the_values_of_rows_come_end_to_end():
    experiment = experiment_of(tiny_config(model__attention__kind="softmax"))
    step = make_eval_step(experiment.network, Largest(), experiment.mesh)
    arrays = jax.jit(experiment.network.init)(jax.random.key(0))
    batches = [batch(seed) for seed in range(3)]
    sums, rows = measure(step, *arrays, batches, experiment.batch_sharding)
    labels = np.concatenate([b["label"][:3] for b in batches])
    assert sums["weight"] == 9 and sums["weight"].dtype == np.float64
    np.testing.assert_array_equal(sums["by_label"], np.bincount(labels, minlength=2))
    np.testing.assert_array_equal(rows["largest"], np.concatenate([b["inputs"].max(axis=1) for b in batches]))
    np.testing.assert_array_equal(rows["weight"], np.tile([1, 1, 1, 0], 3))


def test_no_batch_is_a_mistake_of_the_task():
    experiment = experiment_of(tiny_config(model__attention__kind="softmax"))
    step = make_eval_step(experiment.network, Largest(), experiment.mesh)
    with pytest.raises(ValueError, match="no batches"):
        measure(step, {}, {}, [], experiment.batch_sharding)
