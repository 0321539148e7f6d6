"""configs/glue.py: a task of GLUE from the weights of a language model."""

import json

import pytest

from configs import glue
from darkformer_jax.config.validation import validate
from darkformer_jax.data.glue import GLUE_TASKS, write_glue
from darkformer_jax.errors import UserError
from darkformer_jax.runs.inherit import inherit
from darkformer_jax.runs.workdir import Workdir
from tests.data.test_glue import FILES, release
from tests.tiny_runs import metrics_without_time, run, tiny_config, write_workdir

pytestmark = pytest.mark.standard_promotion


@pytest.mark.parametrize("kind", ["softmax", "dark"])
@pytest.mark.parametrize("name", GLUE_TASKS)
def test_every_task_has_its_files_epochs_and_a_head(tmp_path, name, kind):
    Workdir(tmp_path / "source").write_config(tiny_config().to_dict())
    config = glue.get_config(f"task={name},attention={kind}")
    config.init_from = str(tmp_path / "source")
    config = inherit(config, Workdir(tmp_path / "own"))
    validate(config)
    assert config.task.name == ("regression" if name == "stsb" else "classification")
    assert config.model.attention.kind == kind and config.model.embed_dim == tiny_config().model.embed_dim
    assert config.task.heldout_files.startswith(f"data/{name}/dev")
    epochs = config.num_steps * config.batch_size / GLUE_TASKS[name].train_size
    assert (5 if name in ("mrpc", "rte") else 3) >= epochs > 2.9


def test_a_pair_task_trains_from_a_language_model(tmp_path):
    head, row = FILES["rte"][:2]
    more = [row.replace("entailment", label) for label in ("entailment", "not_entailment") for _ in range(8)]
    own = release(tmp_path, "rte", more)
    (own / "dev.tsv").write_text("\n".join([head, *more]) + "\n")
    write_glue(str(tmp_path / "data"), "rte", str(tmp_path))
    write_workdir(tmp_path / "lm", tiny_config())
    given = f"task=rte,files={tmp_path / 'data'},init_from={tmp_path / 'lm'}"
    config = glue.get_config(f"{given},batch=4,length=16,window=8,chunk=8,m=8,steps=2")
    run(config, tmp_path / "run")
    last = metrics_without_time(tmp_path / "run")[-1]
    assert last["step"] == 2 and "heldout_accuracy" in last and "heldout_matthews" in last
    assert json.loads((tmp_path / "run" / "labels.json").read_text()) == {"labels": ["entailment", "not_entailment"]}


@pytest.mark.parametrize("arguments", ["task=cola", "task=cola,steps=100", "task=cola,batch=8", "task=cola,steps=5"])
def test_a_tenth_of_the_steps_are_warm_up_however_many_there_are(arguments):
    config = glue.get_config(arguments)
    assert config.optimizer.warmup_steps == config.num_steps // 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("task=snli", "task=snli; allowed: one of cola, sst2"),
        ("task=cola,attention=dark,attention=softmax", "attention=dark,softmax; allowed: one of dark, softmax"),
        ("task=cola,attention=foo", "attention=foo; allowed: one of dark, softmax"),
    ],
)
def test_another_task_or_mechanism_is_refused_and_so_are_two(arguments, message):
    with pytest.raises(UserError, match=f"configs/glue.py: {message}"):
        glue.get_config(arguments)
