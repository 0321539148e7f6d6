import json
import math

import jax
import numpy as np
import pytest

from darkformer_jax.errors import UserError
from darkformer_jax.training.setup import Experiment
from darkformer_jax.training.step import make_train_step
from tests.tiny_runs import fresh_state, on_eight_devices, random_batch, tiny_config

MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "all": (2, 2, 2)}
STEPS = 5


def mesh_config(mesh=(1, 1, 1)):
    sizes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh, strict=True))
    # 264: the vocabulary is split over `tensor`, the width over `fsdp`.
    return tiny_config(batch_size=8, eval__batch_size=8, model__vocab_size=264, optimizer__learning_rate=1e-2, **sizes)


def losses(config):
    """Of a few steps on one batch a step, the whole state and the batches laid out as the config says."""
    experiment = Experiment.of(config, 257)
    step = jax.jit(
        make_train_step(
            experiment.network,
            experiment.optimizer,
            experiment.schedule,
            accumulation_steps=1,
            z_loss=1e-4,
            redraw_every=3,
        ),
        out_shardings=(experiment.shardings, None),
    )
    with jax.set_mesh(experiment.mesh):
        state = jax.device_put(fresh_state(experiment), experiment.shardings)
        split = sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(state))
        result = []
        for _ in range(STEPS):
            batch = jax.device_put(random_batch(0, rows=8), experiment.batch_sharding)
            state, metrics = step(state, batch)
            result.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return {"losses": result, "split": split, "devices": len(jax.devices())}


def test_one_device_equals_eight(tmp_path):
    code = "import json; from tests.training.test_setup import *\n"
    code += "print(json.dumps({name: losses(mesh_config(mesh)) for name, mesh in MESHES.items()}))"
    (tmp_path / "program.py").write_text(code)
    ended = on_eight_devices(tmp_path / "program.py", tmp_path).wait()
    assert ended.status == 0, ended.err
    on_eight = json.loads(ended.out.splitlines()[-1])
    on_one = losses(mesh_config())
    assert on_one["losses"][0][0] - on_one["losses"][-1][0] > 0.05  # it learns, so a wrong gradient shows
    for name, measured in on_eight.items():
        assert measured["devices"] == 8
        assert (measured["split"] > 0) == (name != "data")
        np.testing.assert_allclose(measured["losses"], on_one["losses"], rtol=1e-5, err_msg=name)


def test_sizes_are_those_of_the_arrays():
    config = tiny_config(model__num_layers=2, model__attention__pattern="softmax,dark")
    experiment = Experiment.of(config, 257)
    block = 4 * 32 * 16 + 3 * 32 * 32 + 2 * 32
    assert experiment.num_params == 257 * 32 + 2 * block + 2 * 8 * 8 + 32
    adam = 2 * experiment.num_params * 4
    counts = 4 * 4  # the step, Adam's and two schedules'
    assert experiment.state_bytes == experiment.num_params * 4 + adam + 2 * 8 * 8 * 4 + counts
    assert experiment.tokens_per_step == 128
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(experiment.abstract))
    described = experiment.describe()
    assert f"{experiment.num_params:,}" in described and "tokens a step  128 = 4 x 32" in described
    assert f"state          {experiment.state_bytes / 2**20:,.1f} MiB" in described
    assert math.isfinite(experiment.step_flops) and experiment.step_flops > 6 * 257 * 32 * 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh__data": 3}, "mesh .*'data': 3.* does not fit the 1 devices there are"),
        ({"mesh__data": 0}, "mesh .*'data': 0.*: sizes must be at least 1"),
        ({"mesh__fsdp": -1}, "mesh .*: sizes must be at least 1, and at most one may be -1"),
        ({"model__vocab_size": 100}, "model.vocab_size = 100 is smaller than the tokenizer's 257"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Experiment.of(tiny_config(**changes), 257)
