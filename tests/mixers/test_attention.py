"""What `Attention` does around every mechanism: positions, decay, convolution, and their state."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from darkformer_jax.mixers.attention import ATTENTION_FIELDS, Mechanism
from darkformer_jax.mixers.convolution import ShortConvolution
from darkformer_jax.mixers.encoders import EncoderMechanism
from darkformer_jax.mixers.forgetting import alibi_slopes, memories
from tests.tiny_specs import mixer_spec

LENGTH = 40
NEEDED = {"window": 8, "local_window": 7, "horizon": 64, "decay": "gate"}
MECHANISMS = {
    **{
        kind: {need: NEEDED[need] for need in mixer.needs}
        for kind, mixer in MIXERS.items()
        if issubclass(mixer, Mechanism) and not issubclass(mixer, EncoderMechanism)
    },
    "hybrid": {"window": 8, "num_sinks": 2},
}
FORMS = {
    "learned": {"decay": "learned", "undecayed_heads": 1},
    "gate and convolution": {"decay": "gate", "conv_width": 4, "positions": "none"},
    "alibi": {"positions": "alibi"},
}
random = np.random.default_rng(0)
X = random.standard_normal((1, LENGTH, 24)).astype(np.float32)


def spec_of(mechanism, **changes):
    kind = "dark" if mechanism == "hybrid" else mechanism
    return mixer_spec(kind, **{"embed_dim": 24, "num_features": 16, "seed": 3} | MECHANISMS[mechanism] | changes)


def build(spec):
    """The layer with random gates and convolutions, as a jitted function."""
    layer = MIXERS[spec.kind].build(spec, 0, rngs=nnx.Rngs(params=0))
    numbers = np.random.default_rng(1)
    parts = [layer.forgetting.gate] if spec.decay == "gate" else []
    parts += [layer.convolution.q, layer.convolution.k, layer.convolution.v] if spec.conv_width else []
    for part in parts:
        part.kernel[...] = jnp.asarray(0.4 * numbers.standard_normal(part.kernel.shape), jnp.float32)
    graphdef, arrays = nnx.split(layer)

    @jax.jit
    def call(x, segment_ids, positions, state=None):
        return nnx.merge(graphdef, arrays)(x, segment_ids, positions, state)

    return layer, call


def places(batch):
    return np.ones((batch, LENGTH), np.int32), np.tile(np.arange(LENGTH, dtype=np.int32), (batch, 1))


def assert_close(got, want, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("mechanism", "form"),
    [
        (mechanism, form)
        for mechanism, needs in MECHANISMS.items()
        for form, fields in FORMS.items()
        if needs.get("decay") in (None, fields.get("decay"))
    ],
)
def test_every_mechanism_forgets_in_one_way(mechanism, form):
    layer, call = build(spec_of(mechanism, **FORMS[form]))
    # Rows: the sequence; another future after token 20; two documents packed; each of them alone, padded.
    ids, positions = places(5)
    x = np.tile(X, (5, 1, 1))
    x[1, 21:] *= -3
    ids[2, 16:], positions[2, 16:] = 2, np.arange(24)
    ids[3, 16:], ids[4, 24:] = 0, 0
    x[4, :24] = x[4, 16:]
    out, state = call(x, ids, positions)
    assert state is None and np.all(np.isfinite(out))
    if "decay" not in MECHANISMS[mechanism]:
        plain = build(spec_of(mechanism, **FORMS[form] | {"decay": "none", "undecayed_heads": 0, "positions": "none"}))
        assert np.max(np.abs(plain[1](x[:1], ids[:1], positions[:1])[0] - out[:1])) > 1e-3
    np.testing.assert_allclose(out[1, :21], out[0, :21], rtol=0, atol=1e-6 * np.max(np.abs(out[0])))
    assert_close(out[2, :16], out[3, :16])
    assert_close(out[2, 16:], out[4, :24])

    # Prefill of prompts of unequal lengths, then one token at a time, now and then padding: decode = forward.
    state, lengths = layer.init_state(2, LENGTH, jnp.float32), np.array([13, 10])
    ids = (np.arange(13) < lengths[:, None]).astype(np.int32)
    prefill, state = call(x[:1, :13].repeat(2, 0), ids, positions[:2, :13], state)
    assert_close(prefill[0], out[0, :13])
    assert_close(prefill[1, :10], out[0, :10])
    shapes = jax.tree.map(jnp.shape, state)
    for step in range(24):
        real = np.array([1, int(step % 6 != 3)], np.int32)
        decoded, state = call(x[0, lengths][:, None], real[:, None], lengths[:, None].astype(np.int32), state)
        for row in np.flatnonzero(real):
            assert_close(decoded[row, 0], out[0, lengths[row]])
        lengths = lengths + real
    assert jax.tree.map(jnp.shape, state) == shapes


@pytest.mark.parametrize("kind", [kind for kind in MECHANISMS if kind in MIXERS and MIXERS[kind].bidirectional])
@pytest.mark.parametrize("form", [{"decay": "gate"}, {"positions": "alibi"}])
def test_an_encoder_forgets_with_the_distance_in_both_directions(kind, form):
    layer, _ = build(spec_of(kind, **form, causal=False))
    decays = -np.abs(random.standard_normal((1, LENGTH, 2))).astype(np.float32) if "decay" in form else None
    log_decay = -jnp.asarray(alibi_slopes(2)) if decays is None else jnp.asarray(decays)
    q, k, v = (jnp.asarray(random.standard_normal((1, LENGTH, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    ids, positions = map(jnp.asarray, places(1))
    run = jax.jit(functools.partial(layer.mechanism, segment_ids=ids, positions=positions))
    out, _ = run(q, k, v, log_decay=log_decay)
    # Read backwards, a token's own decay lies on its other side.
    backwards = log_decay if decays is None else jnp.roll(log_decay[:, ::-1], 1, axis=1)
    positions = positions[:, ::-1] if kind in ("random", "cosformer") else positions  # they read places
    run = jax.jit(functools.partial(layer.mechanism, segment_ids=ids, positions=positions))
    mirrored, _ = run(q[:, ::-1], k[:, ::-1], v[:, ::-1], log_decay=backwards)
    assert_close(mirrored[:, ::-1], out)
    plain, _ = run(q, k, v, log_decay=0 * log_decay)
    assert np.max(np.abs(plain - out)) > 1e-2


@pytest.mark.parametrize("kind", ["softmax", "softmax_local"])
def test_exact_attention_with_a_decay_by_hand(kind):
    options = {"local_window": 9, "softcap": 2.0} if kind == "softmax_local" else {}
    layer, _ = build(dataclasses.replace(spec_of(kind, decay="gate"), **options))
    q, k, v = (random.standard_normal((1, LENGTH, heads, 8)) for heads in (4, 2, 2))
    decays = -np.abs(random.standard_normal((1, LENGTH, 2)))
    ids, positions = places(1)
    for log_decay, summed in (
        (decays, np.cumsum(decays[0], axis=0)),
        (decays[0, 0], np.arange(LENGTH)[:, None] * decays[0, 0]),
    ):
        scores = np.einsum("nhd,thd->hnt", q[0], k[0].repeat(2, axis=1)) * 8**-0.5
        scores = options["softcap"] * np.tanh(scores / options["softcap"]) if options else scores
        scores = scores + (summed[:, None] - summed[None]).transpose(2, 0, 1).repeat(2, axis=0)
        seen = np.tri(LENGTH, dtype=bool) & ~np.tri(LENGTH, k=-options.get("local_window", LENGTH), dtype=bool)
        weights = np.where(seen, np.exp(scores), 0)
        want = np.einsum("hnt,thd->nhd", weights / weights.sum(-1, keepdims=True), v[0].repeat(2, axis=1))
        arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
        more = {"segment_ids": ids, "positions": positions, "log_decay": log_decay.astype(np.float32)}
        got, _ = jax.jit(lambda *qkv, more=more: layer.mechanism(*qkv, **jax.tree.map(jnp.asarray, more)))(*arrays)
        assert_close(got[0], want)


@pytest.mark.parametrize("causal", [True, False])
def test_exact_attention_has_the_derivative_of_smaller_decays_where_a_decay_is_zero(causal):
    layer, _ = build(spec_of("softmax", decay="gate", causal=causal))
    q, k, v = (jnp.asarray(random.standard_normal((1, LENGTH, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    ids, positions = map(jnp.asarray, places(1))

    @jax.jit
    @jax.grad
    def gradient(log_decay):
        out, _ = layer.mechanism(q, k, v, segment_ids=ids, positions=positions, log_decay=log_decay)
        return jnp.sum(jnp.sin(3 * out))

    at_zero, below = gradient(jnp.zeros((1, LENGTH, 2))), gradient(jnp.full((1, LENGTH, 2), -1e-5))
    assert jnp.abs(at_zero).max() > 0.1
    np.testing.assert_allclose(at_zero, below, atol=1e-2 * jnp.abs(below).max())


def test_the_decays_at_the_start():
    spec = spec_of("dark", num_kv_heads=4, decay="learned", shortest_memory=2.0, longest_memory=128.0)
    layer, _ = build(spec)
    np.testing.assert_allclose(-layer.forgetting(jnp.asarray(X)), [1 / 2, 1 / 8, 1 / 32, 1 / 128], rtol=1e-5)
    gated = MIXERS["dark"].build(dataclasses.replace(spec, decay="gate"), 0, rngs=nnx.Rngs(params=0))
    want = np.tile([1 / 2, 1 / 8, 1 / 32, 1 / 128], (1, LENGTH, 1))
    np.testing.assert_allclose(-gated.forgetting(jnp.asarray(X)), want, rtol=1e-5)
    one = dataclasses.replace(spec, undecayed_heads=3)
    np.testing.assert_allclose(memories(one)[0], 16)
    assert build(one)[0].forgetting(jnp.asarray(X))[1:].tolist() == [0, 0, 0]
    np.testing.assert_allclose(alibi_slopes(8), 0.5 ** np.arange(1, 9))  # as in the paper


def test_slopes_gates_and_convolutions_get_gradients():
    layer, _ = build(spec_of("dark", decay="gate", conv_width=3))
    graphdef, arrays = nnx.split(layer)
    ids, positions = map(jnp.asarray, places(1))
    gradients = jax.grad(lambda arrays: nnx.merge(graphdef, arrays)(jnp.asarray(X), ids, positions)[0].sum())(arrays)
    flat = {"/".join(map(str, path)): np.abs(leaf).max() for path, leaf in nnx.to_flat_state(gradients)}
    for name in ("forgetting/bias", "forgetting/gate/kernel", "convolution/q/kernel", "convolution/v/kernel"):
        assert flat[name] > 1e-3, flat


def test_weights_are_drawn_alike_with_and_without_a_decay():
    plain = nnx.to_flat_state(nnx.state(MIXERS["dark"].build(spec_of("dark"), 0, rngs=nnx.Rngs(params=0))))
    changed = build(spec_of("dark", decay="gate", conv_width=4))[0]
    other = dict(nnx.to_flat_state(nnx.state(changed)))
    for path, leaf in plain:
        np.testing.assert_array_equal(leaf, other[path])


def test_a_convolution_by_definition():
    convolution = ShortConvolution(3, 2, 5, "heads")
    kernel = random.standard_normal((3, 2, 5))
    convolution.kernel[...] = jnp.asarray(kernel, jnp.float32)
    x, ids = random.standard_normal((1, 9, 2, 5)), np.array([[1, 1, 1, 2, 2, 3, 3, 3, 0]], np.int32)
    want = x + kernel[0] * x
    for back in (1, 2):
        for n in range(back, 9):
            want[0, n] += kernel[back] * x[0, n - back] * (ids[0, n] == ids[0, n - back])
    nothing = jnp.zeros((1, 2, 2, 5)), jnp.zeros((1, 2), jnp.int32)
    got = convolution(jnp.asarray(x, jnp.float32), jnp.asarray(ids), *nothing)
    assert_close(got[:, :8], want[:, :8])


@pytest.mark.parametrize("kind", MIXERS)
def test_every_mechanism_uses_what_attention_does(kind):
    if issubclass(MIXERS[kind], Mechanism) and not issubclass(MIXERS[kind], EncoderMechanism):
        assert MIXERS[kind].uses >= ATTENTION_FIELDS - {"undecayed_heads"}
        assert ("undecayed_heads" in MIXERS[kind].uses) == ("decay" not in MIXERS[kind].needs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "alibi", "decay": "learned"}, "positions = 'alibi' with decay = 'learned': ALiBi is a decay"),
        ({"decay": "gate", "undecayed_heads": 2}, "undecayed_heads = 2 of 2 key/value heads: at least one must decay"),
        ({"decay": "gate", "shortest_memory": 200.0}, "shortest_memory = 200.0: must be at most longest_memory = 128"),
        ({"conv_width": 1}, "conv_width = 1; allowed: 0, or 2 and more"),
        ({"conv_width": 4, "causal": False}, "conv_width = 4; allowed: 0, because model.causal = False"),
    ],
)
def test_options_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        MIXERS["dark"].check(mixer_spec("dark", **changes))
