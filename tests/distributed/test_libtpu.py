"""A machine without TPUs that has libtpu, to compile for them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from darkformer_jax.distributed.libtpu import WITHOUT_TPUS, quiet_libtpu
from tests.tiny_runs import ROOT


@pytest.mark.parametrize("device", [None, "null", "vfio/vfio", "accel0", "vfio/0"])
def test_the_environment_is_changed_only_where_there_are_no_tpus(device, tmp_path, monkeypatch):
    for name in WITHOUT_TPUS:
        monkeypatch.setenv(name, "")  # so that they are as before in the end
        os.environ.pop(name)
    if device:
        (tmp_path / device).parent.mkdir(exist_ok=True)
        (tmp_path / device).touch()
    quiet_libtpu(tmp_path)
    set_here = {name for name in WITHOUT_TPUS if name in os.environ}
    assert set_here == (set() if device in ("accel0", "vfio/0") else set(WITHOUT_TPUS))


def test_what_the_user_set_stays(tmp_path, monkeypatch):
    for name, value in WITHOUT_TPUS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v6e-8")
    quiet_libtpu(tmp_path)
    assert os.environ["TPU_ACCELERATOR_TYPE"] == "v6e-8"


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: launch/install.sh aot")
@pytest.mark.skipif(any(Path("/dev").glob("accel*")), reason="this machine has TPUs")
@pytest.mark.parametrize("command", [["train.py", "--dry_run"], ["-m", "darkformer_jax.report", "--runs=nothing"]])
def test_no_verb_prints_what_libtpu_misses(command, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in (*WITHOUT_TPUS, "JAX_PLATFORMS")}
    environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # otherwise libtpu says nothing while another process has its lock
    said = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    ).stderr
    allowed = ["error: "] if "report" in command[1] else []
    assert [line for line in said.splitlines() if not line.startswith(tuple(allowed))] == [], said
