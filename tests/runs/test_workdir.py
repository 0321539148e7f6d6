import copy
import errno
import fcntl
import functools
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from darkformer_jax.config import base
from darkformer_jax.errors import UserError
from darkformer_jax.runs.workdir import Workdir


def config(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = base.get_config().to_dict()
    for name, value in changes.items():
        *parents, last = name.split("__")
        part = fields
        for parent in parents:
            part = part[parent]
        part[last] = value
    return fields


def test_first_start_writes_the_config_and_the_same_config_resumes(tmp_path: Path) -> None:
    workdir = tmp_path / "new" / "run"
    Workdir(workdir).write_config(config())
    before = (workdir / "config.json").stat()
    Workdir(workdir).write_config(config())
    assert (workdir / "config.json").stat().st_mtime_ns == before.st_mtime_ns
    assert Workdir(workdir).read_config()["sample"]["prompts"] == list(config()["sample"]["prompts"])
    assert Workdir(workdir).read_config()["model"] == config()["model"]
    assert [path.name for path in workdir.iterdir()] == ["config.json"]


def test_another_experiment_is_refused_with_every_difference_and_nothing_written(tmp_path: Path) -> None:
    Workdir(tmp_path).write_config(config())
    before = (tmp_path / "config.json").read_bytes()
    changed = config(model__attention__kind="performer", seed=1, data__source="text", num_steps=5, model__new=True)
    with pytest.raises(UserError) as raised:
        Workdir(tmp_path).write_config(changed)
    message = str(raised.value)
    assert str(tmp_path) in message and "\n" not in message
    assert 'model.attention.kind: "dark" -> "performer"' in message
    assert "seed: 0 -> 1" in message
    assert 'data.source: "stdlib" -> "text"' in message
    assert "model.new: (absent) -> true" in message
    assert "num_steps" not in message
    assert (tmp_path / "config.json").read_bytes() == before


def test_what_may_change_is_taken_over(tmp_path: Path) -> None:
    Workdir(tmp_path).write_config(config())
    changed = config(num_steps=2000, eval__every=7, mesh__data=4, data__num_workers=3, sample__prompts=("x",))
    changed["model"]["attention"]["backend"] = "pallas"
    Workdir(tmp_path).write_config(changed)
    assert Workdir(tmp_path).read_config() == json.loads(json.dumps(changed))


def test_a_run_of_an_earlier_version_means_what_it_did_and_resumes(tmp_path: Path) -> None:
    complete = json.loads(json.dumps(config()))
    for field in (
        *("distill", "distill.weight", "mesh.context", "model.lora_rank", "model.rope_scaling", "model.qkv_bias"),
        *("model.attention.far_gain", "model.attention.window_kernel", "optimizer.train", "profile"),
    ):
        old = copy.deepcopy(complete)
        *sections, name = field.split(".")
        del functools.reduce(dict.__getitem__, sections, old)[name]
        (tmp_path / "config.json").write_text(json.dumps(old))
        assert Workdir(tmp_path).read_config() == complete
    with pytest.raises(UserError, match="another experiment.*: model.lora_rank: 0 -> 8"):
        Workdir(tmp_path).write_config(config(model__lora_rank=8))
    Workdir(tmp_path).write_config(config(mesh__context=2))
    assert json.loads((tmp_path / "config.json").read_text())["mesh"]["context"] == 2


def test_a_directory_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"not empty and has no config\.json \(it holds thesis.tex\)"):
        Workdir(tmp_path).write_config(config())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file"):
        Workdir(tmp_path / "thesis.tex").write_config(config())


def test_a_run_killed_while_it_wrote_its_first_config_can_start_again(tmp_path: Path) -> None:
    (tmp_path / "config.json.tmp").write_text('{"se')
    Workdir(tmp_path).write_config(config())
    assert Workdir(tmp_path).read_config()["seed"] == 0


def test_what_a_kill_leaves_while_the_processes_compare_workdirs_is_not_a_foreign_file(tmp_path):
    (tmp_path / ".shared-0123456789abcdef").touch()
    Workdir(tmp_path).check_config({})
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="it holds thesis.tex"):
        Workdir(tmp_path).check_config({})


def test_a_bad_config_file_or_path_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json cannot be read: No such file .* workdir of a run\?"):
        Workdir(tmp_path).read_config()
    (tmp_path / "config.json").write_text("{ torn")
    for use in (Workdir(tmp_path).read_config, lambda: Workdir(tmp_path).write_config(config())):
        with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
            use()
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="holds a list"):
        Workdir(tmp_path).read_config()
    with pytest.raises(UserError, match="s3://bucket/run: allowed: a local or mounted directory"):
        Workdir("s3://bucket/run").write_config(config())


def test_a_workdir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run cannot be written: Not a directory"):
        Workdir(tmp_path / "file" / "run").write_config(config())


def test_two_runs_refuse_each_other_and_a_killed_one_is_in_nobodys_way(tmp_path: Path) -> None:
    with Workdir(tmp_path / "new").lock() as lock:  # nothing to lock yet, and nothing is made
        assert not (tmp_path / "new").exists()
        Workdir(tmp_path / "new").write_config(config())
        lock.take()
        lock.take()
        with (
            pytest.raises(UserError, match=rf"new is in use by another run \(process {os.getpid()} on .+\); wait"),
            Workdir(tmp_path / "new").lock(),
        ):
            raise AssertionError
    holder = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", holder, tmp_path / "new" / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match="in use by another run"):
            Workdir(tmp_path / "new").lock().take()
        other.kill()
        other.wait()
        with Workdir(tmp_path / "new").lock():
            pass
    assert (tmp_path / "new" / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    Workdir(tmp_path).write_config(config())
    with caplog.at_level(logging.WARNING, logger="absl"), Workdir(tmp_path).lock():
        assert f"workdir {tmp_path} cannot be locked: Operation not supported; start one run" in caplog.text


def test_a_workdir_is_what_its_user_called_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert str(Workdir("runs/x/")) == os.fspath(Workdir("runs/x")) == "runs/x"
    assert Workdir("runs/x") in {Workdir("runs/x/"), Workdir("runs/y")} and Workdir("runs/x") != "runs/x"
    assert Workdir("runs/x") / "metrics.jsonl" == Path("runs/x/metrics.jsonl")
    assert Workdir("runs/x").checkpoints == tmp_path / "runs" / "x" / "checkpoints"
    assert str(Workdir("/")) == "/" and str(Workdir(Workdir("a"))) == "a"
    assert str(Workdir("~/run")) == str(tmp_path / "run")
    with pytest.raises(UserError, match="^~nobody-is-called-so/run: there is no such home directory"):
        Workdir("~nobody-is-called-so/run")
    with pytest.raises(UserError, match="workdir '': give the name of a directory"):
        Workdir("")
    assert not list(tmp_path.iterdir())
