import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.attention.features import draw_layer
from darkformer_jax.attention.spec import AttentionSpec
from darkformer_jax.model import ModelSpec, Network, is_geometry, logical_axes

ATTENTION = AttentionSpec(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_features=12,
    projections="orthogonal",
    geometry_init=1.0,
    chunk_size=8,
    window=0,
    num_sinks=0,
    seed=5,
)
SPEC = ModelSpec(
    vocab_size=37,
    num_layers=4,
    embed_dim=24,
    mlp_dim=40,
    activation="silu",
    norm_eps=1e-6,
    rope_theta=1e4,
    qk_norm=True,
    tie_embeddings=True,
    scale_embeddings=False,
    logit_softcap=0.0,
    dtype="float32",
    remat="none",
    pattern=("softmax", "dark"),
    attention=ATTENTION,
)
LENGTH = 29
random = np.random.default_rng(0)
TOKENS = random.integers(0, 37, (2, LENGTH)).astype(np.int32)
IDS = np.ones((2, LENGTH), np.int32)
POSITIONS = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))


def change(**fields):
    return dataclasses.replace(SPEC, **fields)


@functools.cache
def build(spec=SPEC):
    """(network, params, projections) of a spec."""
    network = Network.of(spec)
    return network, *jax.jit(network.init)(jax.random.key(0))


@functools.cache
def _forward(spec):
    network = Network.of(spec)
    return jax.jit(lambda params, projections, *arguments: network.bind(params, projections)(*arguments))


def forward(spec, tokens, ids, positions, state=None):
    _, params, projections = build(spec)
    return _forward(spec)(params, projections, tokens, ids, positions, state)


def names_and_sizes(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_decode_is_forward_through_a_pattern():
    logits, none = forward(SPEC, TOKENS, IDS, POSITIONS)
    assert none is None and logits.shape == (2, LENGTH, 37) and logits.dtype == jnp.float32
    network, params, projections = build()
    state = network.bind(params, projections).init_state(2, LENGTH)
    ids = IDS[:, :13].copy()
    ids[1, 10:] = 0
    prefill, state = forward(SPEC, TOKENS[:, :13], ids, POSITIONS[:, :13], state)
    np.testing.assert_allclose(prefill[0], logits[0, :13], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(prefill[1, :10], logits[1, :10], rtol=1e-4, atol=1e-5)
    places = np.array([13, 10])
    for _ in range(16):
        token = TOKENS[np.arange(2), places][:, None]
        decoded, state = forward(SPEC, token, IDS[:, :1], places[:, None].astype(np.int32), state)
        np.testing.assert_allclose(decoded[:, 0], logits[np.arange(2), places], rtol=1e-4, atol=1e-5)
        places = places + 1


def test_later_tokens_and_other_documents_change_nothing():
    logits, _ = forward(SPEC, TOKENS, IDS, POSITIONS)
    tokens = TOKENS.copy()
    tokens[:, 17:] = (tokens[:, 17:] + 1) % 37
    ids, positions = IDS.copy(), POSITIONS.copy()
    ids[1, 17:], positions[1, 17:] = 2, np.arange(12)
    changed, _ = forward(SPEC, tokens, ids, positions)
    np.testing.assert_allclose(changed[:, :17], logits[:, :17], rtol=1e-5, atol=1e-6)
    alone = np.roll(tokens, -17, axis=1)
    second, _ = forward(SPEC, alone, np.where(POSITIONS < 12, 1, 0).astype(np.int32), POSITIONS)
    np.testing.assert_allclose(changed[1, 17:], second[1, :12], rtol=1e-4, atol=1e-5)


def test_layers_run_in_the_order_of_the_pattern():
    # By hand, layer by layer, with the modules' own arrays: softmax 0, dark 1, softmax 2, dark 3.
    network, params, projections = build()

    @jax.jit
    def by_hand(params, projections):
        x = params["embedding"][TOKENS]
        for layer in range(4):
            place, index = layer % 2, layer // 2
            one = Network.of(change(num_layers=1, pattern=(SPEC.pattern[place],)))
            pick = lambda tree: jax.tree.map(lambda leaf: leaf[index : index + 1], tree)
            only = {**params, "blocks_0": pick(params[f"blocks_{place}"])}
            del only["blocks_1"]
            fixed = {name: pick(projections[name]) for name in projections if name == f"blocks_{place}"}
            model = one.bind(only, {"blocks_0": value for value in fixed.values()})
            model.final_norm = lambda x: x
            model.embedding = _Constant(x.reshape(2 * LENGTH, -1))
            x, _ = model.hidden(np.arange(2 * LENGTH).reshape(2, LENGTH), IDS, POSITIONS)
        return x

    hidden = jax.jit(lambda p, w: network.bind(p, w).hidden(TOKENS, IDS, POSITIONS)[0])(params, projections)
    x = np.asarray(by_hand(params, projections))
    np.testing.assert_allclose(hidden, x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6), rtol=1e-4, atol=1e-5)


class _Constant:
    """Stands in for the embedding table."""

    def __init__(self, table):
        self.table = table

    def __getitem__(self, _):
        return self.table


def loss_and_gradients(spec):
    network, params, projections = build(spec)

    @jax.jit
    def run(params):
        def loss(params):
            logits, _ = network.bind(params, projections)(TOKENS, IDS, POSITIONS)
            log_p = jax.nn.log_softmax(logits[:, :-1])
            return -jnp.mean(jnp.take_along_axis(log_p, TOKENS[:, 1:, None], axis=-1))

        return jax.value_and_grad(loss)(params)

    return run(params)


def test_remat_changes_neither_loss_nor_gradients():
    loss, gradients = loss_and_gradients(SPEC)
    assert 3 < loss < 5
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradients))
    for remat in ("dots", "full"):
        other_loss, other = loss_and_gradients(change(remat=remat))
        np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), other, gradients)


def test_remat_keeps_less():
    def temporary(remat):
        spec = change(remat=remat, num_layers=8)
        network = Network.of(spec)
        params, projections = jax.eval_shape(network.init, jax.random.key(0))
        tokens = jax.ShapeDtypeStruct((2, 256), jnp.int32)

        def loss(params, projections, tokens):
            return jnp.sum(network.bind(params, projections)(tokens, tokens, tokens)[0])

        compiled = jax.jit(jax.grad(loss)).lower(params, projections, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary("full") < 0.7 * temporary("none")


@pytest.mark.parametrize(
    ("pattern", "num_layers"), [(("performer",), 3), (("softmax", "dark"), 4), (("random", "lfk", "performer"), 6)]
)
def test_redraw_is_a_function_of_layer_and_epoch(pattern, num_layers):
    network, _, projections = build(change(pattern=pattern, num_layers=num_layers))
    redraw = jax.jit(network.redraw)
    same, redrawn = redraw(projections, 0), redraw(projections, 7)
    jax.tree.map(np.testing.assert_array_equal, same, projections)
    assert jax.tree.structure(redrawn) == jax.tree.structure(projections)
    drawn = jax.jit(lambda layer: draw_layer(ATTENTION, layer, 7))
    for layer in range(num_layers):
        place, index = layer % len(pattern), layer // len(pattern)
        if pattern[place] in ("softmax", "lfk"):
            assert not jax.tree.leaves(redrawn.get(f"blocks_{place}", {}))
            continue
        mechanism = redrawn[f"blocks_{place}"]["attention"]["mechanism"]
        np.testing.assert_array_equal(mechanism["projections"][index], drawn(layer))
        if pattern[place] == "random":
            kept = projections[f"blocks_{place}"]["attention"]["mechanism"]["noise_key"]
            np.testing.assert_array_equal(mechanism["noise_key"], kept)
            assert len(np.unique(kept, axis=0)) == num_layers // len(pattern)


@pytest.mark.parametrize(
    ("fields", "heads", "per_layer"),
    [
        ({"pattern": ("performer",), "qk_norm": False}, 1, 0),
        ({"pattern": ("dark",), "qk_norm": False}, 1, 2 * 8 * 8),
        ({"pattern": ("lfk",), "tie_embeddings": False}, 2, 2 * 12 * 8 + 2 * 8),
        ({"pattern": ("softmax", "dark")}, 1, 2 * 8 * 8 / 2 + 2 * 8),
    ],
)
def test_number_of_parameters(fields, heads, per_layer):
    network = Network.of(change(**fields))
    count = sum(jax.tree.leaves(network.map_params(lambda _, variable: int(np.prod(variable.shape)))))
    attention = 2 * 24 * 4 * 8 + 2 * 24 * 2 * 8
    assert count == heads * 37 * 24 + 24 + 4 * (attention + 3 * 24 * 40 + 2 * 24 + per_layer)


def test_abstract_and_drawn_model_have_the_same_arrays():
    network, params, projections = build()
    drawn, stored = names_and_sizes(params), names_and_sizes(projections)
    assert names_and_sizes(network.map_params(lambda _, v: np.empty(v.shape))) == drawn
    assert names_and_sizes(network.map_projections(lambda _, v: np.empty(v.shape))) == stored
    assert stored == {"blocks_1/attention/mechanism/projections": (2, 2, 12, 8)}
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    geometry = network.map_params(lambda _, variable: is_geometry(variable))
    learned = [path[-1].key for path, yes in jax.tree_util.tree_leaves_with_path(geometry) if yes]
    assert learned == ["M"]
    axes = network.map_params(lambda _, variable: logical_axes(variable))
    assert axes["embedding"] == ("vocab", "embed")
    assert axes["blocks_1"]["attention"]["mechanism"]["M"] == (None, "kv_heads", None, None)
    assert axes["blocks_0"]["attention"]["out"]["kernel"] == (None, "heads", None, "embed")


def test_weights_start_at_their_scale():
    _, params, _ = build(change(embed_dim=96, vocab_size=300, pattern=("dark",)))
    assert np.std(params["embedding"]) == pytest.approx(96**-0.5, rel=0.05)
    attention = params["blocks_0"]["attention"]
    assert np.std(attention["q"]["kernel"]) == pytest.approx(96**-0.5, rel=0.05)
    assert np.std(attention["out"]["kernel"]) == pytest.approx(32**-0.5, rel=0.05)
    assert np.std(params["blocks_0"]["mlp"]["down"]["kernel"]) == pytest.approx(40**-0.5, rel=0.05)
    first, second = attention["q"]["kernel"][:2]
    assert not np.any(first == second)


def test_untied_head_softcap_and_scaled_embeddings():
    one = change(num_layers=1, pattern=("dark",))
    network, params, projections = build(one)

    def logits(spec, params):
        run = jax.jit(lambda p: Network.of(spec).bind(p, projections)(TOKENS, IDS, POSITIONS)[0])
        return np.asarray(run(params))

    plain = logits(one, params)
    untied = dataclasses.replace(one, tie_embeddings=False)
    head = random.standard_normal((37, 24)).astype(np.float32)
    hidden = jax.jit(lambda p: network.bind(p, projections).hidden(TOKENS, IDS, POSITIONS)[0])(params)
    np.testing.assert_allclose(plain, hidden @ params["embedding"].T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits(untied, {**params, "head": head}), hidden @ head.T, rtol=1e-4, atol=1e-4)
    capped = logits(dataclasses.replace(one, logit_softcap=2.0), params)
    np.testing.assert_allclose(capped, 2 * np.tanh(plain / 2), rtol=1e-4, atol=1e-5)
    # Scaling what goes in is scaling the table where it is untied.
    larger = {**params, "embedding": params["embedding"] * np.float32(24**0.5), "head": head}
    scaled = dataclasses.replace(untied, scale_embeddings=True)
    np.testing.assert_allclose(logits(scaled, {**params, "head": head}), logits(untied, larger), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", [("dark",), ("constant", "random", "lfk", "performer")])
def test_bfloat16_is_near_float32(pattern):
    spec = change(pattern=pattern)
    wide, _ = forward(spec, TOKENS, IDS, POSITIONS)
    _, params, projections = build(spec)
    narrow, _ = _forward(dataclasses.replace(spec, dtype="bfloat16"))(params, projections, TOKENS, IDS, POSITIONS, None)
    assert narrow.dtype == jnp.float32
    difference = np.linalg.norm(narrow - wide) / np.linalg.norm(wide)
    assert 1e-4 < difference < 3e-2
