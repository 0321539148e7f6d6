"""launch/gke.sh: its manifest, read back as Kubernetes reads it, and what it refuses."""

import os
import re
import subprocess

import pytest
import yaml

from tests.launch.shell import NASTY, ROOT, dry_run, launch, refusal, write_program

RUN = ("run", "--name=lm", "--image=gcr.io/p/d:1", "--claim=runs")
TPU = ("--tpu=tpu-v5-lite-podslice", "--topology=4x4")
GPU = ("--gpu=nvidia-h100-80gb",)
TRAIN = ("--", "--workdir=/runs/lm", *NASTY)


def rendered(*arguments: str) -> tuple[dict, dict, dict]:
    """The JobSet, its job's and its pod's spec."""
    manifest, _, command = dry_run("gke.sh", *arguments).partition("# the above is the input of:\n")
    assert command == "kubectl create -f -\n"
    job_set = yaml.safe_load(manifest)
    (replicated,) = job_set["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    return job_set, job, job["template"]["spec"]


def expanded(text: str) -> str:
    """What Kubernetes makes of a command's or a variable's text: $(NAME) is a variable's value, $$ is $."""
    assert not re.search(r"(?<!\$)(\$\$)*\$\(", text)
    return text.replace("$$", "$")


def test_tpu_manifest():
    job_set, job, pod = rendered(*RUN, *TPU, "--slices=2", "--spot", '--env=NOTE=$(x) "q"', *TRAIN)
    assert job_set["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and job_set["metadata"]["name"] == "lm"
    assert job_set["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert job_set["spec"]["failurePolicy"] == {
        "maxRestarts": 100,
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    assert job_set["spec"]["replicatedJobs"][0]["replicas"] == 2
    assert (job["parallelism"], job["completions"], job["completionMode"], job["backoffLimit"]) == (4, 4, "Indexed", 0)
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    assert pod["restartPolicy"] == "Never" and pod["securityContext"] == {"runAsUser": 0}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]} == {
        "runs": "/runs",
        "shared-memory": "/dev/shm",
    }
    assert pod["volumes"][1] == {"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}}
    variables = {variable["name"]: expanded(variable["value"]) for variable in container["env"]}
    assert variables == {"JAX_PLATFORMS": "tpu,cpu", "NOTE": '$(x) "q"'}
    assert [expanded(word) for word in container["command"]] == [".venv/bin/python", "-u", "train.py", *TRAIN[1:]]


@pytest.mark.parametrize(
    ("topology", "chips", "pods", "per_pod"), [("1x1", (), 1, 1), ("2x4", ("--chips=8",), 1, 8), ("4x4x8", (), 32, 4)]
)
def test_one_pod_a_node(topology, chips, pods, per_pod):
    _, job, pod = rendered(*RUN, "--tpu=tpu-v5p-slice", f"--topology={topology}", *chips, *TRAIN)
    assert job["parallelism"] == job["completions"] == pods
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": per_pod}


def test_gpu_processes_are_told_who_they_are(tmp_path):
    job_set, job, pod = rendered(*RUN, *GPU, "--nodes=4", *TRAIN)
    assert "annotations" not in job_set["metadata"] and "tolerations" not in pod
    assert (job["parallelism"], pod["containers"][0]["resources"]["limits"]) == (4, {"nvidia.com/gpu": 8})
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    user = re.search(r"^USER (\d+)$", (ROOT / "launch/Dockerfile").read_text(), re.MULTILINE)[1]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["fsGroup"] == int(user) > 0

    write_program(tmp_path / ".venv" / "bin" / "python", 'printf "%s\\0" "$@"\n')
    command = [expanded(word) for word in pod["containers"][0]["command"]]
    environment = os.environ | {"JOB_COMPLETION_INDEX": "3"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == [
        "-u",
        "train.py",
        *TRAIN[1:],
        "--coordinator=lm-train-0-0.lm:8476",
        "--num_processes=4",
        "--process_id=3",
    ]
    _, _, in_a_bucket = rendered(*RUN[:-1], *GPU, "--", "--workdir=gs://b/lm")
    assert [volume["name"] for volume in in_a_bucket["volumes"]] == ["shared-memory"]
    assert [mount["name"] for mount in in_a_bucket["containers"][0]["volumeMounts"]] == ["shared-memory"]
    _, _, alone = rendered(*RUN, *GPU, *TRAIN)
    assert [expanded(word) for word in alone["containers"][0]["command"]][1:] == ["-u", "train.py", *TRAIN[1:]]


def test_kubectl_gets_the_manifest_and_the_rest(tmp_path):
    write_program(tmp_path / "kubectl", f"echo \"$*\" >>'{tmp_path}/calls'\n[ -t 0 ] || cat >'{tmp_path}/input'\n")
    run = (*RUN, "--namespace=ml", *TPU)
    assert launch("gke.sh", *run, *TRAIN, stand_ins=tmp_path).returncode == 0
    printed = dry_run("gke.sh", *run, *TRAIN)
    assert printed.startswith((tmp_path / "input").read_text()) and (tmp_path / "input").stat().st_size > 1000
    assert launch("gke.sh", "follow", "--name=lm", stand_ins=tmp_path).returncode == 0
    assert launch("gke.sh", "delete", "--name=lm", "--confirm=lm", stand_ins=tmp_path).returncode == 0
    assert launch("gke.sh", "delete", "--name=lm", "--confirm=l", stand_ins=tmp_path).returncode == 2
    assert (tmp_path / "calls").read_text().splitlines() == [
        "--namespace=ml create -f -",
        "logs --follow --tail=100 --selector=jobset.sigs.k8s.io/jobset-name=lm,jobset.sigs.k8s.io/job-index=0,"
        "batch.kubernetes.io/job-completion-index=0",
        "delete jobset lm",
    ]


def test_refused_flags():
    for arguments, expected in [
        ((), "the command is missing before the flags; allowed: run follow delete"),
        (("create",), "'create' is no command; allowed: run follow delete"),
        (("run",), "--name is missing"),
        (("run", "--name=lm"), "--image is missing"),
        (("run", "--name=9lm"), "--name=9lm: lower case letters"),
        (("run", "--name=" + "l" * 41), "41 characters, at most 40"),
        ((*RUN, *TRAIN), "--tpu and --gpu: give one of the two"),
        ((*RUN, *TPU, *GPU, *TRAIN), "--tpu and --gpu: give one of the two"),
        ((*RUN, *TPU[:1], *TRAIN), "--topology is missing"),
        ((*RUN, *TPU[:1], "--topology=16", *TRAIN), "--topology=16: the form is AxB or AxBxC"),
        ((*RUN, *TPU[:1], "--topology=4xb", *TRAIN), "--topology=4xb: "),
        ((*RUN, *TPU, "--chips=3", *TRAIN), "--chips=3 does not divide the 16 chips of --topology=4x4"),
        ((*RUN, *GPU, "--topology=4x4", *TRAIN), "--topology and --chips are for --tpu"),
        ((*RUN, *GPU, "--nodes=two", *TRAIN), "--nodes=two: not a positive whole number"),
        ((*RUN, *GPU, "--image=a b", *TRAIN), "--image=a b: letters, digits and"),
        ((*RUN, *GPU), "--workdir is missing after --"),
        ((*RUN[:-1], *GPU, *TRAIN), "--claim is missing"),
        ((*RUN, *GPU, "--", "--workdir=/mnt/lm"), "--workdir=/mnt/lm is not in --mount=/runs"),
        (
            (*RUN, *GPU, "--", "--workdir=gs://b"),
            "--workdir=gs://b: must be a directory that all machines share, or gs://",
        ),
        ((*RUN, *GPU, "--", "--workdir=gs://b/lm"), "--claim=runs: not used with --workdir=gs://b/lm"),
        ((*RUN, "--workers=3"), "--workers: there is no such flag here; allowed: --name="),
        (("delete", "--name=lm"), "delete needs --confirm=lm where nobody can be asked"),
        (("follow", "--name=lm", *TRAIN), "follow takes no flags of train.py"),
    ]:
        assert expected in refusal("gke.sh", *arguments)
