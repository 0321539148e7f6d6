"""The gated delta rule in chunks, against its recurrence in float64, and against transformers' two forms of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.errors import UserError
from darkformer_jax.ops.delta_rule import delta_rule_attention
from darkformer_jax.ops.oracle import delta_rule_oracle
from darkformer_jax.ops.signed_attention import init_signed_state
from tests.ops.test_signed_attention import assert_close, documents
from tests.ops.test_signed_attention import draw as draw_signed


def draw(length, heads=(2, 2, 2), batch=1, seed=0):
    """(q, k, v, beta, log_decay) with q and k of length 1."""
    q, k, v, decays = draw_signed(length, heads, batch=batch, seed=seed)
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    beta = np.random.default_rng(seed + 1).random(decays.shape).astype(np.float32)
    return q, k, v, beta, decays


@jax.jit
def attend(inputs, segment_ids=None, state=None):
    return delta_rule_attention(*inputs, segment_ids=segment_ids, chunk_size=16, state=state)


def with_gradients(attention, inputs, cotangent):
    def run(inputs, cotangent):
        out, pull = jax.vjp(lambda inputs: jax.tree.leaves(attention(*inputs))[0], inputs)
        return out, *pull(cotangent)[0]

    return jax.jit(run)(inputs, cotangent)


@pytest.mark.parametrize(
    ("heads", "length", "chunk_size", "segments"),
    [
        ((2, 2, 2), 1, 16, None),
        ((4, 2, 2), 63, 16, None),
        ((1, 1, 4), 100, 7, (37, 1, 62)),
        ((2, 2, 4), 201, 64, (100, 1, 90, 10)),
    ],
)
def test_outputs_and_every_gradient_against_the_recurrence(heads, length, chunk_size, segments):
    inputs = draw(length, heads, batch=2)
    ids = None if segments is None else jnp.asarray(np.tile(documents(*segments), (2, 1)))
    cotangent = np.random.default_rng(1).standard_normal((2, length, max(heads), 5)).astype(np.float32)
    ours = lambda *x: delta_rule_attention(*x, segment_ids=ids, chunk_size=chunk_size)
    got = with_gradients(ours, inputs, cotangent)
    with jax.enable_x64(True):
        wide = tuple(np.asarray(x, np.float64) for x in inputs)
        theirs = lambda *x: delta_rule_oracle(*x, segment_ids=ids)
        want = jax.tree.map(np.asarray, with_gradients(theirs, wide, np.asarray(cotangent, np.float64)))
    for mine, reference in zip(got, want, strict=True):
        if length > 1 or np.any(reference):  # a single token has no decay before it
            assert_close(mine, reference, 1e-4)


def test_it_is_transformers_rule_in_chunks_and_token_by_token():
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    q, k, v, beta, decays = draw(90, (2, 2, 4), batch=2)
    out, state = attend((q * 8**-0.5, k, v, beta, decays))
    tensors = [torch.tensor(x) for x in (q, k, v)]
    more = {"g": torch.tensor(decays), "beta": torch.tensor(beta), "output_final_state": True}
    for rule in (module.torch_chunk_gated_delta_rule, module.torch_recurrent_gated_delta_rule):
        want, last = rule(*tensors, **more)
        assert_close(out, want.numpy(), 1e-4)
        assert_close(state.values, last.numpy(), 1e-4)


def test_padding_with_nan_leaves_no_trace():
    inputs, real = draw(50), np.arange(60) % 6 != 0
    padded = tuple(np.full((1, 60, *x.shape[2:]), np.nan, np.float32) for x in inputs)
    for x, wide in zip(inputs, padded, strict=True):
        wide[:, real] = x
    out, state = attend(padded, real[None].astype(np.int32))
    want, last = attend(inputs)
    np.testing.assert_array_equal(out[:, ~real], 0)
    assert_close(out[:, real], want)
    assert_close(state.values, last.values)


def test_resumed_is_unbroken_by_pieces_and_by_tokens():
    inputs, ids = draw(60, (2, 2, 4)), documents(24, 36)
    whole, last = attend(inputs, ids)
    state, pieces = init_signed_state(1, 4, 8, 5, jnp.float32), []
    for start, stop in [(0, 20), (20, 50), *((n, n + 1) for n in range(50, 60))]:
        out, state = attend(tuple(x[:, start:stop] for x in inputs), ids[:, start:stop], state)
        pieces.append(out)
    assert_close(np.concatenate(pieces, axis=1), whole)
    assert_close(state.values, last.values)


def test_a_key_holds_the_value_that_it_was_last_given():
    _, k, v, _, _ = draw(100, (1, 1, 1))
    k[0] = np.tile(np.eye(8, dtype=np.float32)[:, None], (13, 1, 1))[:100]
    ones, never = np.ones((1, 100, 1), np.float32), np.zeros((1, 100, 1), np.float32)
    out, _ = attend((np.roll(k, 8, axis=1), k, v, ones, never))
    assert_close(out[:, 8:], v[:, 8:])  # each replaced what its key was given eight tokens before


def test_another_shape_of_beta_is_refused(unchecked_types):
    q, k, v, beta, decays = map(jnp.asarray, draw(4))
    with pytest.raises(UserError, match=r"beta has shape \(1, 4, 1\); expected \(1, 4, 2\)"):
        delta_rule_attention(q, k, v, beta[..., :1], decays)
