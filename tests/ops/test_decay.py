"""Log decays of any size and over any length; the rest is tested for every linear attention with a decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax import dark_attention
from darkformer_jax.errors import UserError
from darkformer_jax.ops.decay import between, precise_running_sum, running_sum, to_end
from tests.ops.linear_attentions import (
    HYBRID,
    PURE,
    assert_gradients_close,
    assert_rows_close,
    attend,
    draw,
    draw_cotangent,
    fresh,
    oracle,
    with_gradients,
)

LONG = 65_536
KERNEL = {"backend": "pallas_interpret"}


def test_near_differences_of_a_running_sum_are_exact_whatever_came_before():
    random = np.random.default_rng(0)
    decays = -random.exponential(size=300) * 0.01
    decays[random.random(300) < 0.2] = -900
    sums = jax.jit(running_sum)(decays.astype(np.float32))
    summed = np.cumsum(decays.astype(np.float32).astype(np.float64))
    want = summed[:, None] - summed[None]
    near = np.abs(want) < 10
    assert near.sum() > 1000
    np.testing.assert_allclose(np.asarray(between(sums, sums))[near], want[near], atol=1e-6)
    np.testing.assert_allclose(to_end(sums).keys[-3:], summed[-1] - summed[-3:], atol=1e-6)


@pytest.mark.parametrize("length", [512, LONG])
def test_sums_for_exact_attention_are_precise_over_any_length(length):
    decays = -np.random.default_rng(0).random((1, length, 2)).astype(np.float32) * np.float32([0.45, 0.03])
    first, second = decays[:, : length // 2], decays[:, length // 2 :]
    before = jax.tree.map(lambda leaf: leaf[:, -1], jax.jit(precise_running_sum, static_argnums=1)(first, 1))
    sums = jax.jit(precise_running_sum, static_argnums=1)(second, 1, before)
    last = jax.tree.map(lambda leaf: leaf[0, -64:, 0], sums)
    want = np.cumsum(decays.astype(np.float64), axis=1)[0, -64:, 0]
    np.testing.assert_allclose(between(last, last), want[:, None] - want[None], atol=1e-5)
    pull = jax.vjp(lambda x: precise_running_sum(x, 1).value(), jnp.asarray(first))[1]
    (gradient,) = pull(jnp.ones_like(first))
    np.testing.assert_array_equal(gradient[0, :, 0], np.arange(length // 2, 0, -1))


@pytest.mark.parametrize("strong", [-50.0, -1e4, -np.inf])
@pytest.mark.parametrize(("options", "backend"), [(PURE, {}), (HYBRID, {}), (PURE, KERNEL)])
def test_a_decay_that_forgets_at_once_gives_no_nan(options, backend, strong):
    x = draw("dark with gates", 100, heads=(4, 2), extreme=0.5)
    decays = np.where(np.arange(100)[None, :, None] % 7 == 0, strong, x.arrays["log_decay"]).astype(np.float32)
    x = x._replace(arrays=x.arrays | {"log_decay": decays})
    cotangent = np.ones((1, 100, 4, 8), np.float32)
    out, gradients = with_gradients("dark with gates", x, cotangent, **options, **backend)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))
    limited = x._replace(arrays=x.arrays | {"log_decay": np.maximum(decays, -1e4)})
    assert_rows_close(out, oracle("dark with gates", limited, **options), 1e-3)


def test_a_token_after_a_complete_decay_sees_itself_only():
    x = draw("dark with gates", 40)
    decays = np.zeros((1, 40, 1), np.float32)
    decays[0, 20] = -np.inf
    x = x._replace(arrays=x.arrays | {"log_decay": decays})
    np.testing.assert_allclose(attend("dark with gates", x, **PURE)[0, 20], np.tile(x.v[0, 20], (2, 1)), atol=1e-6)


def long_inputs():
    x = draw("dark with slopes", LONG, heads=(2, 2), dim=4, value_dim=4, features=8)
    slopes = np.array([1e-5, 3e-3], np.float32)  # sums of 0.7 and of 200, in steps of a chunk of 0.001 and of 0.4
    return x._replace(arrays=x.arrays | {"log_decay": -slopes})


def by_recurrence(x, log_decay):
    """The outputs [L, h, dv] in float64, one token after the other."""
    k, q, v = (np.asarray(leaf[0], np.float64) for leaf in (x.k, x.q, x.v))
    w, m = (np.asarray(x.arrays[name], np.float64) for name in ("projections", "geometry"))
    log_q, log_k = (_log_features(y, w, m) for y in (q, k))
    c = np.full(log_k.shape[1:], -1e30)
    z, S = np.zeros_like(c), np.zeros((*c.shape, v.shape[-1]))
    outs = np.empty_like(v)
    for n in range(LONG):
        new = np.maximum(c + log_decay[:, None], log_k[n])
        old, add = np.exp(c + log_decay[:, None] - new), np.exp(log_k[n] - new)
        c, z, S = new, old * z + add, old[..., None] * S + add[..., None] * v[n][:, None]
        weights = np.exp(log_q[n] + c - (log_q[n] + c).max(axis=1, keepdims=True))
        outs[n] = np.einsum("hm,hmv->hv", weights, S) / np.einsum("hm,hm->h", weights, z)[:, None]
    return outs


def _log_features(x, w, m):
    point = np.einsum("nhd,hrd->nhr", x, m) * x.shape[-1] ** -0.25
    return np.einsum("nhr,hmr->nhm", point, w) - 0.5 * np.sum(point**2, axis=-1, keepdims=True)


@pytest.mark.parametrize("options", [{"chunk_size": 128}, {"chunk_size": 256} | KERNEL])
def test_a_long_sequence_keeps_its_precision_in_outputs_and_in_the_gradient_of_the_decay(options):
    x = long_inputs()
    cotangent = np.zeros((1, LONG, 2, 4), np.float32)
    cotangent[0, -2000:] = np.random.default_rng(2).standard_normal((2000, 2, 4))
    out, gradients = with_gradients("dark with slopes", x, cotangent, **options)
    decay = np.asarray(x.arrays["log_decay"], np.float64)
    want = by_recurrence(x, decay)
    assert_rows_close(out, want[None], 1e-4)

    for head in range(2):
        step = 1e-3 * decay * (np.arange(2) == head)
        above, below = (by_recurrence(x, decay + sign * step) for sign in (1, -1))
        slope = np.sum((above - below) * cotangent[0]) / (2 * step[head])
        error = abs(gradients.arrays["log_decay"][head] / slope - 1)
        print(f"gradient of the decay of head {head}: {error:.1e}")
        assert error < 1e-3


X = draw("dark with gates", 4, heads=(4, 2))
W = X.arrays["projections"]


@pytest.mark.parametrize(
    ("log_decay", "more", "message"),
    [
        (np.zeros(4, np.float32), {}, r"log_decay has shape \(4,\); expected \(2,\), one .* or \(1, 4, 2\)"),
        (np.zeros((1, 4, 4), np.float32), {}, r"log_decay has shape \(1, 4, 4\)"),
        (np.array([0, 0.5], np.float32), {}, "log_decay has 0.5; allowed: at most 0"),
        (np.array([0, np.nan], np.float32), {}, "log_decay has nan; allowed: at most 0"),
        (np.zeros(2, np.float32), {"state": fresh("dark", X, HYBRID), **HYBRID}, "made without log_decay, .* with it"),
        (None, {"state": fresh("dark with gates", X, HYBRID), **HYBRID}, "made with log_decay, .* without it"),
    ],
)
def test_a_decay_that_does_not_fit_is_refused(log_decay, more, message, unchecked_types):
    arrays = [jnp.asarray(x) for x in (*X[:3], W)]
    with pytest.raises(UserError, match=message):
        dark_attention(
            *arrays[:3], projections=arrays[3], log_decay=None if log_decay is None else jnp.asarray(log_decay), **more
        )


@pytest.mark.parametrize("options", [PURE, HYBRID, PURE | {"causal": False}])
def test_a_decay_of_zero_has_the_derivative_of_smaller_ones(options):
    x = draw("dark with gates", 100, heads=(4, 2))
    x = x._replace(arrays=x.arrays | {"log_decay": np.zeros((1, 100, 2), np.float32)})
    cotangent = draw_cotangent(x)
    got, want = (of("dark with gates", x, cotangent=cotangent, **options)[1] for of in (with_gradients, oracle))
    assert_gradients_close(got, want, 1e-4)
    smaller = x._replace(arrays=x.arrays | {"log_decay": np.full((1, 100, 2), -1e-7)})
    (_, limit), of_decay = oracle("dark with gates", smaller, None, cotangent, **options), want.arrays["log_decay"]
    np.testing.assert_allclose(of_decay, limit.arrays["log_decay"], rtol=1e-3, atol=1e-3 * np.abs(of_decay).max())


@pytest.mark.parametrize("options", [PURE, HYBRID])
def test_forward_mode_derivatives_are_those_of_the_gradient(options):
    x, random = jax.tree.map(jnp.asarray, draw("dark with gates", 64, heads=(4, 2))), np.random.default_rng(0)
    decays = x.arrays["log_decay"]
    arrays = {name: leaf for name, leaf in x.arrays.items() if name != "log_decay"}
    attend_with = jax.jit(lambda log_decay: dark_attention(*x[:3], **arrays, log_decay=log_decay, **options))
    direction = random.standard_normal(decays.shape).astype(np.float32)
    out, tangent = jax.jvp(attend_with, (decays,), (direction,))
    cotangent = random.standard_normal(out.shape).astype(np.float32)
    (gradient,) = jax.vjp(attend_with, decays)[1](cotangent)
    np.testing.assert_allclose(np.sum(tangent * cotangent), np.sum(gradient * direction), rtol=1e-4)
