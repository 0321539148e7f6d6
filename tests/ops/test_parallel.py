"""All chunks at once against the definition in float64 and the scan; in blocks of two, of five chunks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax import dark_attention
from darkformer_jax.errors import UserError
from tests.ops.linear_attentions import (
    BOUNDED,
    DARK,
    HYBRID,
    PURE,
    assert_gradients_close,
    assert_like_float64,
    assert_states_close,
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

LENGTH = 70
DOCUMENTS = np.tile(documents(2, 40, 28), (2, 1))
PARALLEL = {"backend": "parallel"}
FORMS = [*((op, form) for op in DARK for form in (PURE, HYBRID)), ("dark", BOUNDED), ("dark with gates", BOUNDED)]
each_form = pytest.mark.parametrize(("op", "options"), FORMS, ids=lambda x: x if isinstance(x, str) else "-".join(x))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("darkformer_jax.ops.parallel.BLOCK_TOKENS", 32)
    monkeypatch.setattr("darkformer_jax.ops.parallel.UNROLLED", 1)  # which compiles faster


@each_form
def test_outputs_and_gradients_are_those_of_the_definition(op, options):
    assert_like_float64(op, LENGTH, {"heads": (4, 2), "batch": 2}, (2, 40, 28), options, **PARALLEL)


@pytest.mark.parametrize(("length", "again"), [(32, True), (64, False)])
def test_features_are_computed_again_where_xla_unrolls_the_loop_over_blocks(length, again):
    """In a loop of several steps nothing has to be done for it."""
    x = draw("dark", length, heads=(1, 1))
    program = str(jax.make_jaxpr(lambda x: attend("dark", x, None, **PURE, **PARALLEL))(x))
    assert re.findall(r"prevent_cse=(\w+)", program) == [str(again)]


IDS = {
    "packed": DOCUMENTS,
    "padding between": np.where(np.arange(LENGTH) % 7 == 3, 0, DOCUMENTS),
    "nothing": np.zeros_like(DOCUMENTS),
    "an id that comes again": np.tile(np.repeat([1, 2, 1], (34, 34, 2)).astype(np.int32), (2, 1)),
    "rows of several lengths": np.where(np.arange(LENGTH) < np.array([[17], [64]]), 1, 0).astype(np.int32),
}


@each_form
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_the_state_is_that_of_the_scan_wherever_a_text_is_cut(op, options, ids):
    x = draw(op, LENGTH, heads=(4, 2), batch=2, gain="window" in options)
    states = []
    for backend in (PARALLEL, {}):
        state, outs = None, []
        for start, stop in ((0, 21), (21, 43), (43, LENGTH)):
            out, state = resume(op, part(x, start, stop), state, ids[:, start:stop], **options, **backend)
            outs.append(out)
        states.append(state)
        whole = attend(op, x, ids, **options, **backend)
        np.testing.assert_allclose(np.concatenate(outs, axis=1), whole, rtol=5e-5, atol=5e-5)
    assert_states_close(*states)
    assert np.all(np.where(over_tokens(ids == 0, np.asarray(whole)), attend(op, x, ids, **options, **PARALLEL), 0) == 0)


@pytest.mark.parametrize("op", ["dark", "dark with gates"])
@pytest.mark.parametrize("options", [PURE, HYBRID], ids=["features", "hybrid"])
def test_gradients_pass_through_states_as_in_the_scan(op, options):
    x = jax.tree.map(jnp.asarray, draw(op, LENGTH, heads=(4, 2), batch=2, gain="window" in options))
    cotangent = draw_cotangent(x)

    def loss(x, backend):
        state, total = None, 0.0
        for start, stop in ((0, 37), (37, LENGTH)):
            q, k, v, arrays = part(x, start, stop)
            out, state = dark_attention(q, k, v, **arrays, state=state, return_state=True, backend=backend, **options)
            total += jnp.sum(out * cotangent[:, start:stop])
        return total + sum(jnp.sum(jnp.sin(leaf)) for leaf in (*state.far[1:3], *state.sinks[:2], *state.recent[:2]))

    got, want = (jax.jit(jax.grad(loss), static_argnums=1)(x, backend) for backend in ("parallel", "scan"))
    assert_gradients_close(got, want, 1e-4)


@pytest.mark.parametrize("options", [PURE, HYBRID], ids=["features", "hybrid"])
def test_bfloat16_is_as_near_to_float64_as_the_scan(options):
    x = draw("dark", LENGTH, heads=(4, 2), batch=2)
    cotangent = draw_cotangent(x)
    want, of_x = oracle("dark", x, DOCUMENTS, cotangent, **options)
    rounded = x._replace(q=jnp.bfloat16(x.q), k=jnp.bfloat16(x.k), v=jnp.bfloat16(x.v))
    error = lambda got, want: np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
    errors = {}
    for backend in ("scan", "parallel"):
        out, got = with_gradients("dark", rounded, jnp.bfloat16(cotangent), DOCUMENTS, **options, backend=backend)
        leaves = zip(jax.tree.leaves(got), jax.tree.leaves(of_x), strict=True)
        errors[backend] = np.array([error(out, want), *(error(ours, leaf) for ours, leaf in leaves)])
    assert np.all(errors["parallel"] < 1.5 * errors["scan"]), errors


def products(jaxpr, times=1):
    """How many products of matrices a program runs one after another; those of a scan once per step."""
    total = 0
    for equation in jaxpr.eqns:
        steps = equation.params["length"] if equation.primitive.name == "scan" else 1
        inner = jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr"))
        inner = [leaf.jaxpr if hasattr(leaf, "jaxpr") else leaf for leaf in inner]
        total += sum(products(leaf, times * steps) for leaf in inner if hasattr(leaf, "eqns"))
        total += times * (equation.primitive.name == "dot_general")
    return total


@pytest.mark.parametrize("options", [PURE, {"chunk_size": 16, "window": 16}], ids=["features", "hybrid"])
def test_a_longer_block_runs_no_more_products(options, monkeypatch):
    monkeypatch.setattr("darkformer_jax.ops.parallel.BLOCK_TOKENS", 512)

    def count(length, backend):
        x = jax.tree.map(jnp.asarray, draw("dark", length))
        call = lambda x: dark_attention(*x[:3], **x.arrays, **options, backend=backend)
        return products(jax.make_jaxpr(call)(x).jaxpr)

    of_block = count(64, "parallel")
    assert 0 < of_block == count(512, "parallel") < count(1024, "parallel") <= 2 * of_block
    assert count(512, "scan") > 7 * count(64, "scan") > 20 * of_block


def test_attention_that_is_not_causal_is_refused():
    x = jax.tree.map(jnp.asarray, draw("dark", 8))
    message = "backend = 'parallel' does not cover causal=False: use backend = 'scan'"
    with pytest.raises(UserError, match=re.escape(message)):
        dark_attention(*x[:3], **x.arrays, causal=False, **PARALLEL)
