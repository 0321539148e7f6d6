import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.errors import UserError
from darkformer_jax.ops.exact import choose_backend, exact_attention

random = np.random.default_rng(0)


def draw(length, keys=None, heads=(4, 2), dim=8):
    shapes = ((2, length, heads[0], dim), (2, keys or length, heads[1], dim), (2, keys or length, heads[1], dim))
    return tuple(jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes)


PLACES = ("query_segments", "key_segments", "query_positions", "key_positions")


def places(*arrays):
    return dict(zip(PLACES, map(jnp.asarray, arrays), strict=True))


def by_hand(
    q,
    k,
    v,
    query_segments,
    key_segments,
    query_positions,
    key_positions,
    *,
    scale=None,
    softcap=0.0,
    local_window=10**6,
    causal=True,
):
    """Row by row in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[3]))
    group = q.shape[2] // k.shape[2]
    for b, n, h in np.ndindex(q.shape[:3]):
        seen = key_segments[b] == query_segments[b, n]
        if causal:
            seen &= key_positions[b] <= query_positions[b, n]
            seen &= key_positions[b] > query_positions[b, n] - local_window
        if query_segments[b, n] == 0:
            continue
        logits = k[b, seen, h // group] @ q[b, n, h] * (scale or 1 / np.sqrt(q.shape[3]))
        logits = softcap * np.tanh(logits / softcap) if softcap else logits
        weights = np.exp(logits - logits.max())
        out[b, n, h] = weights @ v[b, seen, h // group] / weights.sum()
    return out


def rows(*lengths):
    """Segment ids and positions of one row of documents."""
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])
    return segments.astype(np.int32), positions.astype(np.int32)


def test_against_softmax_by_hand_with_documents_and_padding():
    q, k, v = draw(24)
    segments, positions = (np.stack(pair) for pair in zip(rows(9, 1, 14), rows(24), strict=True))
    segments[1, 20:] = 0
    arguments = (segments, segments, positions, positions)
    run = jax.jit(exact_attention)
    out = run(q, k, v, **places(*arguments))
    np.testing.assert_allclose(out, by_hand(q, k, v, *arguments), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out[1, 20:], 0)


@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (3, 3)])
@pytest.mark.parametrize(
    "options",
    [
        {"local_window": 1},
        {"local_window": 5, "softcap": 0.7},
        {"softcap": 0.7, "scale": 2.0},
        {"local_window": 100, "scale": 0.1},
        {"causal": False},
        {"causal": False, "softcap": 0.7, "scale": 2.0},
    ],
)
def test_windows_softcaps_scales_and_both_directions_by_hand(options, heads):
    q, k, v = draw(24, heads=heads)
    segments, positions = (np.stack(pair) for pair in zip(rows(9, 1, 14), rows(24), strict=True))
    segments[1, 20:] = 0
    arguments = (segments, segments, positions, positions)
    out = exact_attention(q, k, v, **places(*arguments), **options)
    np.testing.assert_allclose(out, by_hand(q, k, v, *arguments, **options), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out[1, 20:], 0)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_the_formula_in_float64(causal):
    q, k, v = draw(13)
    segments = np.tile(np.repeat(np.array([1, 2, 0], np.int32), [5, 6, 2]), (2, 1))
    positions = np.tile(rows(5, 8)[1], (2, 1))
    real = segments != 0
    cotangent = jnp.asarray(random.standard_normal((*q.shape[:3], v.shape[3])), jnp.float32)

    def formula(q, k, v):
        visible = (segments[:, :, None] == segments[:, None]) & real[:, None]
        if causal:
            visible = visible & (positions[:, None] <= positions[:, :, None])
        logits = jnp.einsum("bnhd,bthd->bhnt", q, jnp.repeat(k, 2, axis=2)) / np.sqrt(8)
        seen = jnp.asarray(visible | ~real[:, :, None])[:, None]
        weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
        out = jnp.einsum("bhnt,bthv->bnhv", weights, jnp.repeat(v, 2, axis=2))
        return jnp.where(real[:, :, None, None], out, 0)

    def gradients(attention, *arrays):
        out, pull = jax.vjp(attention, *arrays[:3])
        return out, *pull(arrays[3])

    at = places(segments, segments, positions, positions)
    got = gradients(lambda *x: exact_attention(*x, **at, causal=causal), q, k, v, cotangent)
    with jax.enable_x64(True):
        want = gradients(formula, *(jnp.asarray(x, jnp.float64) for x in (q, k, v, cotangent)))
        for ours, reference in zip(got, want, strict=True):
            np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-5)


def test_a_query_that_sees_both_directions_has_no_window():
    q, k, v = draw(4)
    ids = np.ones((2, 4), np.int32)
    with pytest.raises(UserError, match="local_window = 3 with causal=False: a window looks back only; allowed: 0"):
        exact_attention(q, k, v, **places(ids, ids, ids, ids), local_window=3, causal=False)


def test_the_backend_is_chosen_by_what_covers_the_case(monkeypatch):
    def choose(dtype=jnp.bfloat16, length=8, keys=8, dim=64, softcap=0.0):
        return choose_backend(jnp.zeros((1, length, 2, dim), dtype), jnp.zeros((1, keys, 2, dim), dtype), softcap)

    class Device:
        compute_capability = "8.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert (choose(), choose(softcap=50.0)) == ("xla", "plain")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device])
    assert choose() == choose(length=1, keys=7) == choose(dim=128) == "cudnn"
    assert choose(dtype=jnp.float32) == choose(dim=256) == choose(dim=20) == choose(length=7, keys=7) == "xla"
    assert choose(softcap=50.0) == "plain"
    Device.compute_capability = "9.0"
    assert choose(dim=256) == "cudnn"


def test_a_query_after_a_cache_sees_what_was_written():
    q, k, v = draw(3, keys=16)
    query_segments = np.array([[1, 1, 1], [1, 1, 0]], np.int32)
    query_positions = np.array([[5, 6, 7], [9, 10, 11]], np.int32)
    key_positions = np.tile(np.arange(16, dtype=np.int32), (2, 1))
    key_segments = (key_positions < np.array([[8], [11]])).astype(np.int32)  # empty slots are 0
    arguments = (query_segments, key_segments, query_positions, key_positions)
    out = exact_attention(q, k, v, **places(*arguments))
    np.testing.assert_allclose(out, by_hand(q, k, v, *arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.standard_promotion  # jax.nn.dot_product_attention itself promotes bfloat16 with float32
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_finite_and_padding_gets_none(dtype, softcap):
    q, k, v = (jnp.asarray(x, dtype) for x in draw(12))
    segments = np.tile(np.repeat(np.array([1, 0], np.int32), [7, 5]), (2, 1))
    positions = np.tile(np.arange(12, dtype=np.int32), (2, 1))

    def loss(q, k, v):
        out = exact_attention(q, k, v, **places(segments, segments, positions, positions), softcap=softcap)
        assert out.dtype == dtype
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    for gradient in gradients:
        gradient = np.asarray(gradient, np.float32)
        assert np.all(np.isfinite(gradient)) and np.any(gradient[:, :7])
        np.testing.assert_array_equal(gradient[:, 7:], 0)
