"""Which fields of a command line a run accepts; `test_train.py` covers the rest."""

import re

import pytest

from darkformer_jax.cli.progress import Progress
from darkformer_jax.data.prepared import prepare
from darkformer_jax.errors import UserError
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.training.run import dry_run, train
from tests.tiny_runs import tiny_config, write_text, write_workdir

UNUSED = ["model.attention.num_features"]


def test_a_field_that_no_layer_uses_is_refused_in_a_new_run_only(tmp_path):
    config = tiny_config(model__attention__kind="softmax", data__files="nowhere.txt")
    workdir, progress = Workdir(tmp_path / "run"), Progress(1, 1)
    config.model.attention.num_features = 8
    with pytest.raises(
        UserError,
        match=r"^model.attention.num_features = \d+: no softmax layer uses it; leave out model.attention.num_features$",
    ):
        dry_run(config, UNUSED)
    with pytest.raises(UserError, match="no softmax layer uses it"):
        train(config, workdir, progress, UNUSED)
    workdir.write_config(config.to_dict())
    with pytest.raises(UserError, match=r"nowhere.txt"):  # the data is what comes after
        train(config, workdir, progress, UNUSED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh__data": 3}, "does not fit the 1 devices"),
        ({"mesh__context": 3}, "does not fit the 1 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_the_data_is_read(tmp_path, changes, message):
    config = tiny_config(data__files="nowhere.txt", **changes)
    with pytest.raises(UserError, match=message):
        train(config, Workdir(tmp_path / "run"), Progress(1, 1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with a checkpoint of step 3."""
    workdir = tmp_path_factory.mktemp("trained")
    write_workdir(workdir, tiny_config(data__files="nowhere.txt", optimizer__warmup_steps=1))
    return workdir


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": "nowhere"}, "init_from = nowhere: there is no checkpoint in"),
        ({"init_from": "{trained}", "model__mlp_dim": 48}, r"mlp/down/kernel has shape \(32, 32\), this model's has"),
        ({"init_from": "{trained}", "model__num_layers": 2}, "it has 1 layers, this model has 2"),
        ({"init_from": "{trained}", "data__tokenizer": "nowhere.model"}, "tokenizer 'nowhere.model' is not a file"),
        ({"distill__workdir": "nowhere", "distill__weight": 0.5}, "nowhere/config.json cannot be read"),
        ({"data__tokenizer": "bpe:9"}, "tokenizer 'bpe:9' is not possible"),
    ],
)
def test_what_needs_no_data_is_refused_before_the_data_is_read(tmp_path, trained, changes, message):
    changes = {
        name: str(value).format(trained=trained) if name == "init_from" else value for name, value in changes.items()
    }
    config = tiny_config(data__files="nowhere.txt", **changes)
    with pytest.raises(UserError, match=message):
        train(config, Workdir(tmp_path / "run"), Progress(1, 1))
    assert not (tmp_path / "run").exists()


def test_a_run_beyond_its_last_step_is_refused_before_the_data_is_read(trained):
    config = tiny_config(data__files="nowhere.txt", num_steps=2, optimizer__warmup_steps=1)
    with pytest.raises(UserError, match="num_steps = 2, but .* is at step 3 already"):
        train(config, Workdir(trained), Progress(1, 1))


def test_a_dry_run_finds_the_data_or_says_that_there_is_none(tmp_path, trained, capsys):
    def line(**changes):
        dry_run(tiny_config(**changes))
        return capsys.readouterr().out.splitlines()[-1]

    text = write_text(tmp_path / "text.txt", 3 << 19)
    assert line(data__files=text) == "data           1.5 MiB of text"
    assert line(data__files=f"{text}:0.5,{text}x:0.5").startswith("data           none: no file matches")
    assert line(data__files="nowhere/*.txt") == "data           none: no file matches 'nowhere/*.txt'"
    assert line(data__source="stdlib").endswith("MiB of stdlib")
    prepare(str(tmp_path / "data"), source="text", files=text, tokenizer_spec="bytes", heldout_fraction=0.05)
    shown = line(data__source="array_record", data__files=str(tmp_path / "data"))
    assert re.fullmatch(
        r"data           1,49\d,\d{3} training tokens, \d{2},\d{3} held out, in 1 prepared directory", shown
    )
    missing = line(data__source="array_record", data__files=f"{tmp_path}/none")
    assert missing.startswith(f"data           none: data directory '{tmp_path}/none' does not exist")
    with pytest.raises(UserError, match="init_from = nowhere: there is no checkpoint"):
        dry_run(tiny_config(data__files=text, init_from="nowhere"))
