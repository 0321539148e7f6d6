"""Every linear attention with its definition in float64, inputs for it, and what it is compared by.

A new feature map gets all tests of test_every_linear_attention.py and test_context.py by a line in OPS, and so does a
kind of decay.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from darkformer_jax import dark_attention, draw_projections
from darkformer_jax.ops.dark_attention import init_state
from darkformer_jax.ops.features import log_elu_plus_one, log_positive_features, log_relu, log_two_sided
from darkformer_jax.ops.linear_attention import linear_attention
from darkformer_jax.ops.oracle import dark_attention_oracle, linear_attention_oracle

PURE = {"chunk_size": 16}
HYBRID = {"chunk_size": 16, "window": 16, "num_sinks": 3}
BOUNDED = HYBRID | {"far_horizon": 40}


class Inputs(NamedTuple):
    q: Any  # [b, n, hq, d]
    k: Any  # [b, n, hkv, d]
    v: Any  # [b, n, hkv, dv]
    arrays: dict[str, Any]  # further arguments of the op that have gradients; log_decay may be [b, n, hkv]


class Op(NamedTuple):
    attention: Callable[..., Any]  # (q, k, v, **arrays, **options)
    oracle: Callable[..., Any]  # the same by definition
    draw_arrays: Callable[..., dict[str, Any]]  # (random, (hq, hkv), d, m)
    points: Callable[..., Any]  # (x [..., d], arrays of that head) -> whose norm is the size of x
    extreme: float  # size of the largest inputs that are tried
    log_features: Callable[..., Any]  # (x [..., d], arrays of that head)
    decay: str = ""  # "head" or "token": the inputs have a log_decay for each


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw_projections(seed, features, dim, num_heads):
    return draw_projections(jax.random.key(seed), features, dim, num_heads=num_heads)


def _dark_arrays(random, heads, dim, features):
    geometry = np.eye(dim) + 0.1 * random.standard_normal((heads[1], dim, dim))
    seed = int(random.integers(2**31))
    projections = np.asarray(_draw_projections(seed, features, dim, heads[1]))
    return {"projections": projections, "geometry": geometry.astype(np.float32)}


def _dark_log_features(x, arrays):
    return log_positive_features(x, arrays["projections"], arrays["geometry"], x.shape[-1] ** -0.5)


def linear(feature_map, extreme, draw_arrays=lambda *sizes: {}):
    """A feature map's `linear_attention`. `draw_arrays` returns {"feature_arrays": ...}, or nothing."""

    def oracle(*inputs, chunk_size=None, **options):
        return linear_attention_oracle(*inputs, feature_map=feature_map, **options)

    return Op(
        attention=functools.partial(linear_attention, feature_map=feature_map),
        oracle=oracle,
        draw_arrays=draw_arrays,
        points=lambda x, arrays: x,
        extreme=extreme,
        log_features=lambda x, arrays: feature_map(arrays.get("feature_arrays"), x, 1.0),
    )


OPS = {
    "dark": Op(
        attention=dark_attention,
        oracle=dark_attention_oracle,
        draw_arrays=_dark_arrays,
        points=lambda x, arrays: x @ arrays["geometry"].T * x.shape[-1] ** -0.25,
        extreme=math.sqrt(500),
        log_features=_dark_log_features,
    ),
    "elu_plus_one": linear(log_elu_plus_one, extreme=500),
    "two_sided": linear(log_two_sided, extreme=50),
    "relu": linear(log_relu, extreme=500),
}
OPS |= {
    "dark with slopes": OPS["dark"]._replace(decay="head"),
    "dark with gates": OPS["dark"]._replace(decay="token"),
    "elu_plus_one with gates": OPS["elu_plus_one"]._replace(decay="token"),
}
DARK = [op for op in OPS if OPS[op].attention is dark_attention]
FORMS = [*((op, PURE) for op in OPS), *((op, HYBRID) for op in DARK), ("dark", BOUNDED), ("dark with gates", BOUNDED)]


def draw(
    op,
    length,
    *,
    heads=(2, 1),
    dim=16,
    value_dim=8,
    features=32,
    batch=1,
    extreme=None,
    antipodal=False,
    gain=False,
    seed=0,
):
    """Gaussian inputs. `extreme`: size of every query and key, as a share of the op's; `antipodal`: q is minus k."""
    random = np.random.default_rng(seed)
    group = heads[0] // heads[1]
    q = random.standard_normal((batch, length, heads[0], dim))
    k = random.standard_normal((batch, length, heads[1], dim))
    v = random.standard_normal((batch, length, heads[1], value_dim))
    arrays = OPS[op].draw_arrays(random, heads, dim, features)
    if antipodal:
        q = -np.repeat(k, group, axis=2)
    if extreme is not None:
        for head in range(heads[0]):
            kv_head = head // group
            for x, own in ((q, head), (k, kv_head)):
                points = OPS[op].points(x[:, :, own], jax.tree.map(lambda leaf, h=kv_head: leaf[h], arrays))
                x[:, :, own] *= extreme * OPS[op].extreme / np.linalg.norm(points, axis=-1, keepdims=True)
    if gain:
        arrays["log_gain"] = random.standard_normal(heads[0]).astype(np.float32)
    if OPS[op].decay:
        arrays["log_decay"] = _draw_log_decay(random, heads[1], (batch, length) if OPS[op].decay == "token" else ())
    return Inputs(*(np.asarray(x, np.float32) for x in (q, k, v)), arrays)


def _draw_log_decay(random, num_kv_heads, of_tokens):
    """Of heads with long, with short and with endless memory. Now and then a gate forgets everything."""
    slopes = np.resize([0.02, 1.0, 0.0], num_kv_heads)
    if not of_tokens:
        return -slopes.astype(np.float32)
    gates = slopes * random.exponential(size=(*of_tokens, num_kv_heads))
    gates[random.random(gates.shape) < 0.02] = 50
    return -gates.astype(np.float32)


def draw_cotangent(x, seed=1):
    return np.random.default_rng(seed).standard_normal((*x.q.shape[:3], x.v.shape[3])).astype(np.float32)


def documents(*lengths):
    """Segment ids [1, sum(lengths)] of consecutive documents."""
    return np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)[None]


def map_tokens(function, x, *more):
    """`function` of each array that has an entry per token, [b, n, ...]; the others stay."""
    arrays = dict(x.arrays)
    for name, leaf in arrays.items():
        if name == "log_decay" and leaf.ndim == 3:
            arrays[name] = function(leaf, *(other.arrays[name] for other in more))
    return Inputs(*(function(*leaves) for leaves in zip(x[:3], *(other[:3] for other in more), strict=True)), arrays)


def over_tokens(mask, leaf):
    """[b, n] -> [b, n, 1, ...] with as many axes as `leaf`."""
    return mask.reshape(*mask.shape, *(1 for _ in leaf.shape[2:]))


def part(x, start, stop):
    return map_tokens(lambda leaf: leaf[:, start:stop], x)


@functools.cache
def jitted(attention, gradients, options):
    def run(x, segment_ids):
        return attention(*x[:3], **x.arrays, segment_ids=segment_ids, **dict(options))

    def run_with_gradients(x, segment_ids, cotangent):
        out, pull = jax.vjp(lambda y: run(y, segment_ids), x)
        return out, pull(cotangent)[0]

    return jax.jit(run_with_gradients if gradients else run)


def attend(op, x, segment_ids=None, **options):
    return jitted(OPS[op].attention, False, tuple(options.items()))(x, segment_ids)


def with_gradients(op, x, cotangent, segment_ids=None, **options):
    """The output, and the gradients of sum(out * cotangent) as Inputs."""
    return jitted(OPS[op].attention, True, tuple(options.items()))(x, segment_ids, cotangent)


def widen(x):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), x)


def oracle(op, x, segment_ids=None, cotangent=None, **options):
    """The same two in float64."""
    with jax.enable_x64(True):
        run = jitted(OPS[op].oracle, cotangent is not None, tuple(options.items()))
        more = () if cotangent is None else (widen(cotangent),)
        return jax.tree.map(np.asarray, run(widen(x), segment_ids, *more))


@functools.cache
def _resume(attention, options):
    def run(x, state, segment_ids):
        return attention(*x[:3], **x.arrays, segment_ids=segment_ids, state=state, return_state=True, **dict(options))

    return jax.jit(run)


def resume(op, x, state, segment_ids, **options):
    """(out, state) of the tokens that follow those of `state`."""
    return _resume(OPS[op].attention, tuple(options.items()))(x, state, segment_ids)


def fresh(op, x, options):
    """The state before the first token."""
    # The op itself says how many features it has.
    after = jax.eval_shape(_resume(OPS[op].attention, tuple(options.items())), x, None, None)[1]
    sizes = {name: options.get(name, 0) for name in ("window", "num_sinks")}
    shape = (x.q.shape[0], x.k.shape[2], x.k.shape[3], x.v.shape[3], after.far.key_max.shape[-1])
    has_decay = bool(OPS[op].decay)
    return jax.jit(lambda: init_state(*shape, jnp.float32, options["chunk_size"], **sizes, has_decay=has_decay))()


def assert_rows_close(got, want, limit):
    """Relative error of the whole (Frobenius) and of the worst row under `limit`, no row zero or NaN."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    size = np.linalg.norm(want, axis=-1)
    error = np.linalg.norm(got - want, axis=-1)
    assert np.all(np.isfinite(got)) and np.all(np.linalg.norm(got, axis=-1) > 0)
    print(f"outputs: {np.linalg.norm(error) / np.linalg.norm(size):.1e}, worst row {np.max(error / size):.1e}")
    assert np.linalg.norm(error) <= limit * np.linalg.norm(size)
    assert np.max(error / size) <= limit


def assert_gradients_close(got, want, limit):
    """Likewise for each gradient. Rows of a gradient may vanish: a row counts at least as the root mean square row.

    Where the whole gradient vanishes (one token; weightless far keys) `limit` is absolute: cotangents have size one.
    """
    references = jax.tree_util.tree_leaves_with_path(want)
    for (path, reference), ours in zip(references, jax.tree.leaves(got), strict=True):
        name = jax.tree_util.keystr(path)
        ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
        assert np.all(np.isfinite(ours)), name
        size = np.linalg.norm(reference, axis=-1)
        error = np.linalg.norm(ours - reference, axis=-1)
        typical = np.sqrt(np.mean(size**2))
        if typical < 1e-9:
            assert np.max(error) < limit, name
            continue
        worst = np.max(error / np.maximum(size, typical))
        print(f"gradient of {name}: {np.linalg.norm(error) / np.linalg.norm(size):.1e}, worst row {worst:.1e}")
        assert np.linalg.norm(error) <= limit * np.linalg.norm(size), name
        assert worst <= limit, name


def assert_like_float64(op, length, shape, segments, options, **backend):
    """Outputs and gradients, of Gaussian inputs and of extreme ones."""
    for data, limit in (({}, 1e-4), ({"extreme": 1.0}, 1e-3), ({"extreme": 1.0, "antipodal": True}, 1e-3)):
        x = draw(op, length, **shape, **data)
        ids = None if segments is None else np.tile(documents(*segments), (x.q.shape[0], 1))
        cotangent = draw_cotangent(x)
        out, gradients = with_gradients(op, x, cotangent, ids, **options, **backend)
        want, want_gradients = oracle(op, x, ids, cotangent, **options)
        assert_rows_close(out, want, limit)
        assert_gradients_close(gradients, want_gradients, limit)


def visible(state):
    """What of a state matters: slots that hold no token may hold anything."""
    state = jax.device_get(state)
    recent, sinks, far = state.recent, state.sinks, state.far
    used = (recent.segments != 0)[:, None, :, None]
    filled = sinks.filled[:, None, :, None]
    return {
        "key_max": far.key_max,
        "normalizer": far.normalizer,
        "values": far.values,
        "segment": far.segment,
        "sinks": (np.where(filled, sinks.keys, 0), np.where(filled, sinks.values, 0), sinks.filled),
        "recent": (np.where(used, recent.keys, 0), np.where(used, recent.values, 0), recent.segments),
        "positions": np.where(recent.segments != 0, recent.positions, 0),
        "counts": (state.fill, state.last_segment, state.document_length),
        "decays": (
            None if sinks.decays is None else np.where(filled[..., 0], sinks.decays, 0),
            None if recent.decays is None else np.where(used[..., 0], recent.decays, 0),
        ),
    }


def assert_states_close(got, want, tolerance=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), visible(got), visible(want)
    )
