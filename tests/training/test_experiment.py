import json
import math
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from darkformer_jax.distributed.sharding import MESH_AXES
from darkformer_jax.errors import UserError
from darkformer_jax.training.step import make_train_step
from tests.tiny_runs import experiment_of, on_eight_devices, random_batch, tiny_config

STEPS = 20

# 264: the vocabulary is split over `tensor`, the width over `fsdp`.
COMMON = {"batch_size": 8, "eval__batch_size": 8, "model__vocab_size": 264, "optimizer__learning_rate": 3e-3}
MODELS = {
    "pure": {"model__num_layers": 2, "model__attention__pattern": "softmax,dark"},
    # One key/value head, which `tensor` cannot split: it splits the features.
    "hybrid": {
        "model__num_kv_heads": 1,
        "model__attention__chunk_size": 4,
        "model__attention__window": 4,
        "model__attention__num_sinks": 3,
        "model__attention__far_gain": True,
        "model__attention__redraw_every": 3,
    },
}
# data, fsdp, tensor, context. Each mesh with the model that asks most of it; `python -m tests.training.test_experiment`
# compares each mesh with each model.
MESHES = {
    "pure": [(8, 1, 1, 1), (1, 8, 1, 1)],
    "hybrid": [(2, 2, 2, 1), (1, 2, 2, 2), (1, 1, 1, 8)],
}


def mesh_config(model, mesh=(1, 1, 1, 1)):
    sizes = {f"mesh__{name}": size for name, size in zip(MESH_AXES, mesh, strict=True)}
    return tiny_config(**COMMON, **MODELS[model], **sizes)


def first_state(experiment):
    """What a run starts with; of the pure model, drawn by numpy, which compiles nothing."""
    if experiment.config.model.attention.window:
        state = experiment.initial_state()
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(experiment.shardings), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        return state
    random = np.random.default_rng(0)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), experiment.abstract)
    params, projections = jax.tree.map(
        lambda leaf: (0.3 * random.normal(size=leaf.shape)).astype(leaf.dtype), (zeros.params, zeros.projections)
    )
    return zeros._replace(params=params, projections=projections)


def losses(experiment, state):
    """Loss and gradient norm of a few steps, the whole state and the batches laid out as the config says."""
    step = jax.jit(
        make_train_step(
            experiment.network,
            experiment.objective,
            experiment.optimizer,
            experiment.schedule,
            accumulation_steps=1,
            redraw_every=experiment.config.model.attention.redraw_every,
            trained=experiment.trained,
        ),
        out_shardings=(experiment.shardings, None),
    )
    with jax.set_mesh(experiment.mesh):
        state = jax.device_put(state, experiment.shardings)
        result = []
        for number in range(STEPS):
            batch = jax.device_put(random_batch(number % 2, rows=8), experiment.batch_sharding)
            state, metrics = step(state, batch)
            result.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return result


def on_eight(meshes):
    """{"model mesh": losses} in a program with eight devices; each model is made where its first mesh wants it."""
    result = {}
    for model, shapes in meshes.items():
        state = None
        for mesh in shapes:
            experiment = experiment_of(mesh_config(model, mesh))
            assert experiment.mesh.devices.size == 8
            if state is None:
                state = first_state(experiment)
            split = sum(not sharding.is_fully_replicated for sharding in jax.tree.leaves(experiment.shardings))
            assert (split > 0) == (mesh[1] * mesh[2] * mesh[3] > 1)
            result[f"{model} {mesh}"] = losses(experiment, state)
    return result


def on_one(model):
    experiment = experiment_of(mesh_config(model))
    return losses(experiment, first_state(experiment))


def compare(tmp_path, meshes):
    """{"model mesh": the largest relative differences from one device in loss and gradient norm}."""
    code = f"import json; from tests.training.test_experiment import on_eight; print(json.dumps(on_eight({meshes})))"
    (tmp_path / "program.py").write_text(code)
    command = on_eight_devices(tmp_path / "program.py", tmp_path)
    one = {model: np.array(on_one(model)) for model in meshes}
    ended = command.wait()
    assert ended.status == 0, ended.err
    result = {}
    for name, measured in json.loads(ended.out.splitlines()[-1]).items():
        expected = one[name.split()[0]]
        assert expected[0, 0] - expected[-1, 0] > 0.05  # so a wrong gradient shows
        result[name] = np.max(np.abs(np.array(measured) / expected - 1), axis=0)
    return result


def test_eight_devices_train_as_one_does(tmp_path):
    for name, (loss, gradient) in compare(tmp_path, MESHES).items():
        assert loss < 1e-5 and gradient < 1e-5, (name, loss, gradient)


def test_layers_of_a_pattern_as_long_as_the_network_are_computed_again_on_a_cpu():
    def run(remat):
        fields = {"model__attention__pattern": "dark,softmax,dark", "model__num_layers": 3, "sequence_length": 256}
        experiment = experiment_of(tiny_config(**fields, model__remat=remat))
        state = experiment.initial_state()
        batch = jax.device_put(random_batch(0, rows=4, length=256), experiment.batch_sharding)
        with jax.set_mesh(experiment.mesh):
            compiled = experiment.train_step().lower(state, batch).compile()
            state, metrics = compiled(state, batch)
        return state.params, float(metrics["loss"]), compiled.memory_analysis().temp_size_in_bytes

    params, loss, temporary = run("none")
    for remat in ("dots", "full"):
        others, other_loss, other_temporary = run(remat)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.linalg.norm(b)), others, params)
        assert other_temporary < 0.9 * temporary, (remat, other_temporary, temporary)


def test_sizes_are_those_of_the_arrays():
    config = tiny_config(model__num_layers=2, model__attention__pattern="softmax,dark")
    experiment = experiment_of(config)
    block = 4 * 32 * 16 + 3 * 32 * 32 + 2 * 32
    assert experiment.num_params == 257 * 32 + 2 * block + 2 * 8 * 8 + 32
    adam = 2 * experiment.num_params * 4
    counts = 4 * 4  # the step, Adam's and two schedules'
    assert experiment.state_bytes == experiment.num_params * 4 + adam + 2 * 8 * 8 * 4 + counts
    assert experiment.tokens_per_step == 128
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(experiment.abstract))
    described = experiment.describe()
    assert f"{experiment.num_params:,}" in described and "tokens/step    128 = 4 x 32" in described
    assert f"state          {experiment.state_bytes / 2**20:,.1f} MiB" in described
    assert math.isfinite(experiment.step_flops) and experiment.step_flops > 6 * 257 * 32 * 128


@pytest.mark.parametrize(
    ("attention", "shown"),
    [
        ({"kind": "dark"}, "4 x dark"),
        ({"kind": "dark", "exact_kv_heads": 1}, "4 x dark(exact_kv_heads=1)"),
        (
            {"pattern": "dark(exact_kv_heads=1),softmax,dark(m=16),dark(m=16)"},
            "4, in turn dark(exact_kv_heads=1), softmax, 2 x dark(num_features=16)",
        ),
    ],
)
def test_a_description_says_which_layers_have_exact_heads_and_other_options(attention, shown):
    changes = {f"model__attention__{name}": value for name, value in attention.items()}
    described = experiment_of(tiny_config(model__num_layers=4, **changes)).describe()
    assert f"layers         {shown}\n" in described


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh__data": 3}, "mesh .*'data': 3.* does not fit the 1 devices there are.*JAX_NUM_CPU_DEVICES=3 before"),
        ({"mesh__data": 0}, "mesh .*'data': 0.*: sizes must be at least 1"),
        ({"mesh__fsdp": -1}, "mesh .*: sizes must be at least 1, and at most one may be -1"),
        ({"mesh__context": 2}, "mesh .*'context': 2.* does not fit the 1 devices there are"),
        ({"model__vocab_size": 100}, "model.vocab_size = 100 is smaller than the tokenizer's 257"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        experiment_of(tiny_config(**changes))


if __name__ == "__main__":  # every mesh with every model
    EVERY = sorted({mesh for meshes in MESHES.values() for mesh in meshes})
    with tempfile.TemporaryDirectory() as directory:
        for row in compare(Path(directory), dict.fromkeys(MODELS, EVERY)).items():
            print(*row)
