"""The rivals, each against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.errors import UserError
from darkformer_jax.mixers.cosformer import CosFormer
from darkformer_jax.mixers.hedgehog import Hedgehog
from tests.tiny_specs import mixer_spec

LENGTH = 37
random = np.random.default_rng(0)
# Not centred, because relu leaves nothing of some q . k otherwise.
QKV = tuple(0.5 + random.standard_normal((1, LENGTH, heads, 8)) for heads in (4, 2, 2))
PLACES = {
    "segment_ids": jnp.ones((1, LENGTH), jnp.int32),
    "positions": jnp.arange(LENGTH, dtype=jnp.int32)[None],
}


def normalised(weights, v):
    weights = weights * jnp.tri(LENGTH, dtype=weights.dtype)[None]
    return ((weights @ v) / weights.sum(-1, keepdims=True)).transpose(1, 0, 2)[None]


def by_head(q, k, v):
    """[heads, tokens, d] of each, keys and values once per query head."""
    return (x[0].transpose(1, 0, 2) for x in (q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)))


def assert_same(mixer, by_definition):
    """Values and gradients."""
    cotangent = random.standard_normal(QKV[0].shape)
    with jax.enable_x64(True):
        want, pull = jax.vjp(jax.jit(by_definition), *QKV)
        want_gradients = pull(jnp.asarray(cotangent))
    narrow = [x.astype(np.float32) for x in QKV]
    out, pull = jax.vjp(jax.jit(lambda q, k, v: mixer(q, k, v, **PLACES)[0]), *narrow)
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
    for got, wanted in zip(pull(jnp.asarray(cotangent, jnp.float32)), want_gradients, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)


def test_hedgehog_is_the_product_of_two_sided_exponentials_of_learned_maps():
    mixer = Hedgehog(mixer_spec("hedgehog"), 0)
    assert (np.asarray(mixer.queries[...]) == np.eye(8)).all() and mixer.keys.shape == (2, 8, 8)
    maps = [np.eye(8) + 0.3 * random.standard_normal((heads, 8, 8)) for heads in (4, 2)]
    mixer.queries[...], mixer.keys[...] = (jnp.asarray(x, jnp.float32) for x in maps)

    def by_definition(q, k, v):
        q, k, v = by_head(q, k, v)
        q = jnp.einsum("hnd,hed->hne", q, maps[0])
        k = jnp.einsum("hnd,hed->hne", k, np.repeat(maps[1], 2, axis=0))
        q, k = (jnp.concatenate([jnp.exp(x), jnp.exp(-x)], axis=-1) for x in (q, k))
        return normalised(q @ k.transpose(0, 2, 1), v)

    assert_same(mixer, by_definition)
    assert mixer.init_state(3, 100, jnp.float32).far.values.shape == (3, 2, 16, 8)


def test_cosformer_weighs_products_of_rectified_entries_by_the_cosine_of_the_distance():
    mixer = CosFormer(mixer_spec("cosformer", horizon=50), 0)

    def by_definition(q, k, v):
        q, k, v = by_head(q, k, v)
        apart = np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None]
        weights = jax.nn.relu(q) @ jax.nn.relu(k).transpose(0, 2, 1) * np.cos(np.pi * apart / 100)[None]
        return normalised(weights, v)

    assert_same(mixer, by_definition)


def test_cosformer_refuses_more_tokens_than_its_horizon():
    mixer = CosFormer(mixer_spec("cosformer", horizon=36), 0)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in QKV)
    for call in (lambda: mixer(q, k, v, **PLACES), lambda: mixer.init_state(1, 37, jnp.float32)):
        with pytest.raises(UserError, match=r"horizon = 36 with 37 tokens: must be at least as many"):
            call()
