"""Products with matrices that the devices share: in two stages, and the same as on one device."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from darkformer_jax.aot.collectives import collectives
from darkformer_jax.distributed.gather import stages, with_gathered
from darkformer_jax.distributed.sharding import make_mesh, sharding_of
from darkformer_jax.mixers.layers import Linear
from tests.tiny_runs import on_eight_devices

MESHES = {
    "all devices in two stages": {"fsdp": 8},
    "rows on two axes": {"data": 2, "fsdp": 4},
    "rows and places": {"fsdp": 4, "context": 2},
    "places alone": {"data": 2, "tensor": 2, "context": 2},
    "one stage each": {"fsdp": 2, "tensor": 2, "context": 2},
    "rows that are not divided": {"data": 4, "fsdp": 2},
}
# Shape, axes and inputs of a kernel: into an MLP, and out of heads.
KERNELS = [((16, 24), ("embed", "mlp"), 1), ((4, 6, 16), ("heads", None, "embed"), 2)]


def draw(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def results(mesh, rows):
    """Of each kernel: the output, the gradients of x and of the kernel, and the bytes of each kind of message."""
    found = []
    for shape, axes, num_inputs in KERNELS:
        layer = Linear(shape, axes, num_inputs=num_inputs, rngs=nnx.Rngs(0), dtype=jnp.float32)
        graphdef, params = nnx.split(layer)
        params["kernel"] = params["kernel"].replace(draw(*shape))

        def loss(params, x, graphdef=graphdef):
            y = nnx.merge(graphdef, params)(x)
            return jnp.sum(jnp.sin(y)), y

        x = draw(rows, 6, *shape[:num_inputs])
        if mesh is not None:
            params = jax.device_put(params, sharding_of("kernel", axes, shape, mesh))
            x = (
                jax.device_put(x, sharding_of("x", ("batch", "sequence", *[None] * num_inputs), x.shape, mesh))
                if rows == 8
                else x
            )
        run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)).lower(params, x).compile()
        (of_params, of_x), y = run(params, x)
        sent: dict[str, int] = {}
        if mesh is not None:
            for message, times in collectives(run.as_text(), [0] * 8)[0].items():
                sent[message.kind] = sent.get(message.kind, 0) + times * message.num_bytes
        found.append([*(np.asarray(leaf).tolist() for leaf in (y, of_x, of_params["kernel"][...])), sent])
    return found


def compare():
    """`results` on each mesh, and what is kept."""
    return {"kept": kept_for_the_backward_pass(), "bfloat16": error_in_bfloat16()} | {
        name: results_on(make_mesh({"data": 1} | sizes), 6 if name == "rows that are not divided" else 8)
        for name, sizes in MESHES.items()
    }


def results_on(mesh, rows):
    with jax.set_mesh(mesh):
        return results(mesh, rows)


def error_in_bfloat16():
    """The largest relative error of the gradients, each as a whole."""
    layer = Linear((16, 24), ("embed", "mlp"), rngs=nnx.Rngs(0), dtype="bfloat16")  # as a config names it
    graphdef, params = nnx.split(layer)
    loss = lambda params, x: jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x).astype(jnp.float32)))
    gradients = lambda: jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(params, draw(8, 6, 16)))
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 4})):
        split = gradients()
    norm = lambda x: np.linalg.norm(np.asarray(x))
    return max(
        float(norm(a - np.asarray(b)) / norm(b)) for a, b in zip(map(np.asarray, split), gradients(), strict=True)
    )


def kept_for_the_backward_pass():
    """The shapes, on eight devices together, of what a product keeps."""
    with jax.set_mesh(make_mesh({"data": 1, "fsdp": 8})):
        x, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 6, 16), (16, 24)))
        product = lambda x, kernel: with_gathered(jnp.matmul, x, kernel, ("embed", "mlp"), sums_in=jnp.float32)
        pull = jax.eval_shape(lambda x, kernel: jax.vjp(product, x, kernel)[1], x, kernel)
        return sorted(leaf.shape for leaf in jax.tree.leaves(pull))


def test_a_matrix_in_parts_gives_the_products_and_gradients_of_the_whole(tmp_path):
    code = "import json; from tests.distributed.test_gather import compare; print(json.dumps(compare()))"
    (tmp_path / "program.py").write_text(code)
    command = on_eight_devices(tmp_path / "program.py", tmp_path)
    whole = {rows: results(None, rows) for rows in (6, 8)}
    ended = command.wait()
    assert ended.status == 0, ended.err
    on_meshes = json.loads(ended.out.splitlines()[-1])
    assert on_meshes.pop("kept") == [[8, 6, 16], [16, 24]]  # the kernel in parts: whole ones would fill the devices
    assert on_meshes.pop("bfloat16") < 0.02  # XLA's CPU backend aborts on sums over devices in bfloat16
    assert list(on_meshes) == list(MESHES)
    for name, kernels in on_meshes.items():
        rows = len(kernels[0][0])
        for got, wanted in zip(kernels, whole[rows], strict=True):
            for ours, reference in zip(got[:3], wanted[:3], strict=True):
                np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5, err_msg=name)
    for *_, sent in on_meshes["all devices in two stages"] + on_meshes["rows and places"]:
        assert sent.pop("all-reduce") < 16 * 24  # of the loss; one of a matrix would send twice as much
        assert set(sent) == {"all-gather", "reduce-scatter"}


@pytest.mark.parametrize(
    ("ways", "expected"),
    [
        (2, [None]),
        (4, [[[0, 1], [2, 3]], [[0, 2], [1, 3]]]),
        (6, [[[0, 1], [2, 3], [4, 5]], [[0, 2, 4], [1, 3, 5]]]),
    ],
)
def test_stages_gather_neighbours_first(ways, expected):
    assert stages(ways) == expected
