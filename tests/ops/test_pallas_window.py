"""The hybrid's TPU kernels, their steps computed on this machine, against the definition in float64 and the scan."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from darkformer_jax import dark_attention
from darkformer_jax.aot.topology import topology_devices
from darkformer_jax.errors import UserError
from darkformer_jax.ops.state import init_state
from tests.ops.linear_attentions import (
    Inputs,
    assert_gradients_close,
    assert_rows_close,
    attend,
    documents,
    draw,
    draw_cotangent,
    oracle,
    over_tokens,
    part,
    resume,
    with_gradients,
)

KERNEL = {"backend": "pallas_interpret"}
SIZES = {"chunk_size": 16, "window": 32, "num_sinks": 3}
DOCUMENTS = np.tile(documents(2, 59, 9), (2, 1))  # which end within chunks; the first one is shorter than its sinks
FORMS = {
    "the features' kernel in the window": SIZES,
    "softmax in the window": SIZES | {"window_kernel": "softmax", "far_horizon": 40},
    "no sinks": {"chunk_size": 16, "window": 16},
}
each_form = pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)


def draw_inputs(length=70, **data):
    return draw("dark", length, heads=(4, 2), batch=2, gain=True, **data)


@each_form
@pytest.mark.parametrize("ids", [np.ones_like(DOCUMENTS), DOCUMENTS], ids=["one document", "three"])
def test_outputs_and_gradients_are_those_of_the_definition(ids, options):
    x = draw_inputs()
    cotangent = draw_cotangent(x)
    want, of_x = oracle("dark", x, ids, cotangent, **options)
    out, got = with_gradients("dark", x, cotangent, ids, **options, **KERNEL)
    assert_rows_close(out, want, 1e-4)
    assert_gradients_close(got, of_x, 1e-4)


@each_form
def test_any_number_names_a_document_and_padding_has_no_gradients(options):
    x, ids = draw_inputs(), -IDS["padding between"]
    cotangent = draw_cotangent(x)
    want, of_x = with_gradients("dark", x, cotangent, ids, **options)
    out, got = with_gradients("dark", x, cotangent, ids, **options, **KERNEL)
    np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)
    assert_gradients_close(got, of_x, 1e-4)
    assert np.all(over_tokens(ids == 0, np.asarray(got.k)) * np.asarray(got.k) == 0)


@pytest.mark.parametrize("size", [1.0, 1e-7])
@pytest.mark.parametrize(("extreme", "limit"), [(1.0, 1e-4), ((1157 / 500) ** 0.5, 5e-4)])
def test_points_far_from_the_origin_and_small_losses_keep_their_digits(extreme, limit, size):
    x = draw_inputs(extreme=extreme)
    cotangent = draw_cotangent(x)
    want, of_x = oracle("dark", x, DOCUMENTS, cotangent, **SIZES)
    out, got = with_gradients("dark", x, size * cotangent, DOCUMENTS, **SIZES, **KERNEL)
    assert_rows_close(out, want, limit)
    assert_gradients_close(jax.tree.map(lambda leaf: np.float64(leaf) / size, got), of_x, limit)


def assert_states_close(got, want):
    """Of sinks that are not there, and of empty places of the window, nothing is asked."""
    assert np.array_equal(got.sinks.filled, want.sinks.filled)
    there = lambda x, mask: np.where(mask[:, None, :, None], x, 0)
    for name in ("keys", "values"):
        for part_of, mask in (("sinks", want.sinks.filled), ("recent", want.recent.segments != 0)):
            ours, theirs = (there(getattr(getattr(state, part_of), name), mask) for state in (got, want))
            np.testing.assert_array_equal(ours, theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got.far, want.far)
    for name in ("segments", "positions"):
        mask = want.recent.segments != 0
        assert np.array_equal(*(np.where(mask, getattr(state.recent, name), 0) for state in (got, want)))
    for name in ("fill", "last_segment", "document_length"):
        assert np.array_equal(getattr(got, name), getattr(want, name))


IDS = {
    "packed": DOCUMENTS,
    "padding between": np.where(np.arange(70) % 7 == 3, 0, DOCUMENTS),
    "padding behind": np.where(np.arange(70) < 61, DOCUMENTS, 0),
    "nothing": np.zeros_like(DOCUMENTS),
    "an id that comes again": np.tile(np.repeat([1, 2, 1], (34, 34, 2)).astype(np.int32), (2, 1)),
    "rows of several lengths": np.where(np.arange(70) < np.array([[17], [64]]), 1, 0).astype(np.int32),
}


@each_form
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_the_state_is_that_of_the_scan_wherever_a_text_is_cut(ids, options):
    x = draw_inputs()
    states = []
    for backend in (KERNEL, {}):
        state, outs = None, []
        for start, stop in ((0, 21), (21, 43), (43, 70)):
            out, state = resume("dark", part(x, start, stop), state, ids[:, start:stop], **options, **backend)
            outs.append(out)
        states.append(state)
        whole = attend("dark", x, ids, **options, **backend)
        np.testing.assert_allclose(np.concatenate(outs, axis=1), whole, rtol=2e-5, atol=2e-5)
    assert_states_close(*states)
    padding = over_tokens(ids == 0, np.asarray(whole))
    assert np.all(np.where(padding, attend("dark", x, ids, **options, **KERNEL), 0) == 0)


@each_form
def test_gradients_pass_through_states_as_in_the_scan(options):
    x, cotangent = draw_inputs(), draw_cotangent(draw_inputs())

    def loss(x, backend):
        state, total = None, 0.0
        for start, stop in ((0, 37), (37, 70)):
            q, k, v, arrays = part(x, start, stop)
            out, state = dark_attention(q, k, v, **arrays, state=state, return_state=True, backend=backend, **options)
            total += jnp.sum(out * cotangent[:, start:stop])
        of_state = [state.far.normalizer, state.far.values, *state.sinks[:2], *state.recent[:2]]
        return total + sum(jnp.sum(jnp.sin(leaf)) for leaf in of_state)

    got, want = (jax.jit(jax.grad(loss), static_argnums=1)(x, backend) for backend in ("pallas_interpret", "scan"))
    assert_gradients_close(got, want, 1e-4)


@pytest.mark.parametrize(
    ("options", "offset", "limit"), [(SIZES, 0, 2), (SIZES, 10, 1.3), ({"chunk_size": 16}, 10, 1.3)]
)
def test_bfloat16_is_as_near_to_float64_as_the_scan(options, offset, limit):
    """Values and keys with a mean of their own multiply what a row's gradients do not sum to zero by."""
    x = draw_inputs() if "window" in options else draw("dark", 70, heads=(4, 2), batch=2)
    round_up = lambda leaf: np.asarray(jnp.bfloat16(leaf), np.float32)
    x = x._replace(q=round_up(x.q), k=round_up(x.k + 0.3 * offset), v=round_up(x.v + offset))
    cotangent = round_up(draw_cotangent(x))
    want, of_x = oracle("dark", x, DOCUMENTS, cotangent, **options)
    rounded = x._replace(q=jnp.bfloat16(x.q), k=jnp.bfloat16(x.k), v=jnp.bfloat16(x.v))
    error = lambda got, want: np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
    errors = {}
    for backend in ("scan", "pallas_interpret"):
        out, got = with_gradients("dark", rounded, jnp.bfloat16(cotangent), DOCUMENTS, **options, backend=backend)
        leaves = zip(jax.tree.leaves(got), jax.tree.leaves(of_x), strict=True)
        errors[backend] = np.array([error(out, want), *(error(ours, leaf) for ours, leaf in leaves)])
    # The scan's may be smaller than what rounding to bfloat16 alone does, by luck.
    assert np.all(errors["pallas_interpret"] < limit * np.maximum(errors["scan"], 2.0**-9)), errors


@pytest.mark.parametrize("options", [SIZES, {"chunk_size": 16}], ids=["hybrid", "features"])
def test_heads_of_queries_may_be_split_where_those_of_keys_are_not(options):
    """Traced for two devices that are not there: the gradients' types fit, and the output is not that of one."""
    mesh = AbstractMesh((2,), ("tensor",), axis_types=(AxisType.Auto,))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in draw("dark", 32)[:3]]
    w, heads = jax.ShapeDtypeStruct((1, 32, 16), jnp.float32), PartitionSpec(None, None, "tensor")

    def run(q, k, v, w, out=heads):
        attend = lambda q, k, v, w: dark_attention(q, k, v, projections=w, **options, **KERNEL)
        specs = (heads, *(PartitionSpec() for _ in range(3)))
        return jnp.sum(jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=out)(q, k, v, w))

    gradients = jax.eval_shape(jax.grad(run, argnums=(0, 1, 2, 3)), *shapes, w)
    assert [leaf.shape for leaf in gradients] == [*(leaf.shape for leaf in shapes), w.shape]
    with pytest.raises(ValueError, match="out_specs"):
        jax.eval_shape(functools.partial(run, out=PartitionSpec()), *shapes, w)


def test_later_tokens_change_nothing():
    x = draw_inputs()
    changed = x._replace(k=x.k.copy(), v=x.v.copy())
    changed.k[:, 25:], changed.v[:, 25:] = 3.0, -5.0
    got, want = (np.asarray(attend("dark", y, **SIZES, **KERNEL)) for y in (changed, x))
    np.testing.assert_array_equal(got[:, :25], want[:, :25])
    assert np.abs(got[:, 25:] - want[:, 25:]).max() > 0.1


def test_one_token_after_a_state_takes_the_step_of_the_scan():
    x = draw_inputs(1)
    state = init_state(2, 2, 16, 8, 32, jnp.float32, **SIZES)
    call = lambda x, state: dark_attention(*x[:3], **x.arrays, state=state, return_state=True, **SIZES, **KERNEL)
    assert "pallas_call" not in str(jax.make_jaxpr(call)(x, state))
    assert str(jax.make_jaxpr(call)(draw_inputs(2), state)).count("pallas_call") == 1


IN_BFLOAT16 = init_state(1, 1, 16, 8, 32, jnp.bfloat16, **SIZES)


@pytest.mark.parametrize(
    ("op", "more", "message"),
    [
        ("dark with gates", {}, "backend = 'pallas_interpret' does not cover a decay with a window: use backend = 'sc"),
        ("dark", {"projections": None}, "does not cover a window without features: use backend = 'scan'"),
        (
            "dark",
            {"state": IN_BFLOAT16},
            "does not cover a state of bfloat16 with inputs of float32: use backend = 'scan'",
        ),
    ],
)
def test_what_the_kernel_does_not_cover_is_one_line(op, more, message):
    x = jax.tree.map(jnp.asarray, draw(op, 8))
    with pytest.raises(UserError, match=re.escape(message)):
        dark_attention(*x[:3], **x.arrays | more, **SIZES, **KERNEL)


def test_chunks_that_a_tpu_does_not_take_are_named(monkeypatch):
    monkeypatch.setattr("darkformer_jax.ops.attend.target_platform", lambda: "tpu")
    message = "chunk_size = 24: backend = 'pallas' with a window takes multiples of 16, backend = 'scan' any"
    x = jax.tree.map(jnp.asarray, draw("dark", 8))
    with pytest.raises(UserError, match=re.escape(message)):
        dark_attention(*x[:3], **x.arrays, chunk_size=24, window=24, backend="pallas")


# Chip, rows and tokens, heads, size of a head, features, dtype, chunk, and whether 64 bits are on.
COMPILED = [
    ("v5e:1x1", (1, 1024), (8, 1), 256, 256, jnp.bfloat16, 128, False),
    ("v5p:2x2x1", (256, 256), (9, 3), 64, 64, jnp.float32, 64, True),
    ("v6e:1x1", (1, 1024), (8, 8), 128, 256, jnp.bfloat16, 16, False),
]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(("topology", "tokens", "heads", "dim", "features", "dtype", "chunk", "x64"), COMPILED)
def test_it_compiles_for_tpus_whose_memories_it_fits(
    topology, tokens, heads, dim, features, dtype, chunk, x64, without_cache
):
    mesh = Mesh(np.array(topology_devices(topology)[:1]), ("x",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)
    q, k = (of(*tokens, count, dim, dtype=dtype) for count in heads)
    arrays = {"projections": of(heads[1], features, dim), "geometry": of(heads[1], dim, dim), "log_gain": of(heads[0])}
    options = {"chunk_size": chunk, "window": 2 * chunk, "num_sinks": 4, "far_horizon": 256, "backend": "pallas"}
    loss = lambda x: jnp.sum(dark_attention(*x[:3], **x.arrays, **options).astype(jnp.float32))
    with jax.set_mesh(mesh), jax.enable_x64(x64):
        program = jax.jit(jax.grad(loss)).lower(Inputs(q, k, k, arrays)).compile().as_text()
    assert program.count("tpu_custom_call") >= 2  # forward and backward
