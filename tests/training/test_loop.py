import json
import logging
import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from darkformer_jax.errors import UserError
from darkformer_jax.runs.checkpoints import Checkpoints
from darkformer_jax.runs.manifest import write_manifest
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks import language_model
from darkformer_jax.training.goodput import read_sessions
from tests.tiny_runs import (
    READS_COMPILED,
    Training,
    metrics_without_time,
    run,
    saved_arrays,
    tiny_config,
    tiny_flags,
    write_text,
)

NUM_STEPS = 160
SURVIVAL = {
    "num_steps": NUM_STEPS,
    "checkpoint__every": 7,
    "checkpoint__keep": 2,
    "eval__every": 20,
    "eval__batches": 2,
    "log__every": 3,
    "accumulation_steps": 2,
    "model__attention__redraw_every": 10,
}


def training(workdir, text, jax_config=None):
    return Training(workdir, tiny_flags(**SURVIVAL | {"data__files": text}), jax_config)


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text.txt")


@pytest.fixture(scope="module")
def survival_text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def unbroken(survival_text, tmp_path_factory):
    """The workdir of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    training(workdir, survival_text).assert_ends_well()
    return workdir


def assert_equal_runs(workdir, unbroken):
    lines, wanted = metrics_without_time(workdir), metrics_without_time(unbroken)
    assert lines == wanted
    assert [line["step"] for line in lines if "loss" in line] == [*range(3, NUM_STEPS, 3), NUM_STEPS]
    assert [line["step"] for line in lines if "heldout_loss" in line] == list(range(20, NUM_STEPS + 1, 20))
    arrays, wanted_arrays = saved_arrays(workdir, NUM_STEPS), saved_arrays(unbroken, NUM_STEPS)
    assert len(wanted_arrays) > 30
    assert arrays == wanted_arrays
    assert json.loads((workdir / "config.json").read_text()) == json.loads((unbroken / "config.json").read_text())


def test_kill_9_at_five_random_moments_and_resume_equals_the_unbroken_run(tmp_path, survival_text, unbroken):
    workdir, moments = tmp_path / "killed", random.Random(17)
    resumed_from = []
    for first, last in ((1, 6), (15, 35), (50, 70), (85, 105), (120, 135)):
        child = training(workdir, survival_text, READS_COMPILED)
        child.until(moments.randint(first, last))
        if first == 50:
            child.until_saving()
        else:
            time.sleep(moments.uniform(0, 0.03))
        assert child.stop(signal.SIGKILL) == -signal.SIGKILL
        resumed_from += child.resumed_from()
    child = training(workdir, survival_text)
    child.assert_ends_well()
    resumed_from += child.resumed_from()
    assert len(set(resumed_from)) >= 4  # of five: the first kill may come before a checkpoint
    assert_equal_runs(workdir, unbroken)


def test_signals_to_stop_save_say_so_and_resume_to_the_unbroken_run(tmp_path, survival_text, unbroken):
    workdir, moments = tmp_path / "stopped", random.Random(18)
    for signum, status, first, last in (
        (signal.SIGTERM, 143, 10, 30),
        (signal.SIGINT, 130, 45, 60),
        (signal.SIGHUP, 129, 75, 90),
        (signal.SIGUSR1, 138, 105, 120),
    ):
        child = training(workdir, survival_text)
        child.until(moments.randint(first, last))
        time.sleep(moments.uniform(0, 0.03))
        assert child.stop(signum) == status, child.said
        step = Checkpoints(Workdir(workdir)).latest_good_step()
        assert child.said[-1] == f"{signal.Signals(signum).name}: saved step {step}; the same command resumes there"
        assert first <= step < NUM_STEPS
    child = training(workdir, survival_text)
    child.assert_ends_well()
    assert child.resumed_from() == [step]
    assert_equal_runs(workdir, unbroken)


def test_the_loss_curve_is_there_before_the_run_ends(tmp_path, text):
    child = Training(tmp_path / "run", tiny_flags(data__files=text, num_steps=9999, eval__every=5), READS_COMPILED)
    child.until(6)
    assert child.stop(signal.SIGTERM) == 143, child.said
    assert (tmp_path / "run" / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_two_devices_of_a_machine_with_two_cores_train_with_orthogonal_projections(tmp_path, text):
    flags = tiny_flags(
        num_steps=3,
        data__files=text,
        model__head_dim=64,
        model__attention__projections="orthogonal",
        model__attention__num_features=64,
        model__attention__redraw_every=2,
    )
    # PJRT_NPROC is the number of XLA's threads, otherwise that of the cores. Its other flags are as users have them.
    environment = {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": "2", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    ended = Training(tmp_path / "run", flags, environment=environment).wait_or_kill(120)
    assert ended.status == 0, ended.err
    assert "; 2 x cpu" in ended.err
    assert [line["step"] for line in metrics_without_time(tmp_path / "run") if "loss" in line] == [1, 2, 3]


def test_what_a_run_leaves_behind(tmp_path, text, capsys, monkeypatch):
    config = tiny_config(
        data__files=text,
        checkpoint__every=3,
        checkpoint__keep=1,
        eval__every=4,
        log__every=2,
        sample__prompts=("def ", "é"),
        sample__max_new_tokens=5,
    )
    workdir = tmp_path / "run"
    run(config, str(workdir))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "loss" in line, "heldout_loss" in line) for line in lines] == [
        (2, True, False),
        (4, True, False),
        (4, False, True),
        (6, True, False),
        (8, True, False),
        (8, False, True),
    ]
    for line in lines:
        assert all(np.isfinite(value) for name, value in line.items() if name != "time")
        if "loss" in line:
            assert line.keys() >= {"accuracy", "grad_norm", "learning_rate", "tokens", "z_loss", "time"}
            assert line["time"]["tokens_per_second"] > 0 and line["time"]["host_memory_bytes"] > 1e6
        else:
            assert line.keys() == {
                "step", "heldout_loss", "heldout_bits_per_byte", "heldout_accuracy", "heldout_tokens",
            }  # fmt: skip
    assert Checkpoints(Workdir(workdir)).committed_steps() == [8]
    assert json.loads((workdir / "config.json").read_text())["model"]["attention"]["kind"] == "dark"
    assert (workdir / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (workdir / "tokenizer.bytes").exists()
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))
    samples = (workdir / "samples.txt").read_text()
    assert samples.startswith("--- 'def '\ndef ") and "--- 'é'\né" in samples
    printed = capsys.readouterr()
    said = ("held out (", "\ngoodput: ", "this model", samples, "\nloss curve: ", "\nmore samples: ")
    places = [printed.out.index(line) for line in said]
    assert places == sorted(places)
    assert " in 1 start, were steps that count; the rest: starting " in printed.out
    assert "gzip -9" in printed.out and "xz -9" in printed.out
    bits = lines[-1]["heldout_bits_per_byte"]
    assert f"bits per byte {bits:.4f}" in printed.out and f"this model {bits:.3f}" in printed.out
    assert "step 8/8" in printed.err

    # The same command again changes nothing and reports once more; a longer run goes on.
    before = (workdir / "metrics.jsonl").read_bytes()
    run(config, str(workdir))
    assert (workdir / "metrics.jsonl").read_bytes() == before
    printed = capsys.readouterr()
    assert f"this model {bits:.3f}" in printed.out and f"resuming {workdir} from step 8" in printed.err
    config.num_steps = 10
    monkeypatch.setattr("darkformer_jax.training.run.environment", lambda: {"hardware": "another", "version": "newer"})
    run(config, str(workdir))
    first, second = (session["facts"] for session in read_sessions(Workdir(workdir)))
    assert first["parameters"] == first["trained"] > 1000 and " training tokens, " in first["data"]
    assert first["hardware"].startswith(f"{len(jax.devices())} x CPU; ") and jax.__version__ in first["version"]
    assert second == first | {"hardware": "another", "version": "newer"}
    assert [line["step"] for line in metrics_without_time(workdir)] == [2, 4, 4, 6, 8, 8, 10, 10]
    assert json.loads((workdir / "config.json").read_text())["num_steps"] == 10


def test_a_line_has_the_mean_of_every_step_since_the_last_line_also_where_a_run_stopped_in_between(tmp_path):
    text = write_text(tmp_path / "text.txt", 700)  # so little that a row of every epoch has padding
    fields = {"data__files": text, "eval__every": 0, "checkpoint__every": 4, "checkpoint__keep": 9}
    run(tiny_config(**fields), str(tmp_path / "each"))
    steps = metrics_without_time(tmp_path / "each")[:-1]
    assert len({line["tokens"] for line in steps}) > 1  # else a mean over steps would do
    fields["log__every"] = 3
    run(tiny_config(**fields), str(tmp_path / "unbroken"))
    lines = metrics_without_time(tmp_path / "unbroken")
    assert [line["step"] for line in lines] == [3, 6, 8, 8]
    for line, since in zip(lines, (steps[:3], steps[3:6], steps[6:]), strict=False):
        tokens = [step["tokens"] for step in since]
        for name in ("loss", "accuracy", "z_loss"):
            assert line[name] == pytest.approx(np.average([step[name] for step in since], weights=tokens), rel=1e-12)
            assert line[name] != since[-1][name]
        for name in ("tokens", "grad_norm", "learning_rate"):
            assert line[name] == since[-1][name]

    # Resumed from step 4, between the lines of steps 3 and 6.
    manifest_path = tmp_path / "unbroken" / "checkpoints" / "4.sha256.json"
    for carries in (True, False):
        workdir = tmp_path / f"resumed-{carries}"
        shutil.copytree(tmp_path / "unbroken", workdir)
        for path in (workdir / "checkpoints").glob("8*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not carries:  # as an earlier version saved it: the line begins where the run resumed
            manifest = json.loads(manifest_path.read_text())
            files, metrics = manifest["files"], manifest["metrics"]
            write_manifest(workdir / "checkpoints" / "4.sha256.json", 4, files, metrics, {})
            tokens = [step["tokens"] for step in steps[4:6]]
            for name in ("loss", "accuracy", "z_loss"):
                lines[1][name] = pytest.approx(np.average([s[name] for s in steps[4:6]], weights=tokens), rel=1e-12)
        run(tiny_config(**fields), str(workdir))
        assert metrics_without_time(workdir) == lines


def poisoned(train_batches, bad_step):
    """Batches of which one step's is NaN."""

    def batches(stream, *, start_step=0, **options):
        for step, batch in enumerate(train_batches(stream, start_step=start_step, **options), start=start_step + 1):
            yield batch | {"weights": batch["weights"] * np.float32("nan")} if step == bad_step else batch

    return batches


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_checkpoint(tmp_path, text, monkeypatch):
    config = tiny_config(data__files=text, checkpoint__every=3, checkpoint__keep=1, eval__every=0)
    monkeypatch.setattr(language_model, "train_batches", poisoned(language_model.train_batches, 6))
    with pytest.raises(UserError, match=f"step 6: loss is nan; stopped .* last checkpoint is step 3 in {tmp_path}"):
        run(config, str(tmp_path / "run"))
    assert Checkpoints(Workdir(tmp_path / "run")).latest_good_step() == 3
    assert Checkpoints(Workdir(tmp_path / "run")).committed_steps() == [3]
    lines = metrics_without_time(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] is None for line in lines] == [False] * 5 + [True]  # what tells it from a run that was stopped


def test_a_step_between_saves_that_is_not_finite_is_named_too(tmp_path, text, monkeypatch):
    config = tiny_config(data__files=text, checkpoint__every=0, eval__every=0, log__every=5)
    monkeypatch.setattr(language_model, "train_batches", poisoned(language_model.train_batches, 2))
    with pytest.raises(UserError, match=r"step 2: loss is nan; .* last checkpoint is step \(none\)"):
        run(config, str(tmp_path / "run"))


def test_weights_that_overflow_are_not_saved_though_their_step_had_a_finite_loss(tmp_path, text):
    config = tiny_config(
        data__files=text,
        checkpoint__every=1,
        eval__every=0,
        optimizer__warmup_steps=0,
        optimizer__learning_rate=3e38,
        optimizer__weight_decay=1e3,
    )
    with pytest.raises(UserError, match=r"step 1: held-out loss is (nan|inf)"):
        run(config, str(tmp_path / "run"))
    assert Checkpoints(Workdir(tmp_path / "run")).committed_steps() == []
    assert [line["step"] for line in metrics_without_time(tmp_path / "run")] == [1]


def test_damaged_or_lost_checkpoints_and_other_data(tmp_path, text, caplog):
    config = tiny_config(data__files=text, num_steps=9, checkpoint__every=3, log__every=1)
    workdir = tmp_path / "run"
    run(config, str(workdir))
    metrics, arrays, root = metrics_without_time(workdir), saved_arrays(workdir, 9), workdir / "checkpoints"

    # The newest good step is used, what is damaged named and kept, and the run ends as it did.
    (root / "6.sha256.json").unlink()
    (root / "9" / "_METADATA").write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="absl"):
        run(config, str(workdir))
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "damaged" in line] == [
        f"checkpoint step 9 in {root} is damaged and not used: file _METADATA has 0 bytes, "
        f"{(root / '9' / '_METADATA').stat().st_size} were written",
        f"checkpoint step 6 in {root} is damaged and not used: 6.sha256.json is missing",
        f"what is left of the damaged step 6 is now {root}/6.damaged; remove it when you like",
        f"what is left of the damaged step 9 is now {root}/9.damaged; remove it when you like",
    ]
    assert metrics_without_time(workdir) == metrics and saved_arrays(workdir, 9) == arrays
    assert Checkpoints(Workdir(workdir)).committed_steps() == [3, 6, 9]

    def files():
        return {path: path.read_bytes() for path in sorted(workdir.rglob("*")) if path.is_file()}

    config.num_steps = 6
    before = files()
    with Workdir(workdir).lock(), pytest.raises(UserError, match="is in use by another run"):
        run(config, str(workdir))
    with pytest.raises(UserError, match=r"num_steps = 6, but .* is at step 9 already"):
        run(config, str(workdir))
    config.num_steps = 9
    for step in (3, 6, 9):
        (root / f"{step}.sha256.json").unlink()
        del before[root / f"{step}.sha256.json"]
    with pytest.raises(UserError, match=f"every checkpoint in {root} is damaged: step 9: 9.sha256.json is missing; "):
        run(config, str(workdir))
    assert files() == before
    shutil.rmtree(root)
    before = files()
    with pytest.raises(UserError, match=f"metrics up to step 9, but no checkpoint in {root}; bring"):
        run(config, str(workdir))
    assert files() == before
    with open(text, "a") as file:
        file.write("one more document")
    with pytest.raises(UserError, match="was trained on other data"):
        run(config, str(workdir))
    assert files() == before


def test_the_step_that_is_compiled_has_no_speed(tmp_path, capsys):
    text = write_text(tmp_path / "text.txt")
    run(tiny_config(data__files=text, num_steps=3, model__attention__kind="softmax"), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["time"].keys() & {"tokens_per_second", "step_seconds"} for line in lines if "time" in line]
    assert [len(names) for names in speeds] == [0, 2, 2]
    first, second = (line for line in capsys.readouterr().err.splitlines() if line.startswith(("step 1/3", "step 2/3")))
    assert "tok/s" not in first and "tok/s" in second
