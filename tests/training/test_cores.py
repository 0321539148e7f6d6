"""A run on CPUs divides its rows over the cores, unless something decided otherwise."""

import os
import subprocess
import sys

import numpy as np
import pytest

from darkformer_jax.distributed import platform
from darkformer_jax.distributed.platform import num_cores
from darkformer_jax.training.cores import MOST_BYTES, STATE_BYTES, num_devices
from tests.tiny_runs import ROOT, Training, metrics_without_time, tiny_config, tiny_flags, write_text

PATIENCE = "--xla_cpu_collective_timeout_seconds=86400"

PROGRAM = """
import os
import sys

import jax
from darkformer_jax.training import cores
from tests.tiny_runs import tiny_config

cores.num_cores = lambda: 2
config = tiny_config(batch_size=4, eval__batch_size=4)
exec(sys.argv[1])
cores.divide_over_cores(config, None)
print(len(jax.devices()), os.environ.get("XLA_FLAGS"))
"""


def devices_after(statement="", **environment):
    """(the number of JAX's devices, XLA_FLAGS) on a machine of two cores, once `divide_over_cores` was asked."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    command = [sys.executable, "-c", PROGRAM, statement]
    said = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True)
    number, xla_flags = said.stdout.strip().split(" ", maxsplit=1)
    return int(number), xla_flags


def test_a_run_has_a_device_for_each_core_that_its_rows_divide_by():
    config = tiny_config(batch_size=12, eval__batch_size=24, accumulation_steps=2)
    of_cores = [num_devices(config, 256, count) for count in (1, 2, 3, 4, 5, 6, 8)]
    assert of_cores == [1, 2, 3, 3, 3, 6, 6]


def test_the_copies_of_a_large_models_state_stay_small():
    config = tiny_config(batch_size=8, eval__batch_size=8)
    table = int(MOST_BYTES / (STATE_BYTES * 32 * 5.2))  # so many ids that 5.2 copies fit
    assert config.model.embed_dim == 32
    assert [num_devices(config, vocabulary, 8) for vocabulary in (256, table, 6 * table)] == [8, 4, 1]
    config.model.tie_embeddings = False  # two tables
    assert num_devices(config, table, 8) == 2


def test_two_cores_are_two_devices_that_wait_for_each_other_for_a_day():
    assert devices_after() == (2, PATIENCE)
    users = "--xla_cpu_collective_timeout_seconds=9"
    assert devices_after(XLA_FLAGS=users) == (2, users)


@pytest.mark.parametrize(
    ("statement", "environment"),
    [
        ("config.batch_size = 3", {}),
        ("config.mesh.data = 1", {}),
        ("config.mesh.fsdp = 3; config.mesh.data = 1", {}),  # of two cores: the mesh is refused later, in its own words
        ("config.mesh.fsdp = 2", {}),  # beside data=-1, which takes what there is
        ("config.distill.workdir = 'runs/teacher'", {}),
        ("jax.devices()", {}),
        ("cores.processes.is_distributed = lambda: True", {}),
        ("cores.computes_on_cpu = lambda: False", {}),
        ("", {"JAX_NUM_CPU_DEVICES": "1"}),
    ],
)
def test_nothing_changes_where_the_number_is_decided_or_rows_do_not_divide(statement, environment):
    assert devices_after(statement, **environment) == (1, "None")


def test_flags_in_a_file_stay_a_file(tmp_path):
    (tmp_path / "flags").write_text("--xla_force_host_platform_device_count=3")
    assert devices_after(XLA_FLAGS=str(tmp_path / "flags")) == (3, str(tmp_path / "flags"))


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 1), ("200000 100000", 2), ("max 100000", 8), (None, 8)])
def test_a_containers_quota_counts(monkeypatch, tmp_path, quota, cores):
    if quota:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(platform, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(platform.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert platform.num_cores() == cores


@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_a_mesh_that_is_described_gets_its_devices(axis):
    assert devices_after(f"config.mesh.data = 1; config.mesh.{axis} = 2") == (2, PATIENCE)


def test_a_number_that_the_user_gives_stays():
    assert devices_after(JAX_NUM_CPU_DEVICES="4") == (4, PATIENCE)
    users = "--xla_force_host_platform_device_count=3"
    assert devices_after(XLA_FLAGS=users) == (3, f"{users} {PATIENCE}")


def test_a_resumed_run_says_that_other_devices_round_otherwise(tmp_path):
    flags = tiny_flags(data__files=write_text(tmp_path / "text.txt"), num_steps=2, batch_size=4, eval__batch_size=4)
    for devices, num_steps, said in ((2, 3, False), (2, 4, False), (1, 6, True)):
        given, environment = [*flags, f"--config.num_steps={num_steps}"], {"JAX_PLATFORMS": "cpu"}
        on = {"jax_num_cpu_devices": devices}
        ended = Training(tmp_path / "run", given, on, environment=environment).wait_or_kill(120)
        assert ended.status == 0, ended.err
        assert ("the steps before ran on [2 x CPU" in ended.err) == said


@pytest.mark.parametrize("asked", [{"JAX_PLATFORMS": "cpu "}, {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "0"}])
def test_a_jax_that_does_not_start_is_one_line(asked):
    command = [sys.executable, str(ROOT / "train.py"), "--dry_run"]
    ended = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    shown = " and ".join(f"{name}={value!r}" for name, value in asked.items())
    assert f"error: JAX does not start with {shown}: Unable to initialize backend" in ended.stderr


def test_a_run_on_all_cores_learns_what_one_on_one_device_learns_and_goes_on_with_as_many(tmp_path):
    text, environment = write_text(tmp_path / "text.txt"), {"JAX_PLATFORMS": "cpu"}
    flags = tiny_flags(data__files=text, num_steps=4, batch_size=4, eval__batch_size=4)
    number = num_devices(tiny_config(batch_size=4, eval__batch_size=4), 256, num_cores())
    losses = []
    for devices, jax_config in ((1, {"jax_num_cpu_devices": 1}), (number, {})):
        workdir = tmp_path / f"on{len(losses)}"
        ended = Training(workdir, flags, jax_config, environment=environment).wait_or_kill(120)
        assert ended.status == 0, ended.err
        assert f"; {devices} x cpu" in ended.err
        losses.append([line["loss"] for line in metrics_without_time(workdir) if "loss" in line])
    assert len(losses[0]) == 4
    np.testing.assert_allclose(*losses, rtol=1e-5)
    ended = Training(workdir, ["--config.num_steps=6"], environment=environment).wait_or_kill(120)
    assert f"; {number} x cpu" in ended.err and "resuming" in ended.err
