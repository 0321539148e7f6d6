import subprocess
from importlib import metadata
from types import SimpleNamespace

import jax
import pytest

from darkformer_jax.training import environment as module
from darkformer_jax.training.environment import environment


def git(directory, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=directory, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def clone(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "a")
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    return tmp_path


def test_the_version_of_a_clone_has_its_commit_and_says_if_files_were_changed(clone):
    commit = git(clone, "rev-parse", "--short=12", "HEAD")
    own = f"darkformer_jax {metadata.version('darkformer_jax')} at {commit}, jax {jax.__version__}, Python 3."
    assert environment()["version"].startswith(own)
    (clone / "a.py").write_text("2")
    assert f" at {commit}-dirty, " in environment()["version"]


def test_where_git_cannot_answer_the_version_is_the_packages(clone, monkeypatch):
    package = f"darkformer_jax {metadata.version('darkformer_jax')}, "
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        assert environment()["version"].startswith(package)
    (clone / "installed").mkdir()  # in somebody's own repository
    monkeypatch.setattr(module, "_ROOT", clone / "installed")
    assert environment()["version"].startswith(package)


def test_hardware_names_all_devices_and_the_hosts_processor(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Xeon Z\n\nmodel name\t: Xeon Z\n")
    monkeypatch.setattr(module, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(module, "num_cores", lambda: 8)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="tpu", device_kind="TPU v5e")] * 16)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    assert environment()["hardware"] == "16 x TPU v5e in 4 processes; Xeon Z, 8 cores"
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="cpu", device_kind="cpu")])
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    monkeypatch.setattr(module, "num_cores", lambda: 1)
    assert environment()["hardware"] == "1 x CPU; Xeon Z, 1 core"
