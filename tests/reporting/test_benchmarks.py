"""Which benchmark a run is of, and what is published on it."""

import pytest

from configs import glue, lra
from darkformer_jax.data.glue import GLUE_TASKS
from darkformer_jax.reporting.benchmarks import BENCHMARKS, benchmark_of
from darkformer_jax.reporting.published import PUBLISHED


@pytest.mark.parametrize("task", lra.TASKS)
def test_an_experiment_of_long_range_arena_is_known_by_its_files(task):
    config = lra.get_config(f"task={task},files=/elsewhere/{task}")
    assert benchmark_of(config.data.files, config.task) == task
    pretraining = lra.get_config(f"task={task},pretrain=next_token")
    assert benchmark_of(pretraining.data.files, pretraining.task) is None


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_an_experiment_of_glue_is_known_by_its_files(task):
    config = glue.get_config(f"task={task}")
    assert benchmark_of(config.data.files, config.task) == task


@pytest.mark.parametrize(
    "files", ["spam.jsonl", "data/spam/train.jsonl", "data/rte/dev.jsonl", "data/cifar10/train.tsv"]
)
def test_other_files_are_of_no_benchmark(files):
    task = {"name": "classification", "text_column": "text", "label_column": "label"}
    assert benchmark_of(files, task) is None


def test_published_figures_are_of_known_benchmarks_in_percent_and_each_names_its_source():
    assert PUBLISHED.keys() <= BENCHMARKS.keys()
    for one in sum(PUBLISHED.values(), ()):
        assert 1 < one.figure < 100 and one.source.name


def test_the_official_reformer_of_images_is_said_to_have_its_own_size():
    (models,) = {one.source.models for one in PUBLISHED["cifar10"] if "long-range-arena" in one.source.name}
    assert "CIFAR-10: 1 layer of width 128 (Reformer: 4 of width 64)" in models
