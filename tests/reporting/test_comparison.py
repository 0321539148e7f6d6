import math

import pytest

from darkformer_jax.reporting.comparison import closed_share
from darkformer_jax.reporting.rows import Mean


def test_the_share_without_shared_seeds_and_without_a_gap():
    share = closed_share({0: 2.0, 1: 2.2}, {2: 3.0, 3: 3.2}, {4: 2.5, 5: 2.9})
    # means 2.1, 3.1, 2.7: share 0.4 of a gap of 1; standard errors 0.1, 0.1, 0.2
    assert share.num_seeds == 0 and share.mean == pytest.approx(0.4)
    assert share.standard_error == pytest.approx(math.sqrt(0.04**2 + 0.06**2 + 0.2**2))
    assert closed_share({0: 2.0}, {0: 3.0}, {0: 2.5}) == Mean(0.5, None, 1)
    assert closed_share({0: 3.0}, {0: 3.0}, {0: 2.5}) is None
