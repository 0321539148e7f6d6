"""Workdirs in Google Cloud Storage, against an emulator of it that speaks its protocol on this machine.

They need the extra gcs and the emulator, which dev has.
"""

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.errors import Transient, UserError
from darkformer_jax.runs import mirror as mirror_module
from darkformer_jax.runs import store as bucket
from darkformer_jax.runs.checkpoints import Checkpoints
from darkformer_jax.runs.manifest import read_manifest
from darkformer_jax.runs.metrics import read_metrics
from darkformer_jax.runs.mirror import Mirror
from darkformer_jax.runs.store import file_system
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.training.stopping import Stopped, StopSignals
from tests.tiny_runs import (
    ROOT,
    Command,
    Training,
    free_port,
    metrics_without_time,
    run,
    saved_arrays,
    tiny_config,
    tiny_flags,
    write_text,
)

needs_emulator = pytest.mark.skipif(
    not (importlib.util.find_spec("gcsfs") and importlib.util.find_spec("gcp_storage_emulator")),
    reason="gcsfs and gcp-storage-emulator are not installed: launch/install.sh dev",
)
pytestmark = pytest.mark.standard_promotion
BUCKET = "bucket"
STORE = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT")


@pytest.fixture(scope="module")
def emulator() -> Iterator[None]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    for name in STORE[:2]:
        os.environ[name] = url
    # Before gcsfs is imported: it asks for the kind of a bucket by a protocol of its own, which the emulator has not.
    os.environ[STORE[2]] = "false"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    program = [sys.executable, str(ROOT / "tests/store/emulator.py"), str(port), BUCKET]
    with subprocess.Popen(program, **quiet) as server:
        while True:
            assert server.poll() is None
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield
        server.terminate()


@pytest.fixture
def url(emulator, request):
    """A new directory of the bucket."""
    return f"gs://{BUCKET}/runs/{re.sub('[^a-z]', '-', request.node.name)}"


def elsewhere() -> None:
    """As another machine, which has no local copies."""
    bucket.local_copy.cache_clear()


def state_of(step):
    return {"w": jnp.arange(40, dtype=jnp.float32) + step, "step": jnp.asarray(step, jnp.int32)}


def save(workdir, *steps):
    checkpoints = Checkpoints(Workdir(workdir), keep=2)
    for step in steps:
        checkpoints.save(step, state_of(step), {"heldout_loss": float(step)})
    checkpoints.close()


def newest(workdir):
    checkpoints = Checkpoints(Workdir(workdir))
    step, state = checkpoints.restore(checkpoints.saved_shapes(checkpoints.latest_good_step()))
    checkpoints.close()
    return step, state


@needs_emulator
def test_a_run_stopped_and_resumed_on_another_machine_equals_one_on_a_disk(tmp_path, url, monkeypatch):
    text = write_text(tmp_path / "text.txt")
    config = tiny_config(data__files=text, eval__every=6, eval__batches=1, checkpoint__every=4, num_steps=12)
    run(config, str(tmp_path / "disk"))
    with monkeypatch.context() as stopping:
        stopping.setattr(StopSignals, "to_stop", lambda self, step: signal.SIGTERM if step == 7 else None)
        with pytest.raises(Stopped):
            run(config, url)
    elsewhere()
    assert [line["step"] for line in read_metrics(Workdir(url)) if "loss" in line] == list(range(1, 8))
    run(config, url)
    elsewhere()
    assert metrics_without_time(Workdir(url).local) == metrics_without_time(tmp_path / "disk")
    assert saved_arrays(url) == saved_arrays(tmp_path / "disk")
    assert {path.name for path in Workdir(url).local.iterdir()} == {
        path.name for path in (tmp_path / "disk").iterdir() if not path.name.startswith(".")
    }
    with pytest.raises(UserError, match=f"{url} belongs to another experiment.*seed: 0 -> 1"):
        run(tiny_config(data__files=text, seed=1, eval__every=6, eval__batches=1), url)
    start_from = tiny_config(data__files=text, num_steps=3, init_from=url, optimizer__warmup_steps=1)
    run(start_from, str(tmp_path / "next"))  # a run on a disk that begins with the weights in the bucket


@needs_emulator
def test_two_processes_with_no_file_system_in_common(tmp_path, url):
    text = write_text(tmp_path / "text.txt")
    flags = tiny_flags(data__files=text, num_steps=4, checkpoint__every=2)
    alone = Training(tmp_path / "alone", flags)
    together = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", f"--workdir={url}"]
    together += ["--config.mesh.data=1", "--config.mesh.fsdp=2"]
    both = []
    for number in range(2):
        own = tmp_path / f"{number}"
        own.mkdir()
        argv = [*flags, *together, f"--process_id={number}"]
        store = {name: os.environ[name] for name in STORE}  # what starts the commands may be older than the emulator
        both.append(Command(str(ROOT / "train.py"), argv, own, environment=store | {"TMPDIR": str(own)}))
    assert [process.wait().status for process in both] == [0, 0], [process.wait().err for process in both]
    alone.assert_ends_well()
    ours, wanted = (
        [line["loss"] for line in read_metrics(Workdir(place)) if "loss" in line] for place in (url, alone.workdir)
    )
    np.testing.assert_allclose(ours, wanted, rtol=1e-5)
    assert newest_step(url) == 4


def newest_step(workdir):
    checkpoints = Checkpoints(Workdir(workdir))
    step = checkpoints.latest_good_step()
    checkpoints.close()
    return step


@needs_emulator
def test_old_steps_go_and_the_newest_and_the_best_stay(url):
    save(url, 1, 2, 3, 4)
    checkpoints = Checkpoints(Workdir(url))
    assert checkpoints.committed_steps() == [1, 3, 4]  # 1 is the best
    assert {name.split("/")[0] for name in bucket.objects(checkpoints.directory)} == {
        f"{step}{end}" for step in (1, 3, 4) for end in ("", ".sha256.json")
    }
    checkpoints.close()
    step, state = newest(url)
    assert step == 4 and np.array_equal(state["w"], state_of(4)["w"])


@needs_emulator
@pytest.mark.parametrize("end", [b"", b"\n", b"\r", b"\r\n", b"\n\r"])
def test_the_emulator_keeps_every_byte(url, end):
    file_system().pipe_file(f"{url}/file", b"content" + end)
    assert file_system().cat_file(f"{url}/file") == b"content" + end


@needs_emulator
@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "delete"])
def test_every_damaged_object_is_noticed(url, harm, caplog):
    save(url, 1, 2)
    files, prefix = file_system(), f"{url}/checkpoints/"
    names = [name for name in bucket.objects(prefix) if name.startswith("2")]
    assert len(names) > 8
    for name in names:
        good = files.cat_file(prefix + name)
        flipped = bytes([good[0] ^ 1]) + good[1:]
        if harm == "delete":
            files.rm_file(prefix + name)
        else:
            files.pipe_file(prefix + name, {"flip": flipped, "cut": good[: len(good) // 2], "empty": b""}[harm])
        assert newest_step(url) == 1, name
        files.pipe_file(prefix + name, good)
        assert files.cat_file(prefix + name) == good
        assert newest_step(url) == 2, name
    files.rm_file(prefix + names[-1])
    checkpoints = Checkpoints(Workdir(url), keep=2)
    assert checkpoints.latest_good_step() == 1
    checkpoints.save(2, state_of(2))
    checkpoints.close()
    assert "step 2 is now" in caplog.text and "2.damaged" in caplog.text
    assert newest_step(url) == 2


@needs_emulator
def test_a_checkpoint_may_be_copied_to_a_disk_and_back(url, tmp_path):
    save(url, 3)
    files = file_system()
    for source, target in ((url, tmp_path / "disk"), (tmp_path / "disk", url + "-again")):
        copy = files.get if str(source).startswith("gs:") else files.put
        copy(f"{source}/checkpoints/", f"{target}/checkpoints/", recursive=True)
        assert newest_step(target) == 3
    save(tmp_path / "written", 5)
    files.put(f"{tmp_path}/written/checkpoints/", f"{url}-moved/checkpoints/", recursive=True)
    assert newest_step(f"{url}-moved") == 5
    victim = next((tmp_path / "disk/checkpoints/3/d").iterdir())
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="does not match its md5"):
        newest_step(tmp_path / "disk")


@needs_emulator
def test_only_what_this_process_changes_is_uploaded(url, monkeypatch):
    files = file_system()
    files.pipe_file(f"{url}/config.json", b"{}")
    files.pipe_file(f"{url}/checkpoints/1/d", b"not copied")
    with Mirror(Workdir(url)) as mirror:
        copy = Workdir(url).local
        assert (copy / "config.json").read_bytes() == b"{}" and not list((copy / "checkpoints").iterdir())
        files.pipe_file(f"{url}/config.json", b"of process 0")
        (copy / "metrics.jsonl").write_text("1")
        (copy / ".lock").touch()
        (copy / "tensorboard").mkdir()
        (copy / "tensorboard/events").write_text("e")
        mirror.soon()
        assert not files.exists(f"{url}/metrics.jsonl")  # not so soon
        mirror.upload()
        monkeypatch.setattr(mirror_module, "_SECONDS_BETWEEN_UPLOADS", 0)
        (copy / "metrics.jsonl").write_text("12")
        mirror.soon()
    assert files.cat_file(f"{url}/metrics.jsonl") == b"12"
    assert files.cat_file(f"{url}/config.json") == b"of process 0"
    assert set(bucket.objects(url)) == {"checkpoints/1/d", "config.json", "metrics.jsonl", "tensorboard/events"}


@needs_emulator
def test_a_directory_that_is_no_runs_and_a_bucket_that_is_not_there(url, tmp_path):
    file_system().pipe_file(f"{url}/thesis/chapter.tex", b"x")
    config = tiny_config(data__files=write_text(tmp_path / "text.txt"))
    with pytest.raises(UserError, match="is not empty and has no config.json .it holds thesis"):
        run(config, url)
    file_system().pipe_file(f"{url}/object", b"x")
    with pytest.raises(UserError, match="/object is an object of the bucket, not a directory"):
        run(config, f"{url}/object")
    with pytest.raises(UserError, match="no-such-bucket/run cannot be read: .* is there a bucket no-such-bucket") as no:
        run(config, "gs://no-such-bucket/run")
    assert not isinstance(no.value, Transient)


@needs_emulator
def test_a_store_that_is_not_reached_is_not_an_absent_run(url, monkeypatch):
    save(url, 1)

    def refuse(*args, **kwargs):
        raise ConnectionError("Connection refused")

    monkeypatch.setattr(file_system(), "ls", refuse)
    for ask in (lambda url: Workdir(url).local, newest_step):
        with pytest.raises(Transient, match=f"{url}.* cannot be read: ConnectionError: Connection refused"):
            ask(url)


@pytest.mark.parametrize("error", [RuntimeError("503"), OSError("503")])  # gcsfs' own HttpError is no OSError
def test_a_manifest_that_the_store_does_not_bring_is_not_damage(error):
    class Manifest:
        def read_bytes(self):
            raise error

    with pytest.raises(Transient, match="cannot be read: .*503"):
        read_manifest(Manifest(), 1)
    error.code = 403
    with pytest.raises(UserError, match="cannot be read") as refused:
        read_manifest(Manifest(), 1)
    assert not isinstance(refused.value, Transient)


@pytest.mark.parametrize("workdir", ["gs://bucket/run#1", "gs://bucket/run?x=1", "gs://bucket/*"])
def test_names_that_the_libraries_read_as_something_else(workdir):
    with pytest.raises(UserError, match="may not be in the name of a bucket's directory"):
        Workdir(workdir)


@pytest.mark.parametrize("workdir", ["s3://bucket/run", "gs://bucket", "gs://bucket/", "gs:///run", "http://a/b"])
def test_urls_that_cannot_be_workdirs(workdir):
    with pytest.raises(UserError, match=f"workdir {workdir}: allowed: a local or mounted directory, or gs://"):
        Workdir(workdir)


def test_without_the_packages_for_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    file_system.cache_clear()
    with pytest.raises(UserError, match="gs:// needs the package gcsfs.*pip install gcsfs; or mount"):
        assert Workdir("gs://bucket/run").local
    file_system.cache_clear()


def test_a_path_is_where_it_is(tmp_path):
    workdir = Workdir(tmp_path)
    assert not workdir.is_remote and workdir.local == workdir.shared == tmp_path
    with Mirror(Workdir(tmp_path)) as mirror:
        mirror.soon()
        mirror.upload()
    shutil.rmtree(tmp_path)
