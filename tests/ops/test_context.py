"""A sequence, or a batch, that devices share: outputs, gradients, and what the devices tell each other."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from darkformer_jax import dark_attention
from darkformer_jax.aot.collectives import KINDS, collectives
from darkformer_jax.distributed.sharding import make_mesh
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS, stretches
from darkformer_jax.ops.context import check_stretch
from darkformer_jax.ops.dark_attention import init_state
from tests.ops.linear_attentions import DARK, OPS, draw, draw_cotangent
from tests.tiny_runs import on_eight_devices
from tests.tiny_specs import mixer_spec

# 13 tokens per device: neither 13 nor 104 is a multiple of the chunk.
FEATURES = {"length": 104, "chunk_size": 4}
HYBRID = {"length": 96, "chunk_size": 4, "window": 8, "num_sinks": 3}
FORMS = {op: FEATURES | {"op": op} for op in OPS} | {f"hybrid of {op}": HYBRID | {"op": op} for op in reversed(DARK)}
FORMS = {"hybrid with a horizon": HYBRID | {"op": "dark", "far_horizon": 20}} | FORMS
FORMS["all chunks at once"] = HYBRID | {"op": "dark", "backend": "parallel"}
ROWS = ("dark", "hybrid of dark")
LONG = 96 * 170


def packed(length):
    """Documents that begin and end anywhere, one through all devices and an odd end, and one with padding before it."""
    place = np.arange(length)
    ids = [np.searchsorted((5, 11, 70), place, side="right") + 1, 1 + (place > 50), 1 + 0 * place]
    ids = np.stack([ids[0] * (place < 91), ids[1], ids[2] * (place > 30) * (place < length - 1)])
    return jnp.asarray(ids, jnp.int32)


def draw_inputs(length, op="dark", window=0, **_):
    """q, k, v, the op's arrays, and a cotangent of the output."""
    x = draw(op, length, heads=(4, 2), dim=8, features=16, batch=3, gain=window > 0)
    return jax.tree.map(jnp.asarray, (*x, draw_cotangent(x)))


def attention(*, length, split, op="dark", segments=True, **options):
    """(q, k, v, arrays, ids) -> out, on one device, or the tokens (split="context") or rows ("data") over a mesh."""

    def attend(q, k, v, arrays, ids, sequence_axis=None):
        ids = ids if segments else None
        return OPS[op].attention(q, k, v, **arrays, segment_ids=ids, sequence_axis=sequence_axis, **options)

    if not split:
        return attend
    tokens = P(None, "context") if split == "context" else P("data")
    split_attend = functools.partial(attend, sequence_axis="context" if split == "context" else None)

    def on_shards(q, k, v, arrays, ids):
        of_arrays = {name: tokens if name == "log_decay" and x.ndim == 3 else P() for name, x in arrays.items()}
        in_specs = (tokens, tokens, tokens, of_arrays, tokens)
        split_over = jax.shard_map(split_attend, in_specs=in_specs, out_specs=tokens, axis_names={split})
        return split_over(q, k, v, arrays, ids)

    return on_shards


def compile_gradients(inputs, ids, **options):
    """The compiled function (q, k, v, arrays, cotangent), ids -> (out, gradients)."""
    function = attention(**options)

    def run(args, ids):
        out, pull = jax.vjp(lambda *learned: function(*learned, ids), *args[:-1])
        return out, pull(args[-1])

    return jax.jit(run).lower(inputs, ids).compile()


def error(got, expected):
    """The largest relative error of any of the arrays."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1)) for a, b in pairs)


def messages(text):
    """Bytes of each kind of collective in one run of a program, and how many of them loops repeat."""
    counts, unknown_loops = collectives(text, [0] * 8)
    assert not unknown_loops
    total = {}
    for message, times in counts.items():
        total[message.kind] = total.get(message.kind, 0) + times * message.num_bytes
    repeated = sum(text.count(f" {kind}(") + text.count(f" {kind}-start(") for kind in KINDS) < sum(counts.values())
    return total, int(repeated)


def compare():
    """What the test reads, of a program with eight devices."""
    result = {}
    with jax.set_mesh(make_mesh({"context": 8})):
        for name, options in FORMS.items():
            inputs, ids = draw_inputs(**options), packed(options["length"])
            one = compile_gradients(inputs, ids, split=None, **options)
            eight = compile_gradients(inputs, ids, split="context", **options)
            result[name] = error(eight(inputs, ids), one(inputs, ids))
        result["messages"] = messages(eight.as_text())  # of the hybrid, the last
        long_form = options | {"length": LONG}
        long = compile_gradients(draw_inputs(**long_form), packed(LONG), split="context", **long_form)
        result["long messages"] = messages(long.as_text())
        whole = jnp.ones_like(ids)
        undivided = jax.jit(attention(split="context", segments=False, **HYBRID))(*inputs[:-1], whole)
        result["one document"] = error(undivided, one(inputs, whole)[0])
    with jax.set_mesh(make_mesh({"data": 3}, jax.devices()[:3])):
        for name in ROWS:
            inputs, ids = draw_inputs(**FORMS[name]), packed(FORMS[name]["length"])
            one, three = (compile_gradients(inputs, ids, split=split, **FORMS[name]) for split in (None, "data"))
            result[f"rows, {name}"] = [error(three(inputs, ids), one(inputs, ids)), *messages(three.as_text())]
        result["messages of a layer"] = messages_of_a_layer()
    meshes = [make_mesh({"context": size}, jax.devices()[:size]) for size in (8, 1)]
    result["mechanisms"] = error(*map(mechanisms, meshes))
    result["layers"] = error(*map(layers, meshes))
    return result


def messages_of_a_layer():
    """`messages` of the gradients of a layer's arrays, M among them, where the mesh splits the rows of its batch."""
    q, k, v = (jax.device_put(x, P("data")) for x in draw_inputs(96)[:3])
    places = {"segment_ids": packed(96), "positions": jnp.broadcast_to(jnp.arange(96), (3, 96))}
    spec = mixer_spec("dark", num_features=16, projections="iid", chunk_size=4, head_dim=8)
    graphdef, arrays = nnx.split(MIXERS["dark"](spec, 0))

    def loss(arrays, q, k, v):
        return jnp.sum(nnx.merge(graphdef, arrays)(q, k, v, **places)[0] ** 2)

    return messages(jax.jit(jax.grad(loss)).lower(arrays, q, k, v).compile().as_text())


def mechanisms(mesh):
    """Outputs of those that look at nothing, that see a window and no more, and that see all with a gate."""
    q, k, v = draw_inputs(96)[:3]
    ids = packed(96)
    places = jnp.broadcast_to(jnp.arange(96), ids.shape)
    spec = mixer_spec("constant", num_features=16, projections="iid", chunk_size=4)
    hybrid = dataclasses.replace(spec, kind="window_only", window=8, num_sinks=3)
    gates = -jnp.abs(draw_inputs(96)[-1][:, :, :2, 0])
    kinds = {"constant": (spec, None), "window_only": (hybrid, None)}
    kinds |= {"softmax": (mixer_spec("softmax", decay="gate"), gates), "linear_transformer": (spec, -jnp.ones(2))}

    def run():
        made = [(MIXERS[kind](own_spec, 0), decay) for kind, (own_spec, decay) in kinds.items()]
        places_of = {"segment_ids": ids, "positions": places}
        return [mechanism(q, k, v, **places_of, log_decay=decay)[0] for mechanism, decay in made]

    with jax.set_mesh(mesh):
        return jax.device_get(jax.jit(run)())


def layers(mesh):
    """Outputs and gradients of layers with a gate, and a convolution that is wider than a device's stretch."""
    ids = packed(96)
    places = jnp.broadcast_to(jnp.arange(96), ids.shape)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 96, 24)), jnp.float32)

    def run(x, kind, **options):
        spec = mixer_spec(kind, embed_dim=24, decay="gate", conv_width=14, **options)
        layer = MIXERS[kind].build(spec, 0, rngs=nnx.Rngs(params=0))
        draws = np.random.default_rng(1)
        for part in (layer.forgetting.gate, layer.convolution.q, layer.convolution.k, layer.convolution.v):
            part.kernel[...] = jnp.asarray(0.3 * draws.standard_normal(part.kernel.shape), jnp.float32)
        return layer(x, ids, places)[0]

    features = {"num_features": 16, "chunk_size": 4, "projections": "orthogonal"}
    kinds = {"softmax": {}, "dark": features, "performer": features | {"window": 8, "num_sinks": 3}}
    with jax.set_mesh(mesh):
        both = [jax.value_and_grad(lambda x, kind=kind: jnp.sum(run(x, kind, **kinds[kind]) ** 2)) for kind in kinds]
        return jax.device_get(jax.jit(lambda x: [both_of(x) for both_of in both])(x))


def test_eight_stretches_are_one_sequence(tmp_path):
    code = "import json; from tests.ops.test_context import compare; print(json.dumps(compare()))"
    (tmp_path / "program.py").write_text(code)
    ended = on_eight_devices(tmp_path / "program.py", tmp_path).wait()
    assert ended.status == 0, ended.err
    result = json.loads(ended.out.splitlines()[-1])
    for name in (*FORMS, "one document", "mechanisms", "layers"):
        assert result[name] < 3e-6, (name, result)
    for name in ROWS:
        difference, _, in_loops = result[f"rows, {name}"]
        assert difference < 3e-6, (name, difference)
        assert in_loops == 0, name  # the gradient of M is summed over the devices once, not in every chunk
    total, in_loops = result["messages of a layer"]
    assert total["all-reduce"] and not in_loops
    short, in_loops = result["messages"]
    assert in_loops == 0
    assert result["long messages"] == [short, 0]  # of a sequence 170 times as long
    # The states (c, z, S) of eight devices forwards; the window's keys, values, segments and positions.
    assert short["all-gather"] >= 8 * 3 * 2 * 16 * (8 + 2) * 4
    assert short["collective-permute"] >= 2 * 3 * 8 * (2 * (8 + 8) + 1) * 4


def test_what_cannot_be_split_is_refused(monkeypatch):
    q, k, v, arrays, _ = draw_inputs(8)
    w = arrays["projections"]
    state = init_state(3, 2, 8, 8, 16, jnp.float32)
    for options in ({"causal": False}, {"state": state}, {"return_state": True}):
        with pytest.raises(UserError, match="sequence_axis needs causal=True, and neither takes nor returns a state"):
            dark_attention(q, k, v, projections=w, sequence_axis="context", **options)
    check_stretch(13, 4, 0)
    check_stretch(8, 4, 8)
    for length, window in ((13, 4), (8, 12)):
        message = f"each device has {length} tokens of a sequence: .* multiple of chunk_size = 4 .* window = {window}"
        with pytest.raises(UserError, match=message):
            check_stretch(length, 4, window)

    monkeypatch.setattr(stretches, "context_size", lambda: 8)
    with pytest.raises(UserError, match="mesh.context = 8 splits whole .* a multiple of 8; decoding .* context = 1"):
        stretches.on_stretches(dark_attention, q, k, v, state=state, projections=w)
    with pytest.raises(UserError, match="mesh.context = 8 splits whole .* a multiple of 8; these have 7 tokens"):
        stretches.on_stretches(dark_attention, q[:, :7], k[:, :7], v[:, :7], projections=w)
