import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from darkformer_jax import dark_attention, dark_attention_fn, draw_projections
from darkformer_jax.errors import UserError

W = draw_projections(jax.random.key(0), num_features=8192, dim=8)


def arrays(*batch, scale=0.5):
    shape = (3, *batch, 12, 2, 8)
    return list(scale * jax.random.normal(jax.random.key(1), shape))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (0, 2)])
def test_it_stands_for_jaxs_attention_with_and_without_a_batch(is_causal, batch):
    q, k, v = arrays(*batch)
    out = dark_attention_fn(projections=W)(q, k, v, is_causal=is_causal)
    flat = [x.reshape(math.prod(batch), *x.shape[-3:]) for x in (q, k, v)]
    assert (out == dark_attention(*flat, projections=W, causal=is_causal).reshape(v.shape)).all()
    exact = jax.nn.dot_product_attention(*flat, is_causal=is_causal).reshape(v.shape)
    mean = jax.nn.dot_product_attention(jnp.zeros_like(flat[0]), *flat[1:], is_causal=is_causal).reshape(v.shape)
    assert out.shape == v.shape and np.linalg.norm(out - exact) <= 0.3 * np.linalg.norm(mean - exact)


def test_it_is_the_attention_fn_of_flax():
    def layer(**options):
        return nnx.MultiHeadAttention(2, 16, rngs=nnx.Rngs(0), decode=False, **options)

    x = 0.3 * jax.random.normal(jax.random.key(2), (2, 12, 16))
    ours, exact = layer(attention_fn=dark_attention_fn(projections=W)), layer()
    assert np.abs(ours(x) - exact(x)).max() < 0.03 * np.abs(exact(x)).max()
    causal = ours(x, is_causal=True)
    assert np.abs(causal[:, 0] - ours(x[:, :1])[:, 0]).max() < 1e-5
    with pytest.raises(UserError, match="bias or mask: linear attention has no scores"):
        ours(x, mask=nnx.make_causal_mask(x[..., 0]))
    with pytest.raises(UserError, match="module: dark_attention_fn does not support it"):
        ours(x, sow_weights=True)
    with pytest.raises(UserError, match="dropout_rate = 0.5: linear attention has no weights to drop"):
        layer(attention_fn=dark_attention_fn(projections=W), dropout_rate=0.5)(x, deterministic=False, rngs=nnx.Rngs(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "projections is missing"),
        ({"projections": W, "causal": True}, "causal is not one of them"),
        ({"projections": W, "return_state": True}, "return_state is not one of them"),
    ],
)
def test_options_that_the_call_gives_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        dark_attention_fn(**options)


def test_what_jaxs_attention_has_and_this_has_not_is_refused():
    attend = dark_attention_fn(projections=W)
    with pytest.raises(UserError, match="local_window_size: dark_attention_fn does not support it; allowed: None"):
        attend(*arrays(1), local_window_size=4)


def test_batch_axes_that_differ_are_refused_though_their_products_agree():
    attend = dark_attention_fn(projections=draw_projections(jax.random.key(1), 8, 8))
    x = jax.random.normal(jax.random.key(3), (2, 3, 5, 2, 8))
    with pytest.raises(UserError, match=r"query \(2, 3, 5, 2, 8\), key \(3, 2, 5, 2, 8\) and value .* batch axes"):
        attend(x, x.reshape(3, 2, 5, 2, 8), x)
