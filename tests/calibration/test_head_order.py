"""What is said of heads follows them into their new order."""

import numpy as np

from darkformer_jax.calibration.head_order import moments_in_order, rows_in_order
from darkformer_jax.calibration.moments import Moments

CHOSEN = {1: [2], 2: [0, 1, 2]}  # of three layers with three key/value heads and two queries for each


def test_exact_heads_come_first_and_have_no_error():
    errors = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    rows = [{"layer": layer, "before": errors, "after": errors, "seconds": 3.0} for layer in range(3)]
    split = [0.0, 0.0, 0.1, 0.2, 0.3, 0.4]
    assert rows_in_order(rows, CHOSEN, 3) == [rows[0], {"layer": 1, "before": split, "after": split, "seconds": 3.0}]
    assert rows[1]["after"] == errors  # and the given rows are as they were


def test_moments_are_those_of_the_heads_in_their_new_order():
    random = np.random.default_rng(0)
    q, k = (random.standard_normal((3, 2, 8, heads, 4)) for heads in (6, 3))
    before = Moments.stack([Moments.of(*layer) for layer in zip(q, k, strict=True)])
    reordered = Moments.of(q[1][:, :, [4, 5, 0, 1, 2, 3]], k[1][:, :, [2, 0, 1]])
    after = moments_in_order(before, CHOSEN)
    for name in Moments._fields:
        wanted = [getattr(before, name)[0], getattr(reordered, name), getattr(before, name)[2]]
        np.testing.assert_allclose(getattr(after, name), np.stack(wanted), rtol=1e-12)
