import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.data.tokenizers import BytesTokenizer
from darkformer_jax.errors import UserError
from darkformer_jax.model.sampling import Sampler
from darkformer_jax.runs.load import load_language_model, load_model
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.classification import Classes
from darkformer_jax.training.experiment import Experiment
from tests.tasks.labelled_files import labelled_config
from tests.tiny_runs import experiment_of, fresh_state, tiny_config, write_workdir

pytestmark = pytest.mark.standard_promotion  # the state of a checkpoint is made with its optimizer


@pytest.fixture(scope="module")
def experiment():
    return experiment_of(tiny_config())


def random_state(experiment, dtype):
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), experiment.abstract)
    return state._replace(params=jax.tree.map(lambda leaf: leaf.astype(dtype), state.params))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_parameters_keep_the_dtype_and_the_bits_they_are_stored_with(experiment, dtype, tmp_path):
    state = write_workdir(tmp_path, experiment.config, random_state(experiment, dtype))
    for step in (None, 3):
        model = load_model(Workdir(tmp_path), step)
        assert model.step == 3
        for loaded, saved in zip(jax.tree.leaves(model.params), jax.tree.leaves(state.params), strict=True):
            assert loaded.dtype == saved.dtype == dtype
            np.testing.assert_array_equal(loaded, saved)
        jax.tree.map(np.testing.assert_array_equal, model.projections, state.projections)


def test_the_backend_of_a_run_is_not_that_of_who_uses_its_model(experiment, tmp_path):
    config = experiment.config.copy_and_resolve_references()
    config.model.attention.backend = "pallas"
    write_workdir(tmp_path, config, random_state(experiment, jnp.float32))
    model = load_model(Workdir(tmp_path))
    assert model.config.model.attention.backend == "auto" == model.network.spec.pattern[0].backend


@pytest.mark.parametrize("kind", ["dark", "random"])
def test_a_workdir_and_its_seed_mean_the_same_where_jax_draws_with_another_generator(kind, tmp_path):
    config = tiny_config(model__attention__kind=kind)

    def read():
        model = load_model(Workdir(tmp_path))
        redrawn = model.network.redraw(model.projections, jnp.int32(3))
        sampler = Sampler(model.network, model.params, model.projections, temperature=2.0)
        return fresh_state(experiment_of(config)), redrawn, list(sampler.stream([[1, 2, 3]], 4))

    write_workdir(tmp_path, config)
    here = jax.device_get(read())
    with jax.default_prng_impl("rbg"):
        jax.tree.map(np.testing.assert_array_equal, read(), here)


def test_a_step_that_is_absent_or_damaged_is_named(experiment, tmp_path):
    write_workdir(tmp_path, experiment.config, random_state(experiment, "bfloat16"))
    with pytest.raises(UserError, match="no checkpoint step 5 in .*; there are: 3"):
        load_model(Workdir(tmp_path), 5)
    (tmp_path / "checkpoints" / "3" / "_METADATA").unlink()
    for step in (None, 3):
        with pytest.raises(UserError, match="damaged: step 3: file _METADATA is missing"):
            load_model(Workdir(tmp_path), step)


@pytest.mark.parametrize("name", ["extra", "extra.a", "model.extra", "model.attention.extra"])
def test_a_config_with_a_field_that_is_not_known_is_refused(tmp_path, name):
    Workdir(tmp_path).write_config(tiny_config().to_dict())
    config = json.loads((tmp_path / "config.json").read_text())
    *sections, field = name.split(".")
    section = config
    for part in sections:
        section = section.setdefault(part, {})
    section[field] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    BytesTokenizer().save(str(tmp_path))
    message = f"{tmp_path}/config.json is not the config of a run of this version: {name} is no field"
    with pytest.raises(UserError, match=message):
        load_model(Workdir(tmp_path))


def test_a_checkpoint_says_how_many_outputs_its_model_has(tmp_path):
    config = labelled_config("mails.jsonl")
    of_three = Experiment.of(config, Classes(257, 32, ("a", "b", "c")))
    write_workdir(tmp_path, config, fresh_state(of_three))
    model = load_model(Workdir(tmp_path))
    assert model.network.spec.num_outputs == 3 and model.params["classifier"]["kernel"].shape == (32, 3)


@pytest.mark.parametrize("task", ["classification", "another"])
def test_a_model_of_another_task_is_refused_as_a_language_model_before_its_checkpoint_is_read(task, tmp_path):
    config = labelled_config("mails.jsonl", task__name=task)
    Workdir(tmp_path).write_config(config.to_dict())
    with pytest.raises(UserError, match=f"a model with task.name = '{task}' predicts no next token"):
        load_language_model(Workdir(tmp_path))


def test_integers_are_no_parameters(experiment, tmp_path):
    write_workdir(tmp_path, experiment.config, random_state(experiment, "int8"))
    with pytest.raises(UserError, match=r"params/blocks_0/.*: int8\[.*\] saved, float32\[.*\] expected"):
        load_model(Workdir(tmp_path))
