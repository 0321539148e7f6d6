import re
from pathlib import Path

import jax
import numpy as np
import pytest

from darkformer_jax.errors import UserError
from darkformer_jax.ops.keys import key_of_data, key_of_seed

LIBRARY = Path(__file__).parents[2] / "darkformer_jax"


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32])
def test_a_seed_is_the_key_that_jax_makes_of_it_by_default(seed):
    data = jax.random.key_data(jax.random.key(seed))
    for changed in (jax.default_prng_impl("rbg"), jax.enable_x64(True)):
        with changed:
            key = key_of_seed(seed)
            np.testing.assert_array_equal(jax.random.key_data(key), data)
            assert key_of_data(jax.random.key_data(key)) == key


def test_the_switch_that_draws_other_numbers_from_a_key_is_refused():
    with jax.threefry_partitionable(False), pytest.raises(UserError, match="every seed would mean other numbers"):
        key_of_seed(0)


def test_no_other_module_makes_keys_whose_kind_jax_chooses():
    made = re.compile(r"random\.(key|PRNGKey|wrap_key_data)\(")
    files = [path for path in LIBRARY.rglob("*.py") if made.search(path.read_text())]
    assert files == [LIBRARY / "ops/keys.py"]
