"""launch/slurm.sh: its batch script, what it refuses, and when a job is queued again, with stand-ins for Slurm."""

import shutil
import signal
import subprocess
import time

import pytest

from tests.launch.shell import NASTY, ROOT, dry_run, launch, refusal, write_program

SIZE = ("--nodes=2", "--gpus=8", "--time=24:00:00")
TRAIN = ("--", "--config=configs/lm_1b.py", "--workdir=runs/lm")

SRUN = """
while [[ "$1" == --* ]]; do shift; done
[ ! -e slow ] || { touch running; sleep 0.3; }
"$@"
"""


def test_one_process_a_gpu_queued_again_with_its_log_kept():
    printed = dry_run("slurm.sh", *SIZE, "--partition=a100", "--cpus=12", "--directive=--gres=x --mem=0", *TRAIN)
    lines = printed.splitlines()
    assert lines[1] == "#!/usr/bin/env bash"
    assert [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")] == [
        "--job-name=darkformer",
        "--nodes=2",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--cpus-per-task=12",
        "--time=24:00:00",
        "--partition=a100",
        "--gres=x --mem=0",
        "--requeue",
        "--signal=TERM@120",
        "--open-mode=append",
        "--output=runs/slurm/%x-%j.log",
    ]
    assert "export SRUN_CPUS_PER_TASK=12" in printed
    train = ".venv/bin/python -u train.py --config=configs/lm_1b.py --workdir=runs/lm"
    assert f"\nsrun --kill-on-bad-exit=0 --wait=120 {train}\n" in printed


def test_refused_flags():
    for arguments, expected in [
        (SIZE[1:], "--nodes is missing"),
        ((*SIZE[:2], *TRAIN), "--time is missing"),
        ((*SIZE, "--gpus=all", *TRAIN), "--gpus=all: not a positive whole number"),
        ((*SIZE, "--cpus=1.5", *TRAIN), "--cpus=1.5: not a positive whole number"),
        ((*SIZE, "--node=2", *TRAIN), "--node: there is no such flag here; allowed: --name= --nodes="),
        ((*SIZE, "--account=my lab", *TRAIN), "--account=my lab: no spaces"),
        ((*SIZE, "--name=a/b", *TRAIN), "--name=a/b: no / and no %"),
        (SIZE, "--workdir is missing after --"),
        (
            (*SIZE, "--", "--workdir=s3://b/lm"),
            "--workdir=s3://b/lm: must be a directory that all machines share, or gs://",
        ),
        ((*SIZE, *TRAIN), "sbatch is not on this machine"),
    ]:
        assert expected in refusal("slurm.sh", *arguments)


@pytest.fixture
def cluster(tmp_path):
    """A clone and a Slurm whose srun runs one process, which ends with the status in the file "status"."""
    clone = tmp_path / "my clone"
    shutil.copytree(ROOT / "launch", clone / "launch")
    write_program(clone / ".venv" / "bin" / "python", 'printf "%s\\0" "$@" "$NOTE" >arguments\nexit "$(cat status)"\n')
    write_program(tmp_path / "bin" / "sbatch", f"cat >'{tmp_path}/job'\necho Submitted batch job 7\n")
    write_program(tmp_path / "bin" / "srun", SRUN)
    write_program(tmp_path / "bin" / "scontrol", 'echo "$*" >>queued\n')
    return clone, tmp_path


def test_the_job_is_queued_again_only_after_the_time_limit(cluster):
    clone, there = cluster
    train = ("--workdir=/shared/my runs", *NASTY)
    done = launch("slurm.sh", *SIZE, "--env=NOTE=it's", "--", *train, root=clone, stand_ins=there / "bin")
    assert (done.returncode, done.stdout) == (0, "Submitted batch job 7\n")
    assert (clone / "runs" / "slurm").is_dir()

    def start() -> "subprocess.Popen[bytes]":
        environment = {"PATH": f"{there}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
        return subprocess.Popen(["bash", str(there / "job")], env=environment, cwd="/")

    for status, queued in [(0, False), (2, False), (137, False), (138, True), (143, True)]:
        (clone / "status").write_text(str(status))
        assert start().wait(timeout=20) == status
        assert (clone / "queued").exists() == queued
        if queued:
            assert (clone / "queued").read_text() == "requeue 7\n"
            (clone / "queued").unlink()
    assert (clone / "arguments").read_text().split("\0")[:-1] == ["-u", "train.py", *train, "it's"]

    (clone / "slow").touch()  # scancel, or a preemption: the batch script gets the signal as well
    (clone / "arguments").unlink()
    job = start()
    end = time.monotonic() + 20
    while not (clone / "running").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=20) == 143
    assert (clone / "arguments").exists()  # the processes were waited for
    assert not (clone / "queued").exists()
