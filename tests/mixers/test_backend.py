"""`model.attention.backend`: where the TPU kernel may be chosen, and the kernel on a mesh of simulated TPUs."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.aot.topology import topology_devices
from darkformer_jax.errors import UserError
from darkformer_jax.mixers.stretches import on_shards
from darkformer_jax.ops.dark_attention import dark_attention
from darkformer_jax.training.experiment import Experiment
from tests.ops.linear_attentions import documents, draw, draw_cotangent
from tests.tiny_runs import experiment_of, on_eight_devices, random_batch, tiny_config

SIZES = {"model__num_heads": 4, "model__num_kv_heads": 2, "model__vocab_size": 264}
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


FORMS = {"features": {"chunk_size": 16}, "hybrid": {"chunk_size": 8, "window": 8, "num_sinks": 2, "far_horizon": 12}}


def results(form, backend):
    """Output and gradients of four rows with documents of their own, and four query and two key/value heads."""
    x = draw("dark", 24, heads=(4, 2), batch=4, gain=form == "hybrid")
    ids = np.concatenate([documents(length, 24 - length) for length in (7, 16, 20, 23)])
    attend = functools.partial(dark_attention, **FORMS[form], backend=backend)

    def run(x):
        return on_shards(attend, *x[:3], **x.arrays, segment_ids=jnp.asarray(ids))

    @jax.jit
    def run_with_gradients(x, cotangent):
        out, pull = jax.vjp(run, x)
        return out, pull(cotangent)

    return [np.asarray(leaf) for leaf in jax.tree.leaves(run_with_gradients(x, draw_cotangent(x)))]


@pytest.mark.parametrize("form", FORMS)
def test_the_kernel_on_eight_devices_gives_what_the_scan_gives_on_one(form, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import jax, numpy as np\n"
        "from darkformer_jax.distributed.sharding import make_mesh\n"
        "from tests.mixers.test_backend import MESH, results\n"
        "with jax.set_mesh(make_mesh(MESH)):\n"
        f"    np.savez({str(tmp_path / 'split.npz')!r}, *results({form!r}, 'pallas_interpret'))\n"
    )
    command = on_eight_devices(program, tmp_path)
    whole = results(form, "scan")
    ended = command.wait()
    assert ended.status == 0, ended.err
    with np.load(tmp_path / "split.npz") as split:
        assert len(split.files) == len(whole) == (7 if form == "hybrid" else 6)
        for name, expected in zip(split.files, whole, strict=True):
            np.testing.assert_allclose(split[name], expected, rtol=1e-4, atol=5e-5)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("form", FORMS)
def test_all_chunks_at_once_train_as_the_scan_does(form):
    def step(backend):
        fields = {f"model__attention__{name}": value for name, value in (FORMS[form] | {"backend": backend}).items()}
        experiment = experiment_of(tiny_config(**fields, model__num_kv_heads=1))
        batch = jax.device_put(random_batch(0), experiment.batch_sharding)
        with jax.set_mesh(experiment.mesh):
            state, metrics = experiment.train_step()(experiment.initial_state(), batch)
        return state.params, metrics["grad_norm"]

    for got, want in zip(jax.tree.leaves(step("parallel")), jax.tree.leaves(step("scan")), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_cpu_lacks_the_kernel():
    message = "model.attention.backend = 'pallas' on a cpu: the kernel is for TPUs; allowed: 'auto', 'scan', 'parallel'"
    with pytest.raises(UserError, match=re.escape(message)):
        experiment_of(tiny_config(model__attention__backend="pallas"))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"mesh__data": 1, "mesh__context": 4}, "'pallas' with mesh.context = 4; allowed: 1, or backend = 'scan'"),
        ({"mesh__data": 1, "mesh__tensor": 4}, "mesh.tensor = 4: it splits 2 key/value heads with features; allowed"),
    ],
)
def test_a_mesh_on_which_the_kernel_cannot_run_is_named(mesh, message):
    config = tiny_config(model__attention__backend="pallas", **SIZES, **mesh)
    objective = experiment_of(tiny_config()).objective
    with pytest.raises(UserError, match=re.escape(message)):
        Experiment.of(config, objective, topology_devices("v5e:2x2"))
