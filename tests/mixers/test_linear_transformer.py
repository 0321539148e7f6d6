import jax
import jax.numpy as jnp
import numpy as np

from darkformer_jax.mixers.linear_transformer import LinearTransformer
from tests.tiny_specs import mixer_spec


def test_it_is_the_normalised_product_of_elu_plus_one_in_values_and_gradients():
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((1, 37, heads, 8)) for heads in (4, 2, 2))
    cotangent = random.standard_normal(q.shape)
    ids, positions = jnp.ones((1, 37), jnp.int32), jnp.arange(37, dtype=jnp.int32)[None]
    mixer = LinearTransformer(mixer_spec("linear_transformer"), 0)

    def attend(q, k, v):
        return mixer(q, k, v, segment_ids=ids, positions=positions)[0]

    def by_definition(q, k, v):
        q, k, v = (x[0].transpose(1, 0, 2) for x in (q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)))
        q, k = (jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0))) for x in (q, k))
        weights = (q @ k.transpose(0, 2, 1)) * jnp.tri(37, dtype=q.dtype)[None]
        return ((weights @ v) / weights.sum(-1, keepdims=True)).transpose(1, 0, 2)[None]

    with jax.enable_x64(True):
        want, pull = jax.vjp(jax.jit(by_definition), q, k, v)
        want_gradients = pull(jnp.asarray(cotangent))
    narrow = [x.astype(np.float32) for x in (q, k, v)]
    out, pull = jax.vjp(jax.jit(attend), *narrow)
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
    for got, wanted in zip(pull(jnp.asarray(cotangent, jnp.float32)), want_gradients, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)


def test_its_state_has_as_many_features_as_a_head_has_dimensions():
    state = LinearTransformer(mixer_spec("linear_transformer"), 0).init_state(3, 100, jnp.float32)
    assert state.far.values.shape == (3, 2, 8, 8)
