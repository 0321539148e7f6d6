import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.mixers.features import draw_layer
from darkformer_jax.mixers.spec import MixerSpec
from darkformer_jax.model.network import Network, is_geometry, logical_axes
from darkformer_jax.model.spec import ModelSpec
from tests.tiny_specs import mixer_spec, rope_spec

ATTENTION = mixer_spec(embed_dim=24, qk_norm=True, num_features=12, seed=5)
SPEC = ModelSpec(
    vocab_size=37,
    num_layers=4,
    embed_dim=24,
    mlp_dim=40,
    activation="silu",
    norm_eps=1e-6,
    norm_plus_one=False,
    post_norms=False,
    tie_embeddings=True,
    scale_embeddings=False,
    logit_softcap=0.0,
    dtype="float32",
    remat="none",
    pattern=(dataclasses.replace(ATTENTION, kind="softmax"), ATTENTION),
    num_outputs=0,
    pooling="last",
)
LOCAL_ROPE = rope_spec(theta=100.0)
ROPE = rope_spec(scaling="yarn", factor=8.0, original_length=16)
OPTIONS = {"num_kv_heads": 1, "query_scale": 0.5, "softcap": 2.0, "qkv_bias": True, "norm_plus_one": True, "rope": ROPE}
GEMMA_LAYER = dataclasses.replace(ATTENTION, **OPTIONS)
# Every option of the pretrained families at once; the last repetition of the pattern is cut short.
GEMMA = dataclasses.replace(
    SPEC,
    num_layers=5,
    activation="gelu_tanh",
    scale_embeddings=True,
    logit_softcap=3.0,
    pattern=(
        dataclasses.replace(GEMMA_LAYER, kind="softmax_local", local_window=6, rope=LOCAL_ROPE),
        GEMMA_LAYER,
        dataclasses.replace(GEMMA_LAYER, kind="softmax"),
    ),
    norm_plus_one=True,
    post_norms=True,
)
LENGTH = 29
random = np.random.default_rng(0)
TOKENS = random.integers(0, 37, (2, LENGTH)).astype(np.int32)
IDS = np.ones((2, LENGTH), np.int32)
POSITIONS = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
BATCH = tuple(map(jnp.asarray, (TOKENS, IDS, POSITIONS)))  # constants of a jitted function, which annotations check


def change(spec=SPEC, **fields):
    """`spec` with these fields, its mixers with those that they have; `pattern`: their kinds."""
    kinds = fields.pop("pattern", [mixer.kind for mixer in spec.pattern])
    of_model, of_mixer = ({field.name for field in dataclasses.fields(kind)} for kind in (ModelSpec, MixerSpec))
    own = {name: value for name, value in fields.items() if name in of_mixer}
    named = {mixer.kind: mixer for mixer in spec.pattern}
    mixers = tuple(dataclasses.replace(named.get(kind, ATTENTION), kind=kind, **own) for kind in kinds)
    kept = {name: value for name, value in fields.items() if name in of_model}
    assert not fields.keys() - of_model - of_mixer
    return dataclasses.replace(spec, pattern=mixers, **kept)


@functools.cache
def build(spec=SPEC):
    """(network, params, projections) with every array drawn by numpy: compiling `Network.init` takes long."""
    network, draws = Network.of(spec), np.random.default_rng(1)

    def draw(path, variable):
        noise = draws.standard_normal(variable.shape)
        if path[-1] == "scale":
            return (1 + 0.1 * noise).astype(np.float32)
        if path[-1] == "M":
            return (np.eye(variable.shape[-1]) + 0.1 * noise).astype(np.float32)
        if path[-1] == "noise_key":
            return draws.integers(0, 2**32, variable.shape, np.uint32)
        return (noise if path[-1] == "projections" else 0.2 * noise).astype(np.float32)

    return network, network.map_params(draw), network.map_projections(draw)


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


@pytest.mark.parametrize("spec", [SPEC, GEMMA], ids=["llama", "gemma"])
def test_decode_is_forward_through_a_pattern(spec):
    logits, none = forward(spec, TOKENS, IDS, POSITIONS)
    assert none is None and logits.shape == (2, LENGTH, 37) and logits.dtype == jnp.float32
    network, params, projections = build(spec)
    state = network.bind(params, projections).init_state(2, LENGTH)
    ids = IDS[:, :13].copy()
    ids[1, 10:] = 0
    prefill, state = forward(spec, TOKENS[:, :13], ids, POSITIONS[:, :13], state)
    np.testing.assert_allclose(prefill[0], logits[0, :13], rtol=1e-4, atol=5e-5)
    np.testing.assert_allclose(prefill[1, :10], logits[1, :10], rtol=1e-4, atol=5e-5)
    places = np.array([13, 10])
    for _ in range(16):
        token = TOKENS[np.arange(2), places][:, None]
        decoded, state = forward(spec, token, IDS[:, :1], places[:, None].astype(np.int32), state)
        np.testing.assert_allclose(decoded[:, 0], logits[np.arange(2), places], rtol=1e-4, atol=5e-5)
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


@pytest.mark.parametrize(
    ("pattern", "num_layers"), [(("softmax", "dark"), 4), (("softmax", "dark", "softmax"), 4), (("dark", "softmax"), 3)]
)
def test_layers_run_in_the_order_of_the_pattern(pattern, num_layers):
    # By hand, layer by layer, with the modules' own arrays.
    spec = change(pattern=pattern, num_layers=num_layers)
    network, params, projections = build(spec)

    @jax.jit
    def by_hand(params, projections):
        x = params["embedding"][TOKENS]
        for layer in range(num_layers):
            place, index = layer % len(pattern), layer // len(pattern)
            name = f"blocks_{place}"
            one = Network.of(change(num_layers=1, pattern=(pattern[place],)))
            pick = functools.partial(jax.tree.map, lambda leaf, index=index: leaf[index : index + 1])
            only = {path: leaf for path, leaf in params.items() if not path.startswith("blocks_")}
            only["blocks_0"] = pick(params[name])
            model = one.bind(only, {"blocks_0": pick(projections[name])} if name in projections else {})
            model.final_norm = lambda x: x
            model.embedding = _Constant(x.reshape(2 * LENGTH, -1))
            x, _ = model.hidden(np.arange(2 * LENGTH).reshape(2, LENGTH), *BATCH[1:])
        return x

    hidden = jax.jit(lambda p, w: network.bind(p, w).hidden(*BATCH)[0])(params, projections)
    x = np.asarray(by_hand(params, projections))
    normed = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * params["final_norm"]["scale"]
    np.testing.assert_allclose(hidden, normed, rtol=1e-4, atol=1e-5)


class _Constant:
    """Stands in for the embedding table."""

    def __init__(self, table):
        self.table = table

    def __getitem__(self, _):
        return self.table


@pytest.mark.parametrize(
    ("pattern", "num_layers"),
    [(("dark",), 5), (("dark", "softmax"), 5)],
    ids=["a scan", "a scan and a layer behind it"],
)
def test_remat_changes_neither_loss_nor_gradients_and_keeps_less(pattern, num_layers):
    """Patterns in which no layers repeat are asked by tests of the training step, on CPUs and TPUs."""
    spec = change(num_layers=num_layers, pattern=pattern)
    _, params, projections = build(spec)
    projections = jax.tree.map(jnp.asarray, projections)
    tokens = jnp.asarray(random.integers(0, 37, (2, 128)), jnp.int32)
    positions = jnp.tile(jnp.arange(128, dtype=jnp.int32), (2, 1))

    def run(remat):
        network = Network.of(dataclasses.replace(spec, remat=remat))

        def loss(params):
            logits, _ = network.bind(params, projections)(tokens, jnp.ones_like(tokens), positions)
            log_p = jax.nn.log_softmax(logits[:, :-1])
            return -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1))

        compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        return *compiled(params), compiled.memory_analysis().temp_size_in_bytes

    loss, gradients, temporary = run("none")
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradients))
    for remat in ("dots", "full"):
        other_loss, other, other_temporary = run(remat)
        np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.linalg.norm(b)), other, gradients)
        assert other_temporary < 0.9 * temporary


@pytest.mark.parametrize(
    ("pattern", "num_layers"), [(("performer",), 3), (("softmax", "dark"), 4), (("random", "lfk", "performer"), 5)]
)
def test_redraw_is_a_function_of_layer_and_epoch(pattern, num_layers):
    network, _, projections = build(change(pattern=pattern, num_layers=num_layers))
    redrawn = jax.jit(network.redraw)(projections, 7)
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


@pytest.mark.parametrize(
    ("fields", "heads", "per_layer"),
    [
        ({"pattern": ("performer",), "qk_norm": False}, 1, 0),
        ({"pattern": ("dark",), "qk_norm": False}, 1, 2 * 8 * 8),
        ({"pattern": ("lfk",), "tie_embeddings": False}, 2, 2 * 12 * 8 + 2 * 8),
        ({"pattern": ("softmax", "dark")}, 1, 2 * 8 * 8 / 2 + 2 * 8),
        ({"pattern": ("softmax",), "qkv_bias": True}, 1, (4 + 2 + 2) * 8 + 2 * 8),
        ({"pattern": ("softmax",), "post_norms": True}, 1, 2 * 24 + 2 * 8),
        ({"pattern": ("dark", "softmax", "softmax")}, 1, 2 * 2 * 8 * 8 / 4 + 2 * 8),
    ],
)
def test_number_of_parameters(fields, heads, per_layer):
    network = Network.of(change(**fields))
    count = sum(jax.tree.leaves(network.map_params(lambda _, variable: int(np.prod(variable.shape)))))
    attention = 2 * 24 * 4 * 8 + 2 * 24 * 2 * 8
    assert count == heads * 37 * 24 + 24 + 4 * (attention + 3 * 24 * 40 + 2 * 24 + per_layer)


def test_initial_arrays():
    spec = change(
        embed_dim=96,
        vocab_size=300,
        pattern=("random", "dark"),
        geometry_init=0.5,
    )
    network = Network.of(spec)
    params, projections = jax.jit(network.init)(jax.random.key(0))
    _, abstract_params, abstract_projections = build(spec)
    assert names_and_sizes(abstract_params) == names_and_sizes(params)
    assert names_and_sizes(abstract_projections) == names_and_sizes(projections)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}

    assert np.std(params["embedding"]) == pytest.approx(96**-0.5, rel=0.05)
    attention = params["blocks_0"]["attention"]
    assert np.std(attention["q"]["kernel"]) == pytest.approx(96**-0.5, rel=0.05)
    assert np.std(attention["out"]["kernel"]) == pytest.approx(32**-0.5, rel=0.05)
    assert np.std(params["blocks_0"]["mlp"]["down"]["kernel"]) == pytest.approx(40**-0.5, rel=0.05)
    first, second = attention["q"]["kernel"]
    assert not np.any(first == second)
    M = params["blocks_1"]["attention"]["mechanism"]["M"]
    np.testing.assert_array_equal(M, np.broadcast_to(np.float32(0.5) * np.eye(8, dtype=np.float32), (2, 2, 8, 8)))

    # The draw of epoch 0, each layer its own.
    jax.tree.map(np.testing.assert_array_equal, jax.jit(network.redraw)(projections, 0), projections)
    noise_keys = projections["blocks_0"]["attention"]["mechanism"]["noise_key"]
    assert len(np.unique(noise_keys, axis=0)) == 2


def test_names_of_arrays_and_dimensions():
    network = Network.of(SPEC)
    assert names_and_sizes(build()[2]) == {"blocks_1/attention/mechanism/projections": (2, 2, 12, 8)}
    geometry = network.map_params(lambda _, variable: is_geometry(variable))
    assert [path[-1].key for path, yes in jax.tree_util.tree_leaves_with_path(geometry) if yes] == ["M"]
    axes = network.map_params(lambda _, variable: logical_axes(variable))
    assert axes["embedding"] == ("vocab", "embed")
    assert axes["blocks_1"]["attention"]["mechanism"]["M"] == (None, "kv_heads", None, None)
    assert axes["blocks_0"]["attention"]["out"]["kernel"] == (None, "heads", None, "embed")


def test_names_of_the_arrays_that_pretrained_families_add():
    network, params, _ = build(GEMMA)
    names = names_and_sizes(params)
    for place, rows in ((0, 2), (1, 2), (2, 1)):
        block = f"blocks_{place}"
        assert names[f"{block}/attention/q/bias"] == (rows, 4, 8)
        assert names[f"{block}/attention/k/bias"] == names[f"{block}/attention/v/bias"] == (rows, 1, 8)
        assert names[f"{block}/post_attention_norm/scale"] == names[f"{block}/post_mlp_norm/scale"] == (rows, 24)
        assert f"{block}/attention/out/bias" not in names
    axes = network.map_params(lambda _, variable: logical_axes(variable))["blocks_0"]
    assert axes["attention"]["q"]["bias"] == (None, "heads", None)
    assert axes["attention"]["k"]["bias"] == (None, "kv_heads", None)
    assert axes["post_mlp_norm"]["scale"] == (None, "embed")
    initial, _ = jax.jit(Network.of(change(GEMMA, pattern=("softmax",), num_layers=1)).init)(jax.random.key(0))
    initial = {"final_norm": initial["final_norm"], "blocks_0": initial["blocks_0"]}
    zeros = [name for name, leaf in _named(initial).items() if not np.any(leaf)]
    assert sorted(zeros) == sorted(name for name in _named(initial) if name.endswith(("scale", "bias")))


def _named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_a_block_by_hand():
    # float64 numpy, one local layer with every option; the window of 6 is shorter than the input.
    spec = change(GEMMA, num_layers=1, pattern=("softmax_local",), logit_softcap=0.0)
    _, params, _ = build(spec)
    logits, _ = forward(spec, TOKENS, IDS, POSITIONS)
    names = {name: np.asarray(leaf, np.float64) for name, leaf in _named(params).items()}
    block = {name.removeprefix("blocks_0/"): leaf[0] for name, leaf in names.items() if name.startswith("blocks_0/")}

    def norm(x, weight):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * (1 + weight)

    def turn(x):
        angles = np.arange(LENGTH)[None, :, None, None] * 100.0 ** (-np.arange(4) / 4)
        z = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)
        return np.concatenate([z.real, z.imag], axis=-1)

    x = names["embedding"][TOKENS] * np.sqrt(24)
    normed = norm(x, block["attention_norm/scale"])
    q, k, v = (
        np.einsum("bnd,dhe->bnhe", normed, block[f"attention/{name}/kernel"]) + block[f"attention/{name}/bias"]
        for name in "qkv"
    )
    q, k = turn(norm(q, block["attention/q_norm/scale"])), turn(norm(k, block["attention/k_norm/scale"]))
    weights = np.exp(2 * np.tanh(0.5 * np.einsum("bnhe,bte->bhnt", q, k[:, :, 0]) / 2))
    weights *= np.tri(LENGTH) - np.tri(LENGTH, k=-6)
    mixed = np.einsum("bhnt,bte->bnhe", weights / weights.sum(-1, keepdims=True), v[:, :, 0])
    x = x + norm(np.einsum("bnhe,hed->bnd", mixed, block["attention/out/kernel"]), block["post_attention_norm/scale"])
    normed = norm(x, block["mlp_norm/scale"])
    gate, up = normed @ block["mlp/gate/kernel"], normed @ block["mlp/up/kernel"]
    gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    x = x + norm((gelu * up) @ block["mlp/down/kernel"], block["post_mlp_norm/scale"])
    wanted = norm(x, names["final_norm/scale"]) @ names["embedding"].T
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)


def test_parameters_may_be_stored_in_bfloat16():
    _, params, projections = build(GEMMA)
    stored = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), stored)
    narrow, wide = (_forward(GEMMA)(p, projections, TOKENS, IDS, POSITIONS)[0] for p in (stored, rounded))
    np.testing.assert_allclose(narrow, wide, rtol=1e-4, atol=1e-4)


def test_tied_and_untied_heads_and_softcap():
    hidden = random.standard_normal((2, 3, 24)).astype(np.float32)

    def logits(**fields):
        network, params, projections = build(change(**fields))
        return np.asarray(jax.jit(lambda p: network.bind(p, projections).logits(hidden))(params)), params

    plain, params = logits()
    np.testing.assert_allclose(plain, hidden @ params["embedding"].T, rtol=1e-4, atol=1e-5)
    capped, _ = logits(logit_softcap=2.0)
    np.testing.assert_allclose(capped, 2 * np.tanh(plain / 2), rtol=1e-4, atol=1e-5)
    untied, params = logits(tie_embeddings=False)
    np.testing.assert_allclose(untied, hidden @ params["head"].T, rtol=1e-4, atol=1e-5)
    assert not np.array_equal(params["head"], params["embedding"])


def test_scaled_embeddings():
    spec = change(num_layers=1, pattern=("constant",))
    _, params, projections = build(spec)

    def hidden(spec, params):
        return jax.jit(lambda p: Network.of(spec).bind(p, projections).hidden(*BATCH)[0])(params)

    larger = {**params, "embedding": params["embedding"] * np.float32(24**0.5)}
    scaled = hidden(dataclasses.replace(spec, scale_embeddings=True), params)
    np.testing.assert_allclose(scaled, hidden(spec, larger), rtol=1e-4, atol=1e-5)


@pytest.mark.standard_promotion  # jax.nn.dot_product_attention itself promotes bfloat16 with float32
def test_bfloat16_is_near_float32():
    spec = change(pattern=("softmax", "dark", "random", "lfk"))
    wide, _ = forward(spec, TOKENS, IDS, POSITIONS)
    _, params, projections = build(spec)
    narrow, _ = _forward(change(spec, dtype="bfloat16"))(params, projections, TOKENS, IDS, POSITIONS, None)
    assert narrow.dtype == jnp.float32
    difference = np.linalg.norm(narrow - wide) / np.linalg.norm(wide)
    assert 1e-4 < difference < 3e-2
