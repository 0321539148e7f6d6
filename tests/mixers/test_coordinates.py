"""Coordinates change no exact weight, and make random features vary less where queries and keys differ in size."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.calibration.geometry import BalancedMaps, balanced_maps
from darkformer_jax.calibration.moments import Moments
from darkformer_jax.errors import UserError
from darkformer_jax.mixers.performer import Performer
from darkformer_jax.mixers.window_only import WindowOnly
from tests.tiny_specs import mixer_spec

ROWS, LENGTH, HEADS, GROUPS, DIM = 2, 256, 4, 2, 8
SPEC = mixer_spec("performer", num_features=64, seed=3, chunk_size=16, window=16)
random = np.random.default_rng(0)
# As in models with norms of q and k: keys are large along directions that queries hardly have, around a large mean.
SIZES = np.array([12.0, 6.0, 3.0, 1.0, 1.0, 0.5, 0.3, 0.2])
Q = (random.standard_normal((ROWS, LENGTH, HEADS, DIM)) / SIZES).astype(np.float32)
K = (1.5 * SIZES * (1 + random.standard_normal((ROWS, LENGTH, GROUPS, DIM)))).astype(np.float32)
V = random.standard_normal((ROWS, LENGTH, GROUPS, DIM)).astype(np.float32)
PLACES = {
    "segment_ids": jnp.ones((ROWS, LENGTH), jnp.int32),
    "positions": jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32), (ROWS, 1)),
}


def attend(kind, spec, maps: BalancedMaps | None = None):
    mechanism = kind(dataclasses.replace(spec, balanced=maps is not None), 0)
    for name, value in ({} if maps is None else maps._asdict()).items():
        getattr(mechanism.coordinates, name)[...] = jnp.asarray(value, jnp.float32)
    out, _ = mechanism(*map(jnp.asarray, (Q, K, V)), **PLACES)
    return np.asarray(out)


@pytest.fixture(scope="module")
def maps():
    return balanced_maps(Moments.of(Q, K))


def test_the_maps_are_inverse_to_each_other(maps):
    products = np.swapaxes(maps.query_map, -1, -2) @ maps.key_map
    np.testing.assert_allclose(products, np.tile(np.eye(DIM), (GROUPS, 1, 1)), atol=1e-9)


def test_queries_and_keys_have_the_same_diagonal_second_moments(maps):
    moments = Moments.of(Q, K)
    second_q = maps.query_map @ moments.second_q @ np.swapaxes(maps.query_map, -1, -2)
    covariance_k = maps.key_map @ moments.covariance_k @ np.swapaxes(maps.key_map, -1, -2)
    largest = np.max(second_q)
    np.testing.assert_allclose(second_q, covariance_k, atol=2e-3 * largest)  # but for what `_with_floor` adds
    np.testing.assert_allclose(second_q, second_q * np.eye(DIM), atol=2e-3 * largest)
    norms = [np.trace(x, axis1=-2, axis2=-1) for x in (second_q, covariance_k)]
    eigenvalues = np.linalg.eigvals(moments.covariance_k @ moments.second_q).real
    np.testing.assert_allclose(sum(norms), 2 * np.sqrt(eigenvalues).sum(-1), rtol=5e-3)
    assert np.all(sum(norms) < 0.1 * np.trace(moments.second_q + moments.second_k, axis1=-2, axis2=-1))


def test_what_is_seen_exactly_does_not_change(maps):
    everything = dataclasses.replace(SPEC, window=LENGTH)
    np.testing.assert_allclose(attend(Performer, everything, maps), attend(WindowOnly, everything), atol=2e-5)


def test_features_estimate_better(maps):
    exact = attend(WindowOnly, dataclasses.replace(SPEC, window=LENGTH))
    window, plain, balanced = (
        np.linalg.norm(out - exact)
        for out in (attend(WindowOnly, SPEC), attend(Performer, SPEC), attend(Performer, SPEC, maps))
    )
    assert plain > 0.9 * window  # large keys: their features are too small to be seen beside the window
    assert balanced < 0.8 * window


def test_too_few_tokens_have_no_balance():
    with pytest.raises(UserError, match="layer 3: moments of 8 tokens"):
        balanced_maps(Moments.of(Q[:1, :DIM], K[:1, :DIM]), "layer 3")
