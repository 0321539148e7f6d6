"""What every task promises the loop, asked of each in the table."""

import io
import json

import jax
import numpy as np
import pytest
import tqdm

from darkformer_jax.config import base
from darkformer_jax.data import PREPARED_SOURCE
from darkformer_jax.data.conversations import CHAT_SOURCE
from darkformer_jax.data.sources import CORPUS_SOURCES
from darkformer_jax.distributed.sharding import Part
from darkformer_jax.errors import UserError
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks import TASKS, task_of
from darkformer_jax.tasks.measured import measure_all
from darkformer_jax.training.experiment import Experiment
from tests.tasks.labelled_files import labelled_config, write_labelled
from tests.tiny_runs import tiny_config, write_text

CONFIGS = {
    "language_model": lambda directory: tiny_config(data__files=write_text(directory / "text.txt")),
    "classification": lambda directory: labelled_config(write_labelled(directory / "mails.jsonl")),
    "regression": lambda directory: labelled_config(
        write_labelled(directory / "mails.jsonl", (0, 1.5)), task__name="regression"
    ),
}


@pytest.fixture(params=TASKS)
def case(request, tmp_path):
    """A config and its task, loaded."""
    config = CONFIGS[request.param](tmp_path)
    return config, TASKS[request.param].load(config, Workdir(tmp_path / "run"))


def test_the_config_allows_the_tasks_that_there_are():
    assert set(base.TASKS) == TASKS.keys() == CONFIGS.keys()


def test_the_config_allows_the_sources_that_data_reads():
    assert (*CORPUS_SOURCES, CHAT_SOURCE, PREPARED_SOURCE, base.LABELLED_SOURCE) == base.SOURCES


def shapes(batch):
    return {name: jax.ShapeDtypeStruct(rows.shape, rows.dtype) for name, rows in batch.items()}


def test_batches_have_the_shapes_that_programs_are_compiled_for(case):
    config, task = case
    assert shapes(next(task.train_batches(0, Part(0, 1)))) == task.objective.batch_shapes(config.batch_size)
    for batch in task.heldout_batches(2, Part(0, 1)):
        assert shapes(batch) == task.objective.batch_shapes(config.eval.batch_size)


def test_a_batch_is_a_function_of_its_step_and_processes_read_its_parts(case):
    _, task = case
    batches = task.train_batches(0, Part(0, 1))
    third = [next(batches) for _ in range(3)][2]
    parts = [next(task.train_batches(2, Part(index, 2))) for index in range(2)]
    for name, rows in third.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), rows, err_msg=name)


def test_a_dry_run_has_the_objective_of_the_run(case):
    config, task = case
    assert type(task).objective_of(config) == task.objective


@pytest.mark.standard_promotion
def test_a_steps_figures_are_weighted_by_one_of_them(case):
    config, task = case
    experiment = Experiment.of(config, task.objective)
    metrics = jax.eval_shape(experiment.train_step(), experiment.abstract, experiment.sharded_batch)[1]
    assert {"loss", task.objective.weight_name} <= metrics.keys()


def test_what_is_best_is_a_figure_of_every_evaluation(case):
    config, task = case
    network = Experiment.of(config, task.objective).network
    arrays = jax.jit(network.init)(jax.random.key(0))
    measure = jax.jit(lambda batch: task.objective.measure(network.bind(*arrays), batch))
    evaluation = task.evaluation(*measure_all(measure, task.heldout_batches(1, Part(0, 1))))
    assert task.best in evaluation.as_metrics() and task.loss_unit


@pytest.mark.parametrize("name", TASKS)
def test_the_training_of_a_tokenizer_is_shown(name, tmp_path):
    config, bars = CONFIGS[name](tmp_path), []
    config.data.tokenizer = "bpe:260"

    def record(total, unit, label=""):
        bars.append((label, tqdm.tqdm(total=total, file=io.StringIO())))
        return bars[-1][1]

    TASKS[name].load(config, Workdir(tmp_path / "run"), record)
    (reading, words), (training, clock) = bars
    assert (reading, training) == ("reading words for the tokenizer", "training the tokenizer")
    assert words.n == words.total > 0 and clock.total is None


def test_a_workdir_says_what_its_model_has_learned(tmp_path):
    workdir = Workdir(tmp_path / "run")
    workdir.write_config(tiny_config().to_dict())
    assert task_of(workdir) is TASKS["language_model"]
    config = json.loads((workdir / "config.json").read_text())
    mistakes = [
        ({"name": "chess"}, f"{workdir}: its task 'chess' is not known; allowed: language_model"),
        ("chess", f"{workdir}/config.json: task = 'chess': must be a section with fields"),
    ]
    for task, message in mistakes:
        (workdir / "config.json").write_text(json.dumps(config | {"task": task}))
        with pytest.raises(UserError, match=message):
            task_of(workdir)
