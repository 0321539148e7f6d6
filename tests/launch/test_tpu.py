"""launch/tpu.sh: the commands it prints, what it refuses, and a whole life of a run with a stand-in for gcloud."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.shell import NASTY, ROOT, dry_run, launch, refusal, write_program

NAMED = ("--name=lm", "--zone=us-east5-b")
TPUS = "gcloud compute tpus queued-resources"
TRAIN = ("--", "--config=configs/lm_1b.py", "--workdir=/mnt/runs/lm")


def test_create_prints_the_request():
    printed = dry_run("tpu.sh", "create", *NAMED, "--type=v5litepod-16", "--spot", "--project=p")
    assert printed.splitlines() == [
        f"{TPUS} create lm --node-id=lm --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot"
        " --zone=us-east5-b --project=p",
        "# every 30 s, until the state is ACTIVE:",
        f"{TPUS} list '--filter=name~(^|/)lm$' '--format=value(state.state)' --zone=us-east5-b --project=p",
    ]
    slices = dry_run("tpu.sh", "create", *NAMED, "--type=v6e-256", "--slices=2", "--runtime=mine")
    assert " --node-count=2 --node-prefix=lm --accelerator-type=v6e-256 --runtime-version=mine " in slices


def test_setup_run_and_the_rest_reach_all_workers():
    lines = dry_run("tpu.sh", "setup", *NAMED, "--prepare=sudo mount 10.0.0.2:/runs '/mnt/my runs'").splitlines()
    everywhere = "--node=all --worker=all"
    assert lines[1] == f"{TPUS} scp /tmp/darkformer_jax.tar.gz lm: {everywhere} --zone=us-east5-b"
    assert lines[-1] == (
        f"{TPUS} ssh lm {everywhere} '--command=cd darkformer_jax && bash launch/worker.sh install' --zone=us-east5-b"
    )
    assert "bash -ec" in lines[-2] and "/mnt/my runs" in lines[-2]
    assert dry_run("tpu.sh", "run", *NAMED, "--env=N=--a", *TRAIN) == (
        f"{TPUS} ssh lm {everywhere} '--command=cd darkformer_jax && bash launch/worker.sh start N=--a --"
        " --config=configs/lm_1b.py --workdir=/mnt/runs/lm' --zone=us-east5-b\n"
    )
    assert dry_run("tpu.sh", "follow", *NAMED, "--slice=1", "--worker=3") == (
        f"{TPUS} ssh lm --node=1 --worker=3 '--command=bash darkformer_jax/launch/worker.sh follow' --zone=us-east5-b\n"
    )
    for command in ("stop", "kill"):
        assert f"{everywhere} '--command=cd darkformer_jax && bash launch/worker.sh {command}'" in dry_run(
            "tpu.sh", command, *NAMED
        )
    assert dry_run("tpu.sh", "delete", *NAMED) == f"{TPUS} delete lm --force --quiet --zone=us-east5-b\n"


def test_retry_is_delete_create_setup_and_run():
    retry = dry_run("tpu.sh", "retry", *NAMED, "--type=v5p-128", "--spot", "--prepare=true", *TRAIN).splitlines()
    parts = [
        dry_run("tpu.sh", "delete", *NAMED),
        dry_run("tpu.sh", "create", *NAMED, "--type=v5p-128", "--spot"),
        dry_run("tpu.sh", "setup", *NAMED, "--prepare=true"),
        dry_run("tpu.sh", "run", *NAMED, *TRAIN),
    ]
    assert retry[2:] == "".join(parts).splitlines()


def test_refused_flags():
    run = ("run", *NAMED)
    for arguments, expected in [
        ((), "the command is missing before the flags; allowed: create setup run follow stop kill retry delete"),
        (("destroy",), "'destroy' is no command; allowed: create"),
        (("create", "--zone=z"), "--name is missing"),
        (("create", "--name=lm"), "--zone is missing"),
        (("create", *NAMED), "--type is missing"),
        (("create", *NAMED, "--type=v9-8"), "--type=v9-8: no image known for it; known are v2-N"),
        (("create", *NAMED, "--type=v6e-8", "--slices=0"), "--slices=0: not a positive whole number"),
        (("create", *NAMED, "--type="), "--type= has no value"),
        (("create", *NAMED, "--type"), "--type has no value; write --type=..."),
        (("create", *NAMED, "--spot=yes"), "--spot: there is no such flag here; allowed: --name="),
        (("create", *NAMED, "v6e-8"), "'v6e-8' is no flag"),
        (("create", "--name=My_Run", "--zone=z"), "--name=My_Run: lower case letters, digits and -"),
        (("setup", *NAMED, "--type=v6e-8"), "--type: there is no such flag here"),
        (("setup", *NAMED, *TRAIN), "setup takes no flags of train.py"),
        (run, "--workdir is missing after --"),
        ((*run, "--", "--workdir"), "--workdir is missing after --"),
        (
            (*run, "--", "--workdir=runs/lm"),
            "--workdir=runs/lm: on TPU VMs it must be gs://BUCKET/NAME, or an",
        ),
        (
            (*run, "--", "--workdir", "runs/lm"),
            "--workdir=runs/lm: on TPU VMs it must be gs://BUCKET/NAME, or an",
        ),
        (
            (*run, "--", "--workdir=s3://b/lm"),
            "--workdir=s3://b/lm: must be a directory that all machines share, or gs://",
        ),
        ((*run, "--env=A", *TRAIN), "--env=A: the form is --env=NAME=VALUE"),
        ((*run, "--env", *TRAIN), "--env: the form is --env=NAME=VALUE"),
        (("delete", *NAMED), "delete needs --confirm=lm where nobody can be asked"),
        (("delete", *NAMED, "--confirm=ln"), "--confirm=ln is not the name lm; nothing was deleted"),
    ]:
        assert expected in refusal("tpu.sh", *arguments)


# --- a whole life ----------------------------------------------------------------------------------------------------

GCLOUD = """
shift 3
echo "$1" >>calls
case "$1" in
    list) [ ! -e state ] || cat state ;;
    create) echo ACTIVE >state ;;
    delete) rm state ;;
    scp) cp "$2" worker ;;
    ssh)
        for argument; do case "$argument" in --command=*) command="${argument#--command=}" ;; esac; done
        case "$command" in *"worker.sh install") exit ;; esac
        cd worker && exec bash -c "$command"
        ;;
esac
"""
PYTHON = """
printf '%s\\0' "$@" >arguments
printf '%s %s\\n' "$JAX_PLATFORMS" "${NOTE:-}" >variables
trap 'echo saved; exit 143' TERM
echo started
while :; do sleep 0.02; done
"""


@pytest.fixture
def cloud(tmp_path: Path):
    """A clone with a tracked, a deleted, a new and an ignored file; a cloud with one worker; and tpu.sh itself."""
    clone = tmp_path / "my clone"
    shutil.copytree(ROOT / "launch", clone / "launch")
    for name, text in {"train.py": "# committed", "gone.py": "", ".gitignore": "/ignored\n", "ignored": ""}.items():
        (clone / name).write_text(text)
    subprocess.run(["git", "init", "--quiet"], cwd=clone, check=True)
    subprocess.run(["git", "add", "."], cwd=clone, check=True)
    (clone / "train.py").write_text("# changed since")
    (clone / "gone.py").unlink()
    (clone / "my config.py").write_text("")

    (tmp_path / "worker").mkdir()
    write_program(tmp_path / "bin" / "gcloud", f"cd '{tmp_path}'\n" + GCLOUD)
    write_program(tmp_path / "worker" / "darkformer_jax" / ".venv" / "bin" / "python", PYTHON)

    def call(*arguments: str, code: int = 0) -> str:
        done = launch("tpu.sh", *arguments, root=clone, stand_ins=tmp_path / "bin")
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    yield tmp_path, call
    call("kill", *NAMED)


def wait_for(path: Path, text: str) -> None:
    end = time.monotonic() + 20
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < end, f"{path} has no {text!r}"
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="launch/worker.sh is for TPU VMs, which run Linux")
def test_from_create_through_a_preemption_to_delete(cloud):
    there, call = cloud
    worker = there / "worker" / "darkformer_jax"
    train = ("--env=NOTE=a 'b' $c", "--", "--workdir=/mnt/my runs", *NASTY)

    call("create", *NAMED, "--type=v5litepod-16")
    call("setup", *NAMED, "--prepare=echo 'it''s' >prepared; false; echo no >prepared", code=1)
    assert (worker / "prepared").read_text() == "its\n"  # the first error ends it
    call("setup", *NAMED)
    assert (worker / "train.py").read_text() == "# changed since"
    assert (worker / "my config.py").exists() and not (worker / "ignored").exists()
    (there / "my clone" / "my config.py").rename(there / "my clone" / "renamed.py")
    (worker / "mine").touch()
    call("setup", *NAMED)  # what was sent before is gone, what was made there stays
    assert {"renamed.py", "mine"} <= {path.name for path in worker.iterdir()}
    assert not (worker / "my config.py").exists()

    call("run", *NAMED, *train)
    wait_for(worker / "train.log", "started")
    assert (worker / "arguments").read_text().split("\0")[:-1] == ["-u", "train.py", *train[2:]]
    assert (worker / "variables").read_text() == "tpu,cpu a 'b' $c\n"
    assert "still runs; stop it first" in call("run", *NAMED, *train, code=2)
    retry = ("retry", *NAMED, "--type=v5litepod-16", *train)
    assert "is ACTIVE, its machines were not taken" in call(*retry, code=2)

    call("stop", *NAMED)
    assert "saved" in call("follow", *NAMED)
    assert "nothing runs" in call("stop", *NAMED)

    (there / "state").write_text("SUSPENDED\n")
    (there / "calls").unlink()
    (worker / "arguments").unlink()
    call(*retry)
    assert (there / "calls").read_text().split("\n")[:5] == ["list", "delete", "list", "create", "list"]
    assert (there / "calls").read_text().split("\n")[5:-1] == ["scp", "ssh", "ssh", "ssh"]
    wait_for(worker / "arguments", "/mnt/my runs")
    assert "killed" in call("kill", *NAMED)
    assert (worker / "train.log").read_text().count("saved") == 1  # the first time; SIGKILL saves nothing

    call("delete", *NAMED, "--confirm=other", code=2)
    assert (there / "state").exists()
    call("delete", *NAMED, "--confirm=lm")
    assert not (there / "state").exists()


def test_create_waits_through_a_failed_question_until_active_or_failed(tmp_path):
    write_program(tmp_path / "sleep", "exit 0\n")
    answer = f"cd '{tmp_path}'\nset -e\nstate=\"$(head -n 1 states)\"\nsed -i.old 1d states\n"
    write_program(
        tmp_path / "gcloud",
        f'[ "$4" = list ] || exit 0\n{answer}[ "$state" != broken ] || exit 1\necho "$state"\n',
    )
    create = ("create", *NAMED, "--type=v6e-8")
    (tmp_path / "states").write_text("\nWAITING_FOR_RESOURCES\nbroken\nWAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    done = launch("tpu.sh", *create, stand_ins=tmp_path)
    assert done.returncode == 0
    said = [line.partition("lm is ")[2].partition(";")[0] for line in done.stderr.splitlines() if "lm is" in line]
    assert said == ["not there yet", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]

    for states, message in [("FAILED", "lm is FAILED, not ACTIVE"), ("broken\nbroken", "cannot tell the state of lm")]:
        (tmp_path / "states").write_text(states + "\n")
        done = launch("tpu.sh", *create, stand_ins=tmp_path)
        assert done.returncode == 2 and message in done.stderr.splitlines()[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="launch/worker.sh is for TPU VMs, which run Linux")
def test_a_worker_with_an_old_python_gets_one_from_uv(tmp_path):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    write_program(tmp_path / "launch" / "install.sh", 'echo "$1 with ${PYTHON:-the default}"\n')
    for name in ("python3", "python3.11", "python3.12"):
        write_program(tmp_path / "bin" / name, f'echo "$*" >>"{tmp_path}/calls"\necho Python 3.10.12\n')
    write_program(tmp_path / ".local" / "bin" / "uv", 'echo "$*" >&2\n[ "$2" = install ] || echo /there/python3.12\n')

    done = launch("worker.sh", "install", root=tmp_path, stand_ins=tmp_path / "bin", HOME=str(tmp_path))
    assert done.stdout.splitlines()[-1] == "tpu with /there/python3.12"
    assert done.stderr.splitlines()[-2:] == ["python install --quiet 3.12", "python find 3.12"]
    assert "-m pip install --user --quiet uv" in (tmp_path / "calls").read_text()

    write_program(tmp_path / "bin" / "python3.12", "echo Python 3.12.3\n")
    done = launch("worker.sh", "install", root=tmp_path, stand_ins=tmp_path / "bin", HOME=str(tmp_path))
    assert (done.stdout, done.stderr) == ("tpu with the default\n", "")
