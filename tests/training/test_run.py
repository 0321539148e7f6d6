"""Which fields of a command line a run accepts; `test_train.py` covers the rest."""

import os
import re
import shutil
import signal

import pytest

from darkformer_jax.cli.progress import Progress
from darkformer_jax.data.prepared import prepare
from darkformer_jax.errors import UserError
from darkformer_jax.runs.checkpoints import Checkpoints
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.training.run import dry_run, train
from darkformer_jax.training.stopping import Stopped
from tests.tiny_runs import metrics_without_time, run, tiny_config, write_text, write_workdir

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
    with pytest.raises(UserError, match=message):
        dry_run(config, workdir=Workdir(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_beyond_its_last_step_is_refused_before_the_data_is_read(trained):
    config = tiny_config(data__files="nowhere.txt", num_steps=2, optimizer__warmup_steps=1)
    with pytest.raises(UserError, match="num_steps = 2, but .* is at step 3 already"):
        train(config, Workdir(trained), Progress(1, 1))


@pytest.mark.standard_promotion
def test_a_run_goes_on_when_the_run_that_it_started_from_is_gone(tmp_path):
    fields = {"data__files": write_text(tmp_path / "text.txt", 20_000), "eval__every": 0, "model__vocab_size": 0}
    fields |= {"optimizer__warmup_steps": 0}
    run(tiny_config(**fields, num_steps=1), tmp_path / "first")
    fields |= {"data__tokenizer": "", "init_from": str(tmp_path / "first")}
    run(tiny_config(**fields, num_steps=1), tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    dry_run(tiny_config(**fields, num_steps=2), workdir=Workdir(tmp_path / "second"))
    run(tiny_config(**fields, num_steps=2), tmp_path / "second")
    assert metrics_without_time(tmp_path / "second")[-1]["step"] == 2


@pytest.mark.standard_promotion
def test_a_signal_during_the_last_save_waits_for_it(tmp_path, monkeypatch):
    fields = {"data__files": write_text(tmp_path / "text.txt", 20_000), "num_steps": 2, "optimizer__warmup_steps": 0}
    wait, waits = Checkpoints.wait, []

    def interrupted(checkpoints):
        if checkpoints._pending is not None and not waits:  # a save is under way
            waits.append(checkpoints)
            os.kill(os.getpid(), signal.SIGTERM)
        wait(checkpoints)

    monkeypatch.setattr(Checkpoints, "wait", interrupted)
    with pytest.raises(Stopped, match="SIGTERM: saved step 2"):
        run(tiny_config(**fields), tmp_path / "run")
    assert Checkpoints(Workdir(tmp_path / "run")).latest_good_step() == 2
    run(tiny_config(**fields), tmp_path / "run")
    assert (tmp_path / "run" / "loss_curve.png").exists()


@pytest.mark.standard_promotion
def test_a_run_keeps_the_warm_up_that_a_number_of_steps_chose(tmp_path, capsys):
    text = write_text(tmp_path / "text.txt", 20_000)
    fields = {"data__files": text, "eval__every": 0, "optimizer__warmup_steps": 8, "optimizer__schedule": "constant"}

    def go(steps, *overridden, name="run", warmup=8):
        config = tiny_config(**fields | {"num_steps": steps, "optimizer__warmup_steps": warmup})
        train(config, Workdir(tmp_path / name), Progress(steps, 1), overridden)
        return Workdir(tmp_path / name).read_config()["optimizer"]["warmup_steps"], capsys.readouterr().err

    warmup, said = go(4, "num_steps")
    assert warmup == 1 and "note: optimizer.warmup_steps = 1, because num_steps = 4\n" in said
    # More steps, by the command line or as the experiment has them, whether its warm-up fits them or was shortened.
    for steps, given, warmup in ((5, ["num_steps"], 8), (12, [], 8), (16, ["num_steps"], 4)):
        assert (kept := go(steps, *given, warmup=warmup))[0] == 1
        assert "note: optimizer.warmup_steps = 1, as the run began\n" in kept[1]
    with pytest.raises(UserError, match="belongs to another experiment.*optimizer.warmup_steps: 1 -> 8"):
        go(16, "num_steps", "optimizer.warmup_steps")

    assert go(1, name="one")[0] == 8  # as earlier versions wrote it
    kept, said = go(1, "num_steps", name="one")
    assert kept == 8 and "note" not in said
    go(9, name="long")
    with pytest.raises(UserError, match="num_steps = 8: the run began with a warm-up of 8 steps; allowed: more"):
        go(8, "num_steps", name="long")
    for warmup in (3, 20):  # an earlier version shortened it otherwise, or the experiment has another now
        kept, said = go(30, name="long", warmup=warmup)
        assert kept == 8 and "note: optimizer.warmup_steps = 8, as the run began\n" in said
    fields["seed"] = 5
    with pytest.raises(UserError, match="belongs to another experiment; use a new workdir or undo: seed: 0 -> 5$"):
        go(8, "num_steps", name="long", warmup=2)


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
