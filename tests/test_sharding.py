import json

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from darkformer_jax.errors import UserError
from darkformer_jax.sharding import MESH_AXES, constrain, make_mesh, spec_of
from tests.tiny_runs import on_eight_devices


class Sizes:
    """As much of a mesh as `spec_of` looks at."""

    def __init__(self, data, fsdp, tensor):
        self.shape = dict(zip(MESH_AXES, (data, fsdp, tensor), strict=True))


def test_dimensions_go_to_their_mesh_axes():
    mesh = Sizes(2, 2, 2)
    assert spec_of("x", ("batch", None), (8, 5), mesh) == P(("data", "fsdp"), None)
    assert spec_of("w", (None, "embed", "mlp"), (3, 4, 6), mesh) == P(None, ("fsdp",), ("tensor",))
    assert spec_of("w", (None, "embed", "mlp"), (3, 5, 6), Sizes(8, 1, 1)) == P(None, None, None)
    assert spec_of("e", ("vocab", "embed"), (6, 3), Sizes(1, 1, 2)) == P(("tensor",), None)


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        (("batch",), (6,), r"thing: dimension 'batch' of size 6 is not divisible by 4 = mesh axes \('data', 'fsdp'\)"),
        (
            ("embed", "kv_heads"),
            (4, 3),
            r"dimension 'kv_heads' of size 3 is not divisible by 2 = mesh axes \('tensor',\)",
        ),
        (("heads", "mlp"), (4, 4), r"thing: two of its dimensions \('heads', 'mlp'\) are split over mesh axes"),
        (("batch", "embed"), (4, 4), r"thing: two of its dimensions \('batch', 'embed'\) are split"),
        (("embed",), (4, 4), r"thing has shape \(4, 4\) and axes \('embed',\): their lengths differ"),
    ],
)
def test_what_cannot_be_split_is_refused(axes, shape, message):
    with pytest.raises(UserError, match=message):
        spec_of("thing", axes, shape, Sizes(2, 2, 2))


def test_mesh_sizes():
    devices = jax.devices()[:1] * 8
    for sizes, shape in (((-1, 2, 2), (2, 2, 2)), ((8, 1, 1), (8, 1, 1)), ((1, -1, 4), (1, 2, 4))):
        named = dict(zip(MESH_AXES, sizes, strict=True))
        mesh = make_mesh(named, devices)
        assert tuple(mesh.shape.values()) == shape


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), "does not fit the 8 devices"),
        ((-1, 3, 1), "does not fit the 8 devices"),
        ((-1, -1, 1), "at most one may be -1"),
        ((0, 8, 1), "sizes must be at least 1"),
        ((-2, 4, 1), "sizes must be at least 1"),
    ],
)
def test_bad_mesh_sizes_are_named(sizes, message):
    named = dict(zip(MESH_AXES, sizes, strict=True))
    with pytest.raises(UserError, match=message) as error:
        make_mesh(named, jax.devices()[:1] * 8)
    assert str(named) in str(error.value)


def test_constrain_is_nothing_without_a_mesh():
    x = np.ones((3, 2))
    assert constrain(x, "batch", None) is x


PROGRAM = """
import dataclasses, json
import jax, jax.numpy as jnp, numpy as np
from darkformer_jax.attention.spec import AttentionSpec
from darkformer_jax.model import ModelSpec, Network, logical_axes
from darkformer_jax.sharding import make_mesh, sharding_of

attention = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, num_features=16, projections="orthogonal",
    geometry_init=0.9, chunk_size=8, window=8, num_sinks=2, seed=0)
network = Network.of(ModelSpec(vocab_size=40, num_layers=2, embed_dim=32, mlp_dim=48, activation="silu", norm_eps=1e-6,
    rope_theta=1e4, qk_norm=True, tie_embeddings=True, scale_embeddings=False, logit_softcap=0.0, dtype="float32",
    remat="none", pattern=("softmax", "dark"), attention=attention))
random = np.random.default_rng(0)
tokens = random.integers(0, 40, (8, 33)).astype(np.int32)
ids = np.where(np.arange(32) < 20, 1, 2)[None].repeat(8, 0).astype(np.int32)
positions = np.where(np.arange(32) < 20, np.arange(32), np.arange(32) - 20)[None].repeat(8, 0).astype(np.int32)
arrays = network.init(jax.random.key(0))

def run(params, projections, tokens, ids, positions):
    def loss(params):
        logits, _ = network.bind(params, projections)(tokens[:, :-1], ids, positions)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1))
    return jax.value_and_grad(loss)(params)

results = {}
for name, sizes in {"one": (1, 1, 1), "data": (8, 1, 1), "fsdp": (1, 8, 1), "all": (2, 2, 2)}.items():
    count = int(np.prod(sizes))
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes)), jax.devices()[:count])
    place = lambda path, variable: sharding_of("/".join(path), logical_axes(variable), variable.shape, mesh)
    shardings = (network.map_params(place), network.map_projections(place))
    batch = [sharding_of("batch", ("batch", None), x.shape, mesh) for x in (tokens, ids, positions)]
    with jax.set_mesh(mesh):
        placed = jax.device_put((*arrays, tokens, ids, positions), (*shardings, *batch))
        loss, gradients = jax.jit(run, out_shardings=(None, shardings[0]))(*placed)
    if name == "one":
        reference = jax.device_get(gradients)
    errors = jax.tree.map(
        lambda a, b: float(np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b)), jax.device_get(gradients), reference)
    q, table = placed[0]["blocks_1"]["attention"]["q"]["kernel"], placed[0]["embedding"]
    M, w = (tree["blocks_1"]["attention"]["mechanism"] for tree in placed[:2])
    results[name] = {
        "loss": float(loss),
        "error": max(jax.tree.leaves(errors)),
        "shards": [list(x.addressable_shards[0].data.shape) for x in (q, table, M["M"], w["projections"])],
        "gradient_shard": list(gradients["embedding"].addressable_shards[0].data.shape),
        "devices": len(q.sharding.device_set),
    }
print(json.dumps(results))
"""


def test_eight_devices_compute_what_one_does(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    ended = on_eight_devices(tmp_path / "program.py", tmp_path).wait()
    assert ended.status == 0, ended.err
    results = json.loads(ended.out.splitlines()[-1])
    one = results["one"]
    for name in ("data", "fsdp", "all"):
        assert results[name]["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert results[name]["error"] < 1e-5
        assert results[name]["devices"] == 8
    # q [layers, embed, heads, size], the table [vocab, embed], M [layers, kv heads, r, d], w [layers, kv heads, m, r]
    whole = [[1, 32, 4, 8], [40, 32], [1, 2, 8, 8], [1, 2, 16, 8]]
    assert one["shards"] == results["data"]["shards"] == whole
    assert results["fsdp"]["shards"] == [[1, 4, 4, 8], [40, 4], *whole[2:]]
    assert results["all"]["shards"] == [[1, 16, 2, 8], [20, 16], [1, 1, 8, 8], [1, 1, 16, 8]]
    assert results["all"]["gradient_shard"] == [20, 16]
