import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.mixers.positions import rope
from tests.tiny_specs import rope_spec

random = np.random.default_rng(0)
X = random.standard_normal((2, 5, 3, 8)).astype(np.float32)


def by_hand(x, positions, theta):
    """Each pair (i, i + d/2) as a complex number, turned by positions * theta^(-2i/d)."""
    half = x.shape[-1] // 2
    z = x[..., :half].astype(np.float64) + 1j * x[..., half:]
    turned = z * np.exp(1j * positions[..., None, None] * theta ** (-2 * np.arange(half) / x.shape[-1]))
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize(("start", "theta", "tolerance"), [(0, 1e4, 1e-5), (1000, 5e5, 2e-4), (65_000, 1e4, 2e-2)])
def test_pairs_are_turned_by_the_position(start, theta, tolerance):
    # An angle of 65,000 radians is a float32 number with a spacing of 0.008.
    positions = np.arange(start, start + 5, dtype=np.int32)[None].repeat(2, axis=0)
    np.testing.assert_allclose(rope(X, positions, rope_spec(theta)), by_hand(X, positions, theta), atol=tolerance)


def test_position_zero_is_the_identity_and_rows_have_their_own_positions():
    positions = np.array([[0, 0, 0, 0, 0], [4, 0, 1, 2, 9]], np.int32)
    turned = rope(X, positions, rope_spec())
    np.testing.assert_array_equal(turned[0], X[0])
    np.testing.assert_array_equal(turned[1, 1], X[1, 1])
    np.testing.assert_allclose(turned, by_hand(X, positions, 1e4), atol=1e-5)


def test_products_depend_on_the_distance_only():
    q, k = X[:1, :1].repeat(4, axis=1), X[1:, 1:2].repeat(4, axis=1)
    starts = np.array([[0, 3, 17, 200]], np.int32)
    products = np.sum(np.asarray(rope(q, starts + 5, rope_spec())) * np.asarray(rope(k, starts, rope_spec())), axis=-1)
    np.testing.assert_allclose(products, products[:, :1].repeat(4, axis=1), atol=1e-4)
    assert not np.allclose(products, np.sum(q * k, axis=-1), atol=1e-2)


def test_bfloat16_stays_bfloat16_and_is_turned_in_float32():
    positions = np.arange(500, 505, dtype=np.int32)[None].repeat(2, axis=0)
    turned = rope(jnp.asarray(X, jnp.bfloat16), positions, rope_spec())
    assert turned.dtype == jnp.bfloat16
    exact = by_hand(np.asarray(jnp.asarray(X, jnp.bfloat16), np.float32), positions, 1e4)
    np.testing.assert_allclose(np.asarray(turned, np.float32), exact, rtol=2**-8, atol=2e-4)


SCALINGS = [
    rope_spec(5e5, "linear", factor=8.0),
    rope_spec(5e5, "llama3", factor=32.0),
    rope_spec(1e4, "llama3", factor=8.0, low_freq_factor=2.0, high_freq_factor=9.0, original_length=512),
    rope_spec(1e6, "yarn", factor=4.0, original_length=32768),
    rope_spec(1e4, "yarn", factor=1.0, original_length=128, beta_fast=16.0, beta_slow=2.0),
    rope_spec(1e4, "yarn", factor=16.0, original_length=4, attention_factor=1.5),
]


@pytest.mark.parametrize("head_dim", [8, 64])
@pytest.mark.parametrize("spec", SCALINGS, ids=lambda spec: f"{spec.scaling}-{spec.factor:g}")
def test_scaled_frequencies_are_those_of_transformers(spec, head_dim):
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    parameters = {"rope_type": spec.scaling, "rope_theta": spec.theta, "factor": spec.factor}
    if spec.scaling == "llama3":
        parameters |= {"low_freq_factor": spec.low_freq_factor, "high_freq_factor": spec.high_freq_factor}
    if spec.scaling == "yarn":
        parameters |= {"beta_fast": spec.beta_fast, "beta_slow": spec.beta_slow}
        parameters |= {"attention_factor": spec.attention_factor} if spec.attention_factor else {}
    if spec.scaling != "linear":
        parameters["original_max_position_embeddings"] = spec.original_length
    config = LlamaConfig(head_dim=head_dim, rope_parameters=parameters)
    wanted, factor = rope_utils.ROPE_INIT_FUNCTIONS[spec.scaling](config, device="cpu")
    frequencies = spec.frequencies(head_dim)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, wanted.numpy(), rtol=1e-6)
    assert spec.amplitude == pytest.approx(factor)


def test_scaling_keeps_fast_pairs_and_slows_slow_ones():
    plain = rope_spec(5e5).frequencies(64)
    np.testing.assert_allclose(plain, 5e5 ** (-np.arange(32) / 32), rtol=1e-6)
    for spec in (rope_spec(5e5, "llama3", factor=8.0), rope_spec(5e5, "yarn", factor=8.0)):
        ratio = plain / spec.frequencies(64)
        assert ratio[0] == 1 and ratio[-1] == pytest.approx(8) and np.all(np.diff(ratio) >= 0)
    with pytest.raises(ValueError, match="rope scaling 'longrope' is unknown"):
        rope_spec(scaling="longrope").frequencies(8)


def test_yarn_lengthens_what_it_turns():
    spec = rope_spec(scaling="yarn", factor=8.0, original_length=64)
    positions = np.arange(5, dtype=np.int32)[None].repeat(2, axis=0)
    turned = np.asarray(rope(X, positions, spec))
    lengths, factor = np.linalg.norm(X, axis=-1), 0.1 * np.log(8) + 1
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), factor * lengths, rtol=1e-5)
