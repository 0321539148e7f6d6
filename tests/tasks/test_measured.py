import numpy as np
import pytest

from darkformer_jax.tasks.measured import measure_all


class OnDevice:
    """A number that tells when the host reads it."""

    def __init__(self, events, number):
        self.events, self.number = events, number

    def __array__(self, dtype=None, copy=None):
        self.events.append(f"read {self.number}")
        return np.asarray(self.number, dtype)


def test_a_batch_is_dispatched_before_the_one_before_it_is_read():
    events = []

    def step(number):
        events.append(f"dispatch {number}")
        return {"weight": OnDevice(events, number)}, {"rows": np.array([number, number])}

    sums, rows = measure_all(step, iter([1, 2, 3]))
    assert events == ["dispatch 1", "dispatch 2", "read 1", "dispatch 3", "read 2", "read 3"]
    assert sums["weight"] == 6 and sums["weight"].dtype == np.float64 and rows["rows"].tolist() == [1, 1, 2, 2, 3, 3]


def test_no_batch_is_a_mistake_of_the_task():
    with pytest.raises(ValueError, match="no batches"):
        measure_all(lambda batch: ({}, {}), [])
