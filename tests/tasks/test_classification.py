import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from darkformer_jax.cli.progress import progress_bar
from darkformer_jax.config.specs import model_spec
from darkformer_jax.data.labelled import LABELS_FILE, load_class_names, save_class_names
from darkformer_jax.distributed.sharding import Part
from darkformer_jax.errors import UserError
from darkformer_jax.model.network import Network
from darkformer_jax.model.trainable import trained_paths
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.classification import Classes, ClassEvaluation, Classification
from darkformer_jax.tasks.scores import class_scores
from darkformer_jax.tasks.task import ScoreRequest
from darkformer_jax.training.evaluation import make_eval_step, measure, put_batch
from darkformer_jax.training.experiment import Experiment
from darkformer_jax.training.step import make_state_init, make_train_step
from tests.tasks.labelled_files import labelled_config, write_labelled
from tests.tiny_runs import fresh_state, on_eight_devices, write_workdir

pytestmark = pytest.mark.standard_promotion

WHOLE = Part(0, 1)


@pytest.fixture
def task(tmp_path):
    config = labelled_config(write_labelled(tmp_path / "mails.jsonl"))
    return Classification.load(config, Workdir(tmp_path / "run"))


def network_of(task):
    return Network.of(model_spec(task.config, task.objective.vocab_size, task.objective.num_outputs))


def test_the_loss_is_the_cross_entropy_of_the_real_examples(task):
    network = network_of(task)
    arrays = network.init(jax.random.key(0))
    batch = next(task.train_batches(0, WHOLE))
    batch["weights"][1] = 0
    loss, sums = jax.jit(lambda batch: task.objective.loss(network.bind(*arrays), batch, None))(batch)
    logits = np.asarray(
        jax.jit(lambda b: network.bind(*arrays).outputs(b["inputs"], b["segment_ids"], b["positions"]))(batch)
    )
    kept = np.array([0, 2, 3])
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = -log_softmax[kept, batch["labels"][kept]].sum()
    assert float(loss) == pytest.approx(wanted, rel=1e-5) and float(sums["weight"]) == 3
    assert float(sums["correct"]) == (logits.argmax(-1) == batch["labels"])[kept].sum()


def test_accumulation_divides_by_the_total_of_examples(task):
    network, sgd = network_of(task), optax.sgd(0.1)
    trained = trained_paths(network, "all")
    batch = next(task.train_batches(0, WHOLE))
    batch["weights"] = np.array([1, 0, 0, 0], np.float32)  # micro-batches of one example and of none
    state = jax.jit(make_state_init(network, sgd, 0, trained))()
    ends = []
    for accumulation_steps in (1, 2):
        step = make_train_step(
            network,
            task.objective,
            sgd,
            optax.constant_schedule(0.1),
            accumulation_steps=accumulation_steps,
            redraw_every=0,
            trained=trained,
        )
        ends.append(jax.jit(step)(state, batch))
    for one, other in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_held_out_figures_count_every_example_once(task):
    experiment = Experiment.of(task.config, task.objective)
    state = experiment.initial_state()
    step = make_eval_step(experiment.network, task.objective, experiment.mesh)
    arrays = (state.params, state.projections)
    measured = measure(step, *arrays, task.heldout_batches(0, WHOLE), experiment.batch_sharding)
    evaluation = task.evaluation(*measured)
    rows = task.heldout.read(np.arange(len(task.heldout)))
    model = experiment.network.bind(*arrays)
    logits = model.outputs(
        jnp.asarray(rows["inputs"]), jnp.asarray(rows["segment_ids"]), jnp.asarray(rows["positions"])
    )
    right = np.asarray(logits).argmax(-1) == rows["labels"]
    assert evaluation.confusion.sum() == len(task.heldout)
    assert evaluation.scores.accuracy == pytest.approx(right.mean())
    assert set(evaluation.as_metrics()) == {"heldout_loss", "heldout_accuracy", "heldout_f1", "heldout_matthews"}
    assert "F1 of 'spam'" in str(evaluation)


def few_steps(directory, **mesh):
    """[loss, gradient norm] of some steps."""
    config = labelled_config(write_labelled(Path(directory) / "mails.jsonl"), **mesh)
    task = Classification.load(config, Workdir(Path(directory) / "run"))
    experiment = Experiment.of(config, task.objective, jax.devices()[: 8 if mesh else 1])
    batches = task.train_batches(0, experiment.part)
    result = []
    with jax.set_mesh(experiment.mesh):
        state, step = experiment.initial_state(), experiment.train_step()
        for _ in range(3):
            state, metrics = step(state, put_batch(next(batches), experiment.batch_sharding))
            result.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return result


def test_eight_devices_that_share_sequences_train_as_one_does(tmp_path):
    code = "import json; from tests.tasks.test_classification import few_steps"
    code += f"; print(json.dumps(few_steps({str(tmp_path)!r}, mesh__data=4, mesh__context=2)))"
    (tmp_path / "program.py").write_text(code)
    ended = on_eight_devices(tmp_path / "program.py", tmp_path).wait()
    assert ended.status == 0, ended.err
    np.testing.assert_allclose(json.loads(ended.out.splitlines()[-1]), few_steps(tmp_path), rtol=1e-5)


def test_a_dry_run_needs_no_workdir_and_gives_the_objective_of_the_run(task):
    assert Classification.objective_of(task.config) == task.objective == Classes(257, 32, ("ham", "spam"))


def test_the_report_sets_the_model_beside_a_bag_of_bytes_and_the_commonest_class(task, capsys):
    perfect = {"nll": np.array(1.0), "weight": np.array(10.0), "confusion": np.diag([6.0, 4.0])}
    evaluation = task.evaluation(perfect, {})
    task.report(network_of(task), {}, {}, Workdir("runs/mails"), evaluation)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["accuracy", "F1", "of", "'spam'", "Matthews"]
    assert lines[1].split() == ["this", "model", "1.0000", "1.0000", "1.0000"]
    assert [line[:12] for line in lines[2:4]] == ["bag of bytes", "always 'ham'"]
    share = np.mean(task.heldout.labels == 0)
    assert lines[3].split()[2:] == [f"{share:.4f}", "0.0000", "0.0000"]


def test_control_characters_of_labels_do_not_reach_the_terminal_and_long_labels_are_cut():
    confusion, names = np.eye(2), ("ham\n\x1b[31m", "x" * 5000)
    evaluation = ClassEvaluation(0.5, class_scores(confusion), confusion, names)
    name, _ = Classes(257, 32, names).constant(np.array([0, 0, 1]))
    lines = [*evaluation.details(), str(evaluation), name]
    assert all(line.isprintable() and len(line) < 150 for line in lines)
    assert lines[1].startswith(r"ham\n\x1b[31m ") and f"F1 of '{'x' * 40}...'" in str(evaluation)


def test_the_fingerprint_of_the_data_changes_with_either_split(task):
    others = (dataclasses.replace(task, train=task.heldout), dataclasses.replace(task, heldout=task.train))
    begins = {each.fingerprints["data"][:12] for each in (task, *others)}  # what a message shows
    assert len(begins) == 3


def test_the_classes_are_saved_and_others_are_refused(task, tmp_path):
    workdir = Workdir(tmp_path / "run")
    workdir.local.mkdir()
    task.save(workdir)
    assert load_class_names(workdir.local) == ("ham", "spam") and (workdir / LABELS_FILE).exists()
    assert Classification.load(task.config, workdir).objective == task.objective
    write_labelled(tmp_path / "mails.jsonl", ("good", "bad"))
    with pytest.raises(UserError, match=r"was trained on the labels ham, spam; .*mails.jsonl has bad, good"):
        Classification.load(task.config, workdir)


def test_names_of_another_checkpoint_are_refused(task, tmp_path):
    workdir = Workdir(tmp_path / "run")
    write_workdir(workdir.local, task.config, fresh_state(Experiment.of(task.config, task.objective)))
    save_class_names(workdir.local, ("a", "b", "c"))
    request = ScoreRequest(task.config.data.files, 4, None, None, None, None)
    with pytest.raises(UserError, match="run: its checkpoint has 2 outputs per text, its classification 3; allowed"):
        Classification.score(workdir, None, request, progress_bar)


def test_fewer_examples_than_a_batch_are_refused(task, tmp_path):
    task.config.batch_size = 100
    with pytest.raises(UserError, match=r"mails.jsonl has \d\d training examples, fewer than batch_size = 100"):
        Classification.load(task.config, Workdir(tmp_path / "run"))


def test_the_line_that_a_run_begins_with_tells_what_the_model_does_not_see(tmp_path):
    config = labelled_config(write_labelled(tmp_path / "mails.jsonl"), sequence_length=16)
    line = str(Classification.load(config, Workdir(tmp_path / "run")))
    assert "training examples" in line and "% are cut at 16" in line and "0.0%" not in line
