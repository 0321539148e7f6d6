import jax
import numpy as np
import pytest

from darkformer_jax.config.specs import model_spec
from darkformer_jax.distributed.sharding import Part
from darkformer_jax.model.network import Network
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.regression import Regression
from darkformer_jax.training.evaluation import make_eval_step, measure
from darkformer_jax.training.experiment import Experiment
from tests.tasks.labelled_files import labelled_config, write_labelled

WHOLE = Part(0, 1)


@pytest.fixture
def task(tmp_path):
    config = labelled_config(write_labelled(tmp_path / "a.jsonl", (0.5, 3)), task__name="regression")
    return Regression.load(config, Workdir(tmp_path / "run"))


def test_the_loss_is_the_squared_error_of_the_real_examples(task):
    network = Network.of(model_spec(task.config, task.objective.vocab_size, task.objective.num_outputs))
    arrays = network.init(jax.random.key(0))
    batch = next(task.train_batches(0, WHOLE))
    batch["weights"][0] = 0
    (loss, _), (_, rows) = jax.jit(
        lambda batch: (
            task.objective.loss(network.bind(*arrays), batch, None),
            task.objective.measure(network.bind(*arrays), batch),
        )
    )(batch)
    wanted = np.sum((np.asarray(rows["predicted"]) - batch["labels"])[1:] ** 2)
    assert set(batch["labels"].tolist()) <= {0.5, 3.0}
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)


def test_correlations_are_of_every_held_out_example_and_of_no_padding(task):
    experiment = Experiment.of(task.config, task.objective)
    state = experiment.initial_state()
    step = make_eval_step(experiment.network, task.objective, experiment.mesh)
    batches = list(task.heldout_batches(0, WHOLE))
    sums, rows = measure(step, state.params, state.projections, batches, experiment.batch_sharding)
    assert len(rows["weights"]) > len(task.heldout) == int(rows["weights"].sum())
    evaluation = task.evaluation(sums, rows)
    predicted, labels = rows["predicted"][: len(task.heldout)], task.heldout.labels
    assert evaluation.loss == pytest.approx(float(np.mean((predicted - labels) ** 2)), rel=1e-5)
    assert evaluation.correlations.pearson == pytest.approx(float(np.corrcoef(predicted, labels)[0, 1]), rel=1e-4)
    assert set(evaluation.as_metrics()) == {"heldout_loss", "heldout_pearson", "heldout_spearman"}


def test_the_report_sets_the_model_beside_a_bag_of_bytes_and_the_mean(task, capsys):
    labels = task.heldout.labels
    rows = {"labels": labels, "predicted": labels, "weights": np.ones_like(labels)}
    evaluation = task.evaluation({"squared_error": np.array(0.0), "weight": np.array(float(len(labels)))}, rows)
    task.report(None, {}, {}, Workdir("runs/a"), evaluation)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["this", "model", "0.0000", "1.0000", "1.0000"]
    assert lines[2].startswith("bag of bytes") and float(lines[2].split()[-2]) > 0.9
    assert lines[3].split()[:3] == ["always", "the", "mean"] and lines[3].split()[-2:] == ["0.0000", "0.0000"]
