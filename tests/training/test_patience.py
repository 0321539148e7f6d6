"""Early stopping: the count of evaluations since the best one, and the runs that it ends."""

import json
import math
import shutil

import pytest

from darkformer_jax.runs.checkpoints import Checkpoints
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.training.patience import Patience
from tests.tiny_runs import Processes, metrics_without_time, run, saved_arrays, tiny_config, tiny_flags, write_text

LOSSES = [3.0, 2.0, 2.5, 1.5, 1.5, math.nan, 1.6]  # the best is the fourth; then three are no better

# A rate so large that the held-out loss soon stops falling.
EARLY = {
    "num_steps": 120,
    "eval__every": 5,
    "eval__batches": 1,
    "eval__patience": 3,
    "log__every": 3,
    "checkpoint__every": 0,  # so that only the best step and the last one are saved
    "checkpoint__keep": 1,
    "optimizer__learning_rate": 0.3,
}


def count(allowed, losses, carried=None):
    patience = Patience(allowed, "heldout_loss", carried or {})
    saved = [patience.evaluated(step, {"heldout_loss": loss}) for step, loss in losses]
    return patience, saved


@pytest.mark.parametrize(("allowed", "exhausted"), [(0, False), (1, True), (2, True), (3, True), (4, False)])
def test_a_run_ends_after_so_many_evaluations_that_are_no_better(allowed, exhausted):
    patience, saved = count(allowed, enumerate(LOSSES, start=1))
    assert (patience.best_step, patience.since, patience.exhausted) == (4, 3, exhausted)
    assert saved == [allowed > 0 and step in (1, 2, 4) for step in range(1, 8)]


@pytest.mark.parametrize("resumed_from", range(8))
def test_a_resumed_run_counts_on(resumed_from):
    steps = list(enumerate(LOSSES, start=1))
    first, _ = count(3, steps[:resumed_from])
    second, _ = count(3, steps[resumed_from:], json.loads(json.dumps(first.carried())))
    assert second.carried() == count(3, steps)[0].carried()


def stop_of(lines, patience):
    """(best step, the step after which the run ends) by the lines of metrics.jsonl."""
    best, since = (math.inf, 0), 0
    for line in lines:
        if "heldout_loss" in line:
            since = 0 if line["heldout_loss"] < best[0] else since + 1
            best = min(best, (line["heldout_loss"], line["step"]))
            if since == patience:
                return best[1], line["step"]
    raise AssertionError("it does not end early")


def test_a_run_that_is_no_better_for_a_while_ends_as_a_finished_run_and_keeps_its_best_step(tmp_path, capsys):
    fields = EARLY | {"data__files": write_text(tmp_path / "text.txt")}
    endless, workdir = tmp_path / "endless", tmp_path / "run"
    run(tiny_config(**fields | {"eval__patience": 0}), endless)
    best, last = stop_of(metrics_without_time(endless), 3)
    capsys.readouterr()
    run(tiny_config(**fields), workdir)
    said = f"\nstopped after step {last}: heldout_loss no better for 3 evaluations; best step {best}, kept "
    assert f"{said}(--step={best}); a larger eval.patience trains on\n" in capsys.readouterr().out
    assert Checkpoints(Workdir(workdir)).committed_steps() == [best, last]
    lines = metrics_without_time(workdir)
    *before, final = [line for line in metrics_without_time(endless) if line["step"] <= last]
    assert lines[:-1] == before
    # As at the end of any run, the last evaluation is on all held-out data.
    assert lines[-1]["step"] == last and lines[-1]["heldout_tokens"] > final["heldout_tokens"]

    # The same command again changes nothing.
    run(tiny_config(**fields), workdir)
    assert said in capsys.readouterr().out
    assert metrics_without_time(workdir) == lines

    # A run that resumes before its end ends after the same step.
    arrays = saved_arrays(workdir, last)
    for path in (workdir / "checkpoints").glob(f"{last}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run(tiny_config(**fields), workdir)
    printed = capsys.readouterr()
    assert f"resuming {workdir} from step {best}" in printed.err and said in printed.out
    assert metrics_without_time(workdir) == lines and saved_arrays(workdir, last) == arrays

    # With more patience it trains on.
    run(tiny_config(**fields | {"eval__patience": 99, "num_steps": last + 2}), workdir)
    printed = capsys.readouterr()
    assert f"resuming {workdir} from step {last}" in printed.err and "stopped after" not in printed.out
    assert Checkpoints(Workdir(workdir)).latest_good_step() == last + 2


def test_several_processes_end_after_the_same_step(tmp_path):
    fields = EARLY | {"data__files": write_text(tmp_path / "text.txt")}
    ended = Processes(2, tmp_path / "run", tiny_flags(**fields)).wait()
    assert [process.status for process in ended] == [0, 0], [process.err for process in ended]
    _, last = stop_of(metrics_without_time(tmp_path / "run"), 3)
    assert f"\nstopped after step {last}: " in ended[0].out
    assert Checkpoints(Workdir(tmp_path / "run")).latest_good_step() == last
