"""Layers in which the first key/value heads are exact and the others see through features."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from darkformer_jax.mixers.dark import Dark
from darkformer_jax.mixers.softmax import Softmax
from tests.tiny_specs import mixer_spec

SPEC = mixer_spec("dark", num_features=16, geometry_init=0.7, seed=3, window=8, num_sinks=2, window_kernel="softmax")
SPLIT = dataclasses.replace(SPEC, exact_kv_heads=1)  # of 2 key/value heads, with 2 of 4 query heads
random = np.random.default_rng(0)
Q, K, V = (jnp.asarray(random.standard_normal((2, 40, heads, 8)), jnp.float32) for heads in (4, 2, 2))
PLACES = {"segment_ids": jnp.ones((2, 40), jnp.int32), "positions": jnp.tile(jnp.arange(40, dtype=jnp.int32), (2, 1))}


def attend(mechanism):
    return np.asarray(mechanism(Q, K, V, **PLACES)[0])


def test_each_head_has_its_own_kind_of_attention():
    split, exact, features = (attend(kind(spec, 0)) for kind, spec in ((Dark, SPLIT), (Softmax, SPEC), (Dark, SPEC)))
    np.testing.assert_allclose(split[:, :, :2], exact[:, :, :2], atol=2e-6)
    np.testing.assert_allclose(split[:, :, 2:], features[:, :, 2:], atol=2e-6)
    assert np.abs(exact - features)[:, 30:].max() > 1e-2


def test_only_the_exact_heads_have_a_cache_that_grows():
    short, long = (Dark(SPLIT, 0).init_state(1, length, "float32") for length in (64, 4096))
    whole = [leaf.shape for leaf in jax.tree.leaves(Dark(SPEC, 0).init_state(1, 64, "float32"))]
    assert short.exact.keys.shape == (1, 64, 1, 8) and long.exact.keys.shape == (1, 4096, 1, 8)
    sizes = [[leaf.shape for leaf in jax.tree.leaves(state.features)] for state in (short, long)]
    assert sizes[0] == sizes[1] and sum(map(np.prod, sizes[0])) < sum(map(np.prod, whole))


def test_flops_are_those_of_both_parts():
    plain, split = (MIXERS["dark"].mixing_flops(spec, 4096) for spec in (SPEC, SPLIT))
    exact = MIXERS["softmax"].mixing_flops(SPEC, 4096)
    assert split == pytest.approx((plain + exact) / 2)


def test_a_layer_without_features_is_refused():
    with pytest.raises(UserError, match="exact_kv_heads = 2 of 2 key/value heads: at least one must be left"):
        MIXERS["dark"].check(dataclasses.replace(SPEC, exact_kv_heads=2))
