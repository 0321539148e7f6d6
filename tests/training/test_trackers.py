"""Experiment trackers beside metrics.jsonl; wandb's and MLflow's own are tested where they are installed."""

import json
import threading
from pathlib import Path

import pytest

from darkformer_jax.config import base
from darkformer_jax.errors import UserError
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.training import trackers as trackers_module
from darkformer_jax.training.trackers import TRACKERS, Trackers, require_installed
from tests.tiny_runs import run, tiny_config, write_text

RUN = {
    "num_steps": 4,
    "eval__every": 2,
    "checkpoint__every": 2,
    "sample__prompts": ("ab",),
    "sample__max_new_tokens": 2,
}


class Fake:
    """Remembers what it gets. `fails` maps a method's name to what it does instead."""

    package = "json"  # is installed
    where = "in memory"

    def __init__(self):
        self.got, self.fails = [], {}

    def open(self, workdir, config):
        self.fails.get("open", lambda: None)()
        self.got.append(("open", str(workdir), dict(config)))
        return self

    def scalars(self, step, values):
        self.fails.get("scalars", lambda: None)()
        self.got.append(("scalars", step, dict(values)))

    def picture(self, path):
        self.got.append(("picture", path.name, path.read_bytes()[:4]))

    def text(self, path):
        self.got.append(("text", path.name, path.read_text()))

    def close(self, finished):
        self.got.append(("close", finished))


@pytest.fixture
def fake(monkeypatch):
    fake = Fake()
    monkeypatch.setitem(TRACKERS, "wandb", fake)
    return fake


def lines_of(workdir):
    """What a tracker is to get of metrics.jsonl."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    times = [{f"time/{name}": value for name, value in line.pop("time", {}).items()} for line in lines]
    return [("scalars", line.pop("step"), line | time) for line, time in zip(lines, times, strict=True)]


def test_the_config_allows_the_trackers_that_there_are():
    assert set(base.TRACKERS) == TRACKERS.keys()


def test_a_tracker_gets_the_config_every_line_the_curve_and_the_samples(tmp_path, fake, capsys):
    config = tiny_config(data__files=write_text(tmp_path / "text.txt"), log__trackers="wandb", **RUN)
    run(config, tmp_path / "run")
    opened, *lines, picture, text, closed = fake.got
    assert opened[:2] == ("open", str(tmp_path / "run"))
    assert (opened[2]["num_steps"], opened[2]["model.attention.kind"]) == (4, "dark")
    assert lines == lines_of(tmp_path / "run")
    assert picture == ("picture", "loss_curve.png", b"\x89PNG")
    assert text == ("text", "samples.txt", (tmp_path / "run" / "samples.txt").read_text())
    assert closed == ("close", True)
    assert "\nwandb: in memory\n" in capsys.readouterr().err


def test_a_run_that_does_not_finish_says_so(tmp_path, fake):
    def stops():
        with Trackers("wandb", print) as trackers:
            trackers.start(Workdir(tmp_path), {})
            raise UserError("the disk is full")

    with pytest.raises(UserError):
        stops()
    assert fake.got == [("open", str(tmp_path), {}), ("close", False)]


def no_network():
    raise ConnectionError("no route to\nthe host")


@pytest.mark.parametrize("method", ["open", "scalars"])
def test_a_tracker_that_fails_is_one_line_and_the_run_goes_on(tmp_path, fake, method, capsys):
    fake.fails[method] = no_network
    config = tiny_config(data__files=write_text(tmp_path / "text.txt"), log__trackers="wandb", **RUN)
    run(config, tmp_path / "run")
    said = capsys.readouterr()
    assert said.err.count("warning: wandb gets no more of this run: no route to the host\n") == 1
    assert "step 4/4" in said.err and "loss curve: " in said.out
    assert [call[0] for call in fake.got] == ["open"] * (method != "open")


def test_a_tracker_that_hangs_holds_up_no_step_and_the_end_for_a_while_only(tmp_path, fake, monkeypatch):
    never = threading.Event()
    fake.fails["scalars"] = never.wait
    monkeypatch.setattr(trackers_module, "_SECONDS_AT_THE_END", 0.2)
    monkeypatch.setattr(trackers_module, "_WAITING", 5)
    said = []
    with Trackers("wandb", said.append) as trackers:
        trackers.start(Workdir(tmp_path), {})
        trackers.scalars(1, {"loss": 1.0})
    assert said[-1] == "warning: wandb gets no more of this run: not all was sent within 0 s"
    said.clear()
    with Trackers("wandb", said.append) as trackers:
        trackers.start(Workdir(tmp_path), {})
        for step in range(9):
            trackers.scalars(step, {"loss": 1.0})
    assert [line for line in said if "warning" in line] == [
        "warning: wandb gets no more of this run: 5 calls wait for it"
    ]
    never.set()


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_read(tmp_path, fake, monkeypatch):
    fake.package = "trackerless"
    config = tiny_config(data__files="nowhere.txt", log__trackers="wandb", **RUN)
    message = "log.trackers = 'wandb': trackerless is not installed; pip install trackerless"
    with pytest.raises(UserError, match=message):
        run(config, tmp_path / "run")
    (tmp_path / "trackerless").mkdir()  # such as the folder that wandb makes where it runs
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=message):
        require_installed("wandb")
    assert not (tmp_path / "run").exists()


def run_twice(tmp_path, name):
    """Runs two steps, resumes for two more, and returns the workdir's id of the tracker's run."""
    fields = {"data__files": write_text(tmp_path / "text.txt"), "log__trackers": name, **RUN}
    run(tiny_config(**fields | {"num_steps": 3}), tmp_path / "run")
    first = (tmp_path / "run" / f"{name}.id").read_text()
    run(tiny_config(**fields), tmp_path / "run")
    assert (tmp_path / "run" / f"{name}.id").read_text() == first
    return first.strip()


@pytest.mark.filterwarnings("default")  # of the library's own code
def test_wandb_offline(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run_id = run_twice(tmp_path, "wandb")
    said = capsys.readouterr().err
    assert said.count("\nwandb: offline; `wandb sync ") == 2 and "warning" not in said
    sessions = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))
    assert sessions and any(list(session.glob("files/media/images/loss_curve*.png")) for session in sessions)
    written = b"".join(path.read_bytes() for path in (tmp_path / "wandb").rglob("*.wandb"))
    for name in (b"heldout_loss", b"time/tokens_per_second", b"model.attention.kind", b"samples"):
        assert name in written


@pytest.mark.filterwarnings("default")  # of the library's own code
def test_mlflow_in_a_database(tmp_path, monkeypatch, capsys):
    mlflow = pytest.importorskip("mlflow")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.chdir(tmp_path)  # where MLflow puts pictures and texts if it has no server
    run_id = run_twice(tmp_path, "mlflow")
    said = capsys.readouterr().err
    assert said.count(f"\nmlflow: run {run_id} in {store}\n") == 2 and "warning" not in said
    client = mlflow.MlflowClient(store)
    kept = client.get_run(run_id)
    assert (kept.info.status, kept.info.run_name) == ("FINISHED", "run")
    assert kept.data.params["model.attention.kind"] == "dark" and len(kept.data.params) == len(base.fields())
    assert (kept.data.params["num_steps"], kept.data.tags["resumed.num_steps"]) == ("3", "4")
    for name in ("loss", "heldout_loss", "time/step_seconds"):
        wanted = [(step, values[name]) for _, step, values in lines_of(tmp_path / "run") if name in values]
        assert [(value.step, value.value) for value in client.get_metric_history(run_id, name)] == wanted
    files = {Path(file.path).name for file in client.list_artifacts(run_id)}
    assert files == {"loss_curve.png", "samples.txt"}
