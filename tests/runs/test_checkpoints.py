import hashlib
import json
import logging
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.errors import UserError
from darkformer_jax.runs import manifest as manifest_module
from darkformer_jax.runs.checkpoints import Checkpoints, best_step
from darkformer_jax.runs.workdir import Workdir

# Also run in subprocesses: the state of a step is a function of the step, as in training.
STATE_OF = textwrap.dedent(
    """
    import jax, jax.numpy as jnp, numpy as np
    def state_of(step, size=64):
        rng = np.random.default_rng(step)
        return {
            "params": {
                "embed": jnp.asarray(rng.normal(size=(size, 8)), jnp.float32),
                "layers": {"w": jnp.asarray(rng.normal(size=(3, 8, 8)), jnp.bfloat16)},
            },
            "opt": {"count": jnp.asarray(step, jnp.int32), "mu": jnp.asarray(rng.normal(size=(7,)), jnp.float16)},
            "key": jnp.asarray(rng.integers(0, 2**32, 2), jnp.uint32),
            "step": jnp.asarray(step, jnp.int32),
        }
    """
)
exec(STATE_OF)
state_of: Any = globals()["state_of"]


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_identical(actual: Any, expected: Any) -> None:
    pairs = zip(*map(jax.tree_util.tree_leaves_with_path, (actual, expected)), strict=True)
    for (path, a), (expected_path, b) in pairs:
        assert path == expected_path
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    opened = Checkpoints(Workdir(tmp_path), keep=3, save_every=10)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with steps 1 and 2, to be copied by tests that damage it."""
    workdir = tmp_path_factory.mktemp("two_steps")
    opened = Checkpoints(Workdir(workdir), keep=3)
    for step in (1, 2):
        opened.save(step, state_of(step))
    opened.close()
    return workdir


def run_python(code: str, *arguments: object, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", STATE_OF + textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Round trips


def test_round_trip_is_exact_for_every_dtype(checkpoints: Checkpoints) -> None:
    state = {
        "float32": jnp.asarray([0.1, -0.0, jnp.inf, 1e-45], jnp.float32),
        "bfloat16": jnp.asarray([0.1, -3e38], jnp.bfloat16),
        "int32": jnp.asarray([-(2**31), 2**31 - 1], jnp.int32),
        "uint32": jnp.asarray([0, 2**32 - 1], jnp.uint32),
        "bool": jnp.asarray([True, False]),
        "nan": jnp.asarray(np.array([0x7FC00001, 0xFFC12345], np.uint32).view(np.float32)),
        "nested": {"scalar": jnp.asarray(7, jnp.int32), "by number": {0: jnp.ones(2)}},
    }
    checkpoints.save(5, state)
    step, restored = checkpoints.restore(abstract(state))
    assert step == 5
    assert_identical(restored, state)


def test_state_may_be_donated_while_it_is_being_saved(checkpoints: Checkpoints) -> None:
    step_fn = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = {"w": jnp.zeros((1024, 1024)), "step": jnp.asarray(0, jnp.int32)}
    checkpoints.save(0, state)
    for _ in range(20):
        state = step_fn(state)
    _, restored = checkpoints.restore(abstract(state))
    assert int(restored["step"]) == 0 and not np.asarray(restored["w"]).any()


def test_two_saves_in_quick_succession(checkpoints: Checkpoints) -> None:
    checkpoints.save(1, state_of(1))
    checkpoints.save(2, state_of(2))
    checkpoints.wait()
    assert checkpoints.committed_steps() == [1, 2]
    assert_identical(checkpoints.restore(abstract(state_of(0)), 1)[1], state_of(1))
    assert_identical(checkpoints.restore(abstract(state_of(0)))[1], state_of(2))


def test_part_of_a_checkpoint(checkpoints: Checkpoints) -> None:
    checkpoints.save(3, state_of(3))
    wanted = {"params": abstract(state_of(3)["params"])}
    step, restored = checkpoints.restore(wanted, partial=True)
    assert step == 3
    assert_identical(restored, {"params": state_of(3)["params"]})
    shapes = checkpoints.saved_shapes(3)
    assert shapes["params"]["layers"]["w"] == jax.ShapeDtypeStruct((3, 8, 8), jnp.bfloat16)


def test_due_depends_on_the_step_alone(tmp_path: Path) -> None:
    assert [step for step in range(1, 31) if Checkpoints(Workdir(tmp_path), 1, 10).due(step)] == [10, 20, 30]
    assert not Checkpoints(Workdir(tmp_path), 1, 0).due(10)


# What is kept


def test_newest_and_best_are_kept_and_the_others_removed(tmp_path: Path) -> None:
    opened = Checkpoints(Workdir(tmp_path), keep=2)
    for step, loss in ((1, 3.0), (2, 2.0), (3, None), (4, 2.5), (5, float("nan")), (6, 2.4)):
        opened.save(step, state_of(step), None if loss is None else {"heldout_loss": loss})
    opened.wait()
    assert opened.committed_steps() == [2, 5, 6]
    assert_identical(opened.restore(abstract(state_of(0)), 2)[1], state_of(2))
    opened.save(7, state_of(7), {"heldout_loss": 1.9})
    opened.close()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["6", "6.sha256.json", "7", "7.sha256.json"]


def test_the_best_may_be_the_smallest_of_another_metric(tmp_path: Path) -> None:
    opened = Checkpoints(Workdir(tmp_path), best="heldout_error")
    for step, error in ((1, 0.5), (2, 0.1), (3, 0.1), (4, 0.8)):
        opened.save(step, state_of(step), {"heldout_loss": float(step), "heldout_error": error})
    opened.close()
    assert opened.committed_steps() == [3, 4]  # of two that are best, the newest
    assert best_step(Workdir(tmp_path), "heldout_error") == 3
    assert best_step(Workdir(tmp_path), "heldout_accuracy") is None
    assert best_step(Workdir(tmp_path / "new"), "heldout_error") is None


def saved_metrics(workdir: Path, step: int) -> dict[str, float]:
    metrics: dict[str, float] = json.loads((workdir / "checkpoints" / f"{step}.sha256.json").read_text())["metrics"]
    return metrics


def test_what_a_step_carries_comes_back_bit_for_bit_and_stays_when_the_step_is_saved_again(tmp_path: Path) -> None:
    carried = {"means": {"weight": 1 / 3, "sums": {"loss": 0.1 + 0.2}}}
    opened = Checkpoints(Workdir(tmp_path), keep=2)
    opened.save(1, state_of(1))
    opened.save(2, state_of(2), carried=carried)
    opened.save(2, state_of(2), {"heldout_loss": 2.0})
    opened.close()
    assert (opened.carried(1), opened.carried(2)) == ({}, carried)


def test_saving_the_same_step_again(tmp_path: Path) -> None:
    opened = Checkpoints(Workdir(tmp_path))
    opened.save(4, state_of(4))
    opened.save(4, state_of(4), {"heldout_loss": 2.0})  # the loop's last save, after the evaluation
    opened.close()
    assert saved_metrics(tmp_path, 4) == {"heldout_loss": 2.0}
    resumed = Checkpoints(Workdir(tmp_path))
    resumed.restore(abstract(state_of(4)))
    resumed.save(4, state_of(4))
    resumed.save(4, state_of(4), {"heldout_loss": 1.5})
    resumed.save(5, state_of(5))
    resumed.close()
    assert resumed.committed_steps() == [4, 5]  # step 4 as the best, by a metric that came after it
    assert_identical(resumed.restore(abstract(state_of(0)), 4)[1], state_of(4))


def test_going_back_to_an_older_step_gives_up_the_newer_ones(tmp_path: Path) -> None:
    opened = Checkpoints(Workdir(tmp_path), keep=3)
    for step in (10, 20, 30):
        opened.save(step, state_of(step))
    opened.restore(abstract(state_of(0)), 10)
    opened.save(20, state_of(99))  # another continuation: its step 20 replaces the old one
    assert_identical(opened.restore(abstract(state_of(0)))[1], state_of(99))
    assert opened.committed_steps() == [10, 20]
    opened.close()


# Damage


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "emptied":
        path.write_bytes(b"" if content else b"x")  # a file that is empty by itself gets a byte instead
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2] if content else b"x")
    else:
        changed = bytearray(content or b"x")
        changed[len(changed) // 2] ^= 0x04
        path.write_bytes(changed)


@pytest.mark.parametrize("how", ["one flipped bit", "truncated", "emptied", "deleted"])
def test_damage_to_any_file_is_noticed(two_steps: Path, tmp_path: Path, how: str, caplog: Any) -> None:
    wanted = abstract(state_of(0))
    root = two_steps / "checkpoints"
    files = [path.relative_to(root) for path in sorted((root / "2").rglob("*")) if path.is_file()]
    files.append(Path("2.sha256.json"))
    assert len(files) > 6
    for number, file in enumerate(files):
        workdir = tmp_path / str(number)
        shutil.copytree(two_steps, workdir)
        damage(workdir / "checkpoints" / file, how)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="absl"):
            opened = Checkpoints(Workdir(workdir))
            step, restored = opened.restore(wanted)
        assert step == 1, file
        assert_identical(restored, state_of(1))
        name = file.name if len(file.parts) == 1 else file.relative_to("2").as_posix()
        messages = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
        assert len(messages) == 1 and "checkpoint step 2" in messages[0] and name in messages[0], messages
        reason = {"one flipped bit": "does not match|has changed|cannot be read|has 1 bytes", "deleted": "is missing"}
        assert re.search(reason.get(how, "bytes|cannot be read"), messages[0])
        opened.close()


def test_a_run_goes_on_from_the_older_step_and_replaces_the_damaged_one(two_steps: Path, tmp_path: Path) -> None:
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    root = tmp_path / "checkpoints"
    (root / "2" / "_METADATA").unlink()
    files = {path.relative_to(root / "2"): path.read_bytes() for path in (root / "2").rglob("*") if path.is_file()}
    opened = Checkpoints(Workdir(tmp_path), keep=1)
    assert opened.latest_good_step() == 1
    assert opened.restore(abstract(state_of(0)))[0] == 1
    assert sorted(os.listdir(root)) == ["1", "1.sha256.json", "2", "2.sha256.json"]  # reading moves nothing
    opened.save(2, state_of(2))
    step, restored = opened.restore(abstract(state_of(0)))
    assert step == 2 and opened.committed_steps() == [2]
    assert_identical(restored, state_of(2))
    opened.close()
    # What was damaged is the user's to delete.
    assert sorted(os.listdir(root)) == ["2", "2.damaged", "2.damaged.sha256.json", "2.sha256.json"]
    aside = root / "2.damaged"
    assert {path.relative_to(aside): path.read_bytes() for path in aside.rglob("*") if path.is_file()} == files


def test_damaged_steps_are_not_counted_among_the_newest_and_kept_aside(tmp_path: Path, caplog: Any) -> None:
    opened = Checkpoints(Workdir(tmp_path), keep=4)
    for step in (1, 2, 3, 4):
        opened.save(step, state_of(step), {"heldout_loss": float(step)})
    opened.close()
    root = tmp_path / "checkpoints"
    (root / "1.sha256.json").write_text("{}")  # the best one
    (root / "3.sha256.json").unlink()
    (root / "4" / "_METADATA").unlink()
    resumed = Checkpoints(Workdir(tmp_path), keep=1)
    assert resumed.restore(abstract(state_of(0)))[0] == 2
    resumed.save(5, state_of(5))
    assert resumed.latest_good_step() == 5 and resumed.committed_steps() == [1, 2, 5]
    with caplog.at_level(logging.WARNING, logger="absl"):
        resumed.save(6, state_of(6))
    resumed.close()
    assert resumed.committed_steps() == [2, 6]  # of those that have a loss and can be read, 2 is the best
    names = sorted(name for name in os.listdir(root) if "sha256" not in name)
    assert names == ["1.damaged", "2", "3.damaged", "4.damaged", "6"]
    assert f"what is left of the damaged step 1 is now {root}/1.damaged; remove it when you like" in caplog.text


def test_a_checkpoint_of_a_newer_version_is_refused_though_there_are_older_ones(
    two_steps: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoints" / "2.sha256.json"
    monkeypatch.setattr(manifest_module, "FORMAT", 2)
    manifest_module.write_manifest(path, 2, {"what": "this version cannot know"}, {}, {})
    monkeypatch.undo()
    opened = Checkpoints(Workdir(tmp_path))
    message = r"checkpoint step 2 in .* was saved by a newer version of darkformer_jax \(format 2, .* up to 1\)"
    for read in (opened.latest_good_step, opened.good_step, lambda: opened.good_step(2)):
        with pytest.raises(UserError, match=message):
            read()
    assert opened.good_step(1) == 1
    # A manifest that claims so by damage is damaged; one without the fields is of the first version.
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))
    assert opened.latest_good_step() == 1
    manifest = json.loads((tmp_path / "checkpoints" / "1.sha256.json").read_text())
    del manifest["format"], manifest["carried"], manifest["digest"]
    manifest["digest"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (tmp_path / "checkpoints" / "1.sha256.json").write_text(json.dumps(manifest))
    assert opened.latest_good_step() == 1 and opened.carried(1) == {}
    opened.close()


def test_only_damaged_checkpoints_are_an_error_and_nothing_starts_from_scratch(two_steps: Path, tmp_path: Path) -> None:
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    for step in (1, 2):
        (tmp_path / "checkpoints" / str(step) / "_METADATA").unlink()
    opened = Checkpoints(Workdir(tmp_path))
    for read in (opened.latest_good_step, lambda: opened.restore(abstract(state_of(0)))):
        with pytest.raises(UserError, match="damaged: step 2: file _METADATA is missing; step 1: file _METADATA"):
            read()
    with pytest.raises(UserError, match="checkpoint step 1 .* is damaged: .*_METADATA is missing"):
        opened.restore(abstract(state_of(0)), 1)
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"{step}.sha256.json").unlink()
    with pytest.raises(UserError, match="damaged: step 2: 2.sha256.json is missing; step 1: 1.sha256.json is missing"):
        opened.latest_good_step()
    opened.close()
    with pytest.raises(UserError, match="workdir s3://bucket/run: allowed: a local or mounted directory, or gs://"):
        Workdir("s3://bucket/run")


def test_no_checkpoint_is_an_error_that_names_the_directory_and_creates_nothing(tmp_path: Path) -> None:
    opened = Checkpoints(Workdir(tmp_path / "absent"))
    assert opened.latest_good_step() is None and opened.committed_steps() == []
    with pytest.raises(UserError, match="no checkpoint in .*absent/checkpoints"):
        opened.restore(abstract(state_of(0)))
    with pytest.raises(UserError, match="no checkpoint step 7 .*; there are: none"):
        opened.restore(abstract(state_of(0)), 7)
    opened.close()
    assert not (tmp_path / "absent").exists()


def test_stray_and_left_over_directories_are_not_steps(two_steps: Path, tmp_path: Path, caplog: Any) -> None:
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    root = tmp_path / "checkpoints"
    for name in ("3", "foo", "4.orbax-checkpoint-tmp", "007", "8"):
        (root / name).mkdir()
    for name in ("5", "1"):  # 5: committed by Orbax, killed before its manifest; 1: killed when its files were to go
        shutil.copytree(root / "2", root / name, dirs_exist_ok=True)
        (root / f"{name}.unfinished").touch()
    (root / "1.sha256.json").unlink()
    (root / "2.unfinished").touch()  # killed between its manifest and the end of its save
    (root / "6.sha256.json.tmp").write_text("{")
    (root / "2020").mkdir()
    (root / "2020" / "holiday.jpg").write_text("no checkpoint")
    before = sorted(root.rglob("*"))
    opened = Checkpoints(Workdir(tmp_path), keep=3)
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert opened.committed_steps() == [2] and opened.steps_without_manifest() == []
        assert opened.restore(abstract(state_of(0)))[0] == 2
        assert sorted(root.rglob("*")) == before  # reading removes nothing
        opened.save(3, state_of(3))
        opened.wait()
    assert not [record for record in caplog.records if record.name == "absl" and record.levelno >= logging.WARNING]
    assert_identical(opened.restore(abstract(state_of(0)))[1], state_of(3))
    opened.save(5, state_of(5))
    opened.save(2020, state_of(2020))
    opened.close()
    names = sorted(entry.name for entry in root.iterdir() if "sha256" not in entry.name)
    assert names == ["007", "2020", "2020.damaged", "3", "5", "8", "foo"]
    assert (root / "2020.damaged" / "holiday.jpg").read_text() == "no checkpoint"


def test_another_models_checkpoint_is_refused_by_name_and_shape(checkpoints: Checkpoints) -> None:
    checkpoints.save(1, state_of(1))
    wanted = abstract(state_of(1))
    wanted["params"]["embed"] = jax.ShapeDtypeStruct((64, 16), jnp.float32)
    wanted["params"]["geometry"] = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    wanted["step"] = jax.ShapeDtypeStruct((), jnp.uint32)
    del wanted["key"]
    with pytest.raises(UserError) as raised:
        checkpoints.restore(wanted)
    message = str(raised.value)
    assert "key: uint32[2] saved, nothing expected" in message
    assert "params/embed: float32[64, 8] saved, float32[64, 16] expected" in message
    assert "params/geometry: nothing saved, float32[8, 8] expected" in message
    assert "step: int32[] saved, uint32[] expected" in message
    assert "\n" not in message


# A disk that does not take it


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    opened = Checkpoints(Workdir(tmp_path))
    with pytest.raises(UserError, match=f"checkpoint step 1 could not be written to {tmp_path}/checkpoints: "):
        opened.save(1, state_of(1))
    opened.close()


def test_a_full_disk_is_noticed_before_anything_is_written(checkpoints: Checkpoints, monkeypatch: Any) -> None:
    checkpoints.save(1, state_of(1))
    checkpoints.wait()
    full = shutil.disk_usage("/")._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(UserError, match=r"checkpoint step 2: .*checkpoints has 0.0 MB free, 0.0 MB needed"):
        checkpoints.save(2, state_of(2))
    assert checkpoints.latest_good_step() == 1


def test_a_write_that_fails_in_the_background_is_raised_once_by_wait(tmp_path: Path) -> None:
    # A limit on the size of a file stands for the full disk: it needs no privileges.
    out = run_python(
        """
        import resource, signal, sys
        from darkformer_jax.errors import UserError
        from darkformer_jax.runs.checkpoints import Checkpoints
        from darkformer_jax.runs.workdir import Workdir
        opened = Checkpoints(Workdir(sys.argv[1]), keep=1)
        opened.save(1, state_of(1)); opened.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        opened.save(2, state_of(2, size=100_000))
        try:
            opened.wait()
        except UserError as error:
            print("refused:", error)
        opened.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print("good:", opened.latest_good_step())
        opened.save(2, state_of(2)); opened.wait()
        print("good:", opened.latest_good_step())
        opened.close()
        """,
        tmp_path,
    )
    refused, *good = out.strip().splitlines()
    assert f"refused: checkpoint step 2 could not be written to {tmp_path}/checkpoints: " in refused
    assert good == ["good: 1", "good: 2"]


# kill -9, other shardings, other processes


def test_kill_9_at_any_moment_loses_no_committed_step(tmp_path: Path) -> None:
    trainer = STATE_OF + textwrap.dedent(
        """
        import sys
        from darkformer_jax.runs.checkpoints import Checkpoints
        from darkformer_jax.runs.workdir import Workdir
        opened = Checkpoints(Workdir(sys.argv[1]), keep=2)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state_of(0, 20_000))
        step = 0
        if opened.committed_steps():
            step, state = opened.restore(abstract)
            assert (np.asarray(state["params"]["embed"]) == state_of(step, 20_000)["params"]["embed"]).all()
        print("started", flush=True)
        while True:
            step += 1
            opened.save(step, state_of(step, 20_000), {"heldout_loss": 1.0 + step})
        """
    )
    rng = random.Random(0)
    root = tmp_path / "checkpoints"

    def newest_manifest() -> int:
        return max((int(path.name.split(".")[0]) for path in root.glob("*.sha256.json")), default=0)

    good = 0
    for run in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", trainer, str(tmp_path)],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"started\n"  # restored what the last kill left
            deadline = time.monotonic() + 60
            while run > 0 and newest_manifest() <= good and time.monotonic() < deadline:
                time.sleep(0.01)  # on a busy machine, too, each run but the first gets a step further
            time.sleep(rng.uniform(0, 0.6))
            seen = newest_manifest()
            process.kill()
        reader = Checkpoints(Workdir(tmp_path))
        newest = reader.latest_good_step() or 0
        assert newest >= max(seen, good)
        for step in reader.committed_steps():
            if step >= newest - 1:  # an older one may have been in the middle of its removal
                assert_identical(reader.restore(abstract(state_of(0, 20_000)), step)[1], state_of(step, 20_000))
        reader.close()
        good = newest
    assert good >= 3
    # The next run tidies up after all the killed ones; step 1 has the best held-out loss.
    opened = Checkpoints(Workdir(tmp_path), keep=2)
    opened.restore(abstract(state_of(0, 20_000)))
    opened.save(good + 1, state_of(good + 1))
    opened.close()
    steps = [1, good, good + 1]
    assert sorted(os.listdir(root)) == sorted([str(s) for s in steps] + [f"{s}.sha256.json" for s in steps])


def test_restoring_onto_another_sharding(tmp_path: Path) -> None:
    code = """
        import sys
        from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
        from darkformer_jax.runs.checkpoints import Checkpoints
        from darkformer_jax.runs.workdir import Workdir
        def mesh(rows, columns, names):
            devices = np.array(jax.devices()[:rows * columns]).reshape(rows, columns)
            return Mesh(devices, names, axis_types=(AxisType.Auto,) * 2)
        eight, square = mesh(8, 1, ("data", "tensor")), mesh(2, 4, ("data", "tensor"))
        w = np.arange(16 * 8, dtype=np.float32).reshape(16, 8) / 3
        opened = Checkpoints(Workdir(sys.argv[1]))
        opened.save(1, {"w": jax.device_put(w, NamedSharding(eight, P("data"))),
                        "b": jax.device_put(w[0], NamedSharding(eight, P()))})
        opened.wait()
        for target in (NamedSharding(square, P("tensor", "data")), NamedSharding(eight, P()), None):
            _, state = opened.restore({"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=target),
                                       "b": jax.ShapeDtypeStruct(w[0].shape, w.dtype, sharding=target and
                                                                 NamedSharding(target.mesh, P("tensor")))})
            assert target is None or state["w"].sharding == target
            assert (np.asarray(state["w"]) == w).all() and (np.asarray(state["b"]) == w[0]).all()
        opened.close()
    """
    run_python(code, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    w = np.arange(16 * 8, dtype=np.float32).reshape(16, 8) / 3
    opened = Checkpoints(Workdir(tmp_path))  # and here, where there is one device
    _, state = opened.restore(opened.saved_shapes(1))
    assert (np.asarray(state["w"]) == w).all()
    opened.close()


def test_two_processes_share_one_checkpoint(tmp_path: Path) -> None:
    code = STATE_OF + textwrap.dedent(
        """
        import sys
        jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[3]))
        from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
        from darkformer_jax.runs.checkpoints import Checkpoints
        from darkformer_jax.runs.workdir import Workdir
        mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
        sharding = NamedSharding(mesh, P("data"))
        def state(step):
            whole = np.arange(8, dtype=np.float32) + step
            return {"w": jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])}
        opened = Checkpoints(Workdir(sys.argv[1]), keep=2)
        for step in (1, 2, 3):
            opened.save(step, state(step), {"heldout_loss": float(step)})
        opened.save(3, state(3), {"heldout_loss": 0.5})
        opened.wait()
        step, restored = opened.restore({"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)})
        assert step == 3
        for shard in restored["w"].addressable_shards:
            assert (np.asarray(shard.data) == (np.arange(8) + 3)[shard.index]).all()
        opened.close()
        """
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(port), str(index)],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=90)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    opened = Checkpoints(Workdir(tmp_path))
    assert saved_metrics(tmp_path, 3) == {"heldout_loss": 0.5}
    assert opened.committed_steps() == [1, 2, 3]  # step 1 was the best when 3 was saved
    _, state = opened.restore(opened.saved_shapes(3))
    assert (np.asarray(state["w"]) == np.arange(8) + 3).all()
    opened.close()


def test_the_manifest_is_plain_json_with_every_file(two_steps: Path) -> None:
    root = two_steps / "checkpoints"
    manifest = json.loads((root / "2.sha256.json").read_text())
    files = [path for path in (root / "2").rglob("*") if path.is_file()]
    assert manifest["step"] == 2
    assert {root / "2" / name: entry["bytes"] for name, entry in manifest["files"].items()} == {
        path: path.stat().st_size for path in files
    }
