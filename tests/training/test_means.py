"""The means between two lines of metrics.jsonl."""

import json

import numpy as np
import pytest

from darkformer_jax.training.means import RunningMeans

STEPS = [
    {"loss": 4.0, "accuracy": 0.5, "tokens": 10.0, "grad_norm": 7.0},
    {"loss": 1.0, "accuracy": 0.0, "tokens": 30.0, "grad_norm": 3.0},
]


def means(carried=None):
    return RunningMeans("tokens", ["grad_norm"], carried or {})


def test_each_token_of_the_steps_counts_the_same_and_what_is_no_mean_is_the_last_steps():
    running = means()
    assert running.add(STEPS[0]) == STEPS[0]
    assert running.add(STEPS[1]) == {"loss": 1.75, "accuracy": 0.125, "tokens": 30.0, "grad_norm": 3.0}
    running.restart()
    assert running.add(STEPS[1]) == STEPS[1]


def test_the_mean_of_one_step_is_its_own_value_bit_for_bit():
    rng = np.random.default_rng(0)
    for loss, weight in zip(rng.random(1000, np.float32), rng.random(1000, np.float32) * 1e6, strict=True):
        step = {"loss": float(loss), "tokens": float(weight)}
        assert means().add(step) == step


def test_a_run_that_resumes_between_two_lines_has_the_same_mean():
    rng = np.random.default_rng(1)
    steps = [
        {"loss": float(loss), "tokens": float(tokens)}
        for loss, tokens in zip(rng.random(9, np.float32), rng.integers(1, 4096, 9), strict=True)
    ]
    unbroken = means()
    wanted = [unbroken.add(step) for step in steps]
    first = means()
    resumed = [first.add(step) for step in steps[:5]]
    second = means(json.loads(json.dumps(first.carried())))
    assert resumed + [second.add(step) for step in steps[5:]] == wanted
    assert means().add(steps[5]) != wanted[5]  # what an earlier version's checkpoint, which carries nothing, gives


@pytest.mark.parametrize("empty_first", [True, False])
def test_a_batch_of_only_padding_changes_no_mean(empty_first):
    running, padding = means(), {"loss": 0.0, "tokens": 0.0}
    step = {"loss": 2.0, "tokens": 8.0}
    added = [running.add(metrics) for metrics in ((padding, step) if empty_first else (step, padding))]
    assert [line["loss"] for line in added] == ([0.0, 2.0] if empty_first else [2.0, 2.0])
