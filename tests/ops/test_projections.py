import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax import draw_projections
from darkformer_jax.errors import UserError
from darkformer_jax.ops.projections import projection_key


@pytest.mark.parametrize("num_features", [3, 16, 40])  # less than a block, a block, two and a half
def test_blocks_are_orthogonal_with_chi_norms(num_features):
    dim, draws = 16, 2000
    w = np.asarray(draw_projections(jax.random.key(0), num_features, dim, num_heads=draws), np.float64)
    assert w.shape == (draws, num_features, dim)
    squares = np.sum(w**2, axis=-1)
    for start in range(0, num_features, dim):
        block = w[:, start : start + dim] / np.sqrt(squares[:, start : start + dim, None])
        gram = block @ np.swapaxes(block, 1, 2)
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(block.shape[1]), gram.shape), atol=1e-5)
    if num_features > dim:  # blocks are independent of each other
        between = np.sum(w[:, 0] * w[:, dim], axis=-1)
        assert np.std(between) == pytest.approx(np.sqrt(dim), rel=0.1)
    # |w|^2 ~ chi squared: mean d, variance 2 d.
    count = squares.size
    assert abs(np.mean(squares) - dim) < 4 * np.sqrt(2 * dim / count)
    assert np.var(squares) == pytest.approx(2 * dim, rel=0.1)


def test_directions_have_no_preferred_side_unless_unsigned():
    def worst_mean(kind):
        w = np.asarray(draw_projections(jax.random.key(1), 8, 8, kind, num_heads=4000))
        standard_errors = np.std(w, axis=0) / np.sqrt(4000)
        return np.max(np.abs(np.mean(w, axis=0)) / standard_errors)  # of 64 entries

    assert worst_mean("orthogonal") < 4.5
    assert worst_mean("iid") < 4.5
    assert worst_mean("orthogonal_unsigned") > 20


@pytest.mark.parametrize("kind", ["iid", "orthogonal"])
def test_entries_are_standard_normal(kind):
    w = np.asarray(draw_projections(jax.random.key(2), 8, 8, kind, num_heads=4000), np.float64)
    for power, expected in ((2, 1.0), (4, 3.0)):
        moment = np.mean(w**power, axis=(1, 2))
        assert abs(np.mean(moment) - expected) < 4 * np.std(moment) / np.sqrt(4000)


def test_heads_are_independent_draws_in_float32():
    w = draw_projections(jax.random.key(0), 5, 4, num_heads=3)
    assert w.dtype == jnp.float32
    np.testing.assert_array_equal(w[1], draw_projections(jax.random.split(jax.random.key(0), 3)[1], 5, 4))
    assert not np.any(w[0] == w[1])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of the CPU's LAPACK")
@pytest.mark.parametrize("draw", [draw_projections, jax.vmap(draw_projections, (0, None, None))])
def test_each_lapack_call_has_one_matrix_so_that_no_call_waits_for_threads_that_other_calls_hold(draw):
    key = jax.random.split(jax.random.key(0), 3) if draw is not draw_projections else jax.random.key(0)
    program = jax.jit(lambda key: draw(key, 40, 16)).lower(key).compile().as_text()
    calls = [line for line in program.splitlines() if 'custom_call_target="lapack_' in line]
    assert len(calls) == 2  # geqrf and orgqr
    for line in calls:
        batches = re.findall(r"f32\[((?:\d+,)*)16,16\]", line)
        assert batches and set(batches) <= {"", "1,"}, line


def test_projection_key_is_a_function_of_seed_layer_and_epoch():
    def data(*numbers):
        return tuple(np.asarray(jax.random.key_data(projection_key(*numbers))).tolist())

    keys = {data(seed, layer, epoch) for seed in range(3) for layer in range(3) for epoch in range(3)}
    assert len(keys) == 27
    traced = jax.jit(lambda layer, epoch: jax.random.key_data(projection_key(1, layer, epoch)))
    assert tuple(np.asarray(traced(2, 0)).tolist()) == data(1, 2, 0)
    assert data(0, 0, 0) == (1571711206, 2301353376)  # resumed runs rely on it


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "num_features = 0 and dim = 4"),
        ((4, 0), "num_features = 4 and dim = 0"),
        ((-2, 4, "iid"), "num_features = -2"),
        ((4, 4, "orthonormal"), "projections 'orthonormal' are unknown; allowed: iid, orthogonal, orthogonal_unsigned"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        draw_projections(jax.random.key(0), *arguments)
