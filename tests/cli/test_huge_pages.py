"""A command that computes on the CPU starts once more with huge pages, and only where that helps and is safe."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from darkformer_jax.cli import huge_pages
from darkformer_jax.cli.huge_pages import TUNABLE, VARIABLE, restarted_command
from darkformer_jax.distributed import platform

# Says what it is before and after, each in one line.
PROGRAM = """
import json, os, pathlib, sys
from darkformer_jax.cli import huge_pages
huge_pages.SETTING = pathlib.Path(__file__).with_name("enabled")
print(json.dumps([os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], sys.flags.optimize]))
huge_pages.start_with_huge_pages()
print("ran")
"""

# Before PROGRAM: the variable is gone, and a third start ends with an error.
FORGETFUL = """
import os, pathlib
os.environ.pop("GLIBC_TUNABLES", None)
starts = pathlib.Path("starts")
assert not starts.exists() or starts.read_text() == "1"
starts.write_text("2" if starts.exists() else "1")
"""


@pytest.fixture(autouse=True)
def kernel(monkeypatch, tmp_path):
    """A kernel that has huge pages for who asks, a CPU, and a process that was started for `train.py --a=1`."""
    monkeypatch.setattr(huge_pages, "SETTING", tmp_path / "enabled")
    huge_pages.SETTING.write_text("always [madvise] never\n")
    monkeypatch.chdir(tmp_path)
    Path("train.py").touch()
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(sys, "argv", ["train.py", "--a=1"])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-u", "train.py", "--a=1"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)


def lines_of(tmp_path, tunables=None, program=PROGRAM):
    """What the program prints, started with an option of the interpreter and two arguments."""
    (tmp_path / "program.py").write_text(program)
    environment = os.environ | {"PYTHONPATH": str(Path(huge_pages.__file__).parents[2])}
    environment |= {VARIABLE: tunables} if tunables else {}
    command = [sys.executable, "-O", "program.py", "--a=1", "b c"]
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    return said.stdout.splitlines()


def test_a_program_starts_once_more_as_the_same_process_with_its_options_and_arguments(tmp_path):
    first, second, ran = lines_of(tmp_path, "glibc.malloc.perturb=0")
    (pid, before, *command), (same_pid, after, *same_command) = json.loads(first), json.loads(second)
    assert (pid, command) == (same_pid, same_command) and command == [["--a=1", "b c"], 1] and ran == "ran"
    assert (before, after) == ("glibc.malloc.perturb=0", f"glibc.malloc.perturb=0:{TUNABLE}=1")


def test_a_user_declines_with_the_tunable_itself(tmp_path):
    assert len(lines_of(tmp_path, f"{TUNABLE}=0")) == 2


def test_a_program_starts_no_third_time_where_the_variable_is_taken_from_it(tmp_path):
    """As glibc does to an interpreter with capabilities."""
    first, second, ran = lines_of(tmp_path, program=FORGETFUL + PROGRAM)
    assert json.loads(first) == json.loads(second) and ran == "ran"


def test_a_program_that_cannot_start_again_runs_on(tmp_path):
    program = PROGRAM.replace("import json", "import sys; sys.executable = '/no/such/python'\nimport json", 1)
    first, ran = lines_of(tmp_path, program=program)
    assert json.loads(first)[1] is None and ran == "ran"


@pytest.mark.parametrize("name", ["-", "pipe"])
def test_a_script_that_was_read_from_a_pipe_is_left_alone(monkeypatch, name):
    """It would be empty the second time."""
    os.mkfifo("pipe")
    monkeypatch.setattr(sys, "argv", [name, "--a=1"])
    monkeypatch.setattr(sys, "orig_argv", ["python3", name, "--a=1"])
    assert not restarted_command()


def test_options_of_the_interpreter_may_have_values(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-W", "error", "-X", "dev", "-O", "train.py", "--a=1"])
    assert restarted_command() == [sys.executable, *sys.orig_argv[1:]]


@pytest.mark.parametrize("setting", ["[always] madvise never", "always madvise [never]", None])
def test_other_settings_of_the_kernel_and_other_systems_are_left_alone(setting):
    assert restarted_command()
    huge_pages.SETTING.unlink() if setting is None else huge_pages.SETTING.write_text(setting)
    assert not restarted_command()


@pytest.mark.parametrize(
    ("platforms", "starts"), [("cpu", True), ("cpu,tpu", True), ("tpu,cpu", False), ("cuda", False)]
)
def test_programs_for_accelerators_are_left_alone(monkeypatch, platforms, starts):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert bool(restarted_command()) == starts


def test_a_machine_with_an_accelerator_is_left_alone(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(platform, "ACCELERATORS", ())
    assert restarted_command()
    monkeypatch.setattr(platform, "ACCELERATORS", ("null",))
    assert not restarted_command()


@pytest.mark.parametrize(
    "program",
    [
        ["-m", "pytest"],
        ["-m", "pytest", "--a=1"],
        ["-c", "main()", "--a=1"],
        ["other.py", "--a=1"],
        ["-m", "pdb", "train.py", "--a=1"],
        ["/bin/coverage", "run", "train.py", "--a=1"],
        ["-X", "dev", "/debugpy", "--connect", "127.0.0.1:5678", "train.py", "--a=1"],
    ],
)
def test_a_command_inside_another_program_does_not_replace_it(monkeypatch, program):
    monkeypatch.setattr(sys, "orig_argv", ["python3", *program])
    assert not restarted_command()


@pytest.mark.parametrize(
    ("name", "module"),
    [("darkformer_jax.train", "darkformer_jax.train"), ("darkformer_jax.__main__", "darkformer_jax")],
)
def test_a_module_that_python_runs_with_m_starts_once_more(monkeypatch, name, module):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", type("Spec", (), {"name": name}))
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", module, "--a=1"])
    assert restarted_command() == [sys.executable, "-m", module, "--a=1"]
