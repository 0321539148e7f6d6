import json
from types import SimpleNamespace

import numpy as np
import pytest

from configs import classify
from darkformer_jax import evaluate, generate, report
from darkformer_jax.config.validation import validate
from darkformer_jax.data.labelled import Columns, split_examples
from darkformer_jax.errors import UserError
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.classification import Classification
from darkformer_jax.tasks.language_model import LanguageModel
from darkformer_jax.training.run import dry_run
from tests.tasks.labelled_files import labelled_config, write_labelled
from tests.tiny_runs import metrics_without_time, run, saved_arrays, tiny_config, write_text, write_workdir

pytestmark = pytest.mark.standard_promotion


def score(workdir, text, **flags):
    given = [f"--{name}={value}" for name, value in {"workdir": workdir, "text": text, **flags}.items()]
    return evaluate.evaluate(evaluate.parse_flags(["evaluate", *given]))


def continue_text(workdir):
    options = {"step": None, "prompts_file": None, "max_new_tokens": 1, "temperature": 0.0, "top_k": 0, "top_p": 1.0}
    options |= {"prompt": ["a"], "seed": 0, "chat": False, "special_tokens": False}
    generate.generate(SimpleNamespace(**options, workdir=str(workdir)))


@pytest.mark.parametrize(
    ("kind", "causal", "pooling"),
    [
        ("dark", True, "last"),
        ("dark", False, "mean"),
        ("softmax", False, "last"),
        ("nystromformer", False, "mean"),
    ],
)
def test_a_classifier_learns_and_a_file_is_scored_as_in_training(tmp_path, capsys, kind, causal, pooling):
    files = write_labelled(tmp_path / "mails.jsonl", count=120)
    config = labelled_config(
        files,
        model__attention__kind=kind,
        model__causal=causal,
        task__pooling=pooling,
        num_steps=60,
        optimizer__learning_rate=1e-2,
        log__every=30,
        eval__every=30,
    )
    run(config, tmp_path / "run")
    printed = capsys.readouterr().out
    assert "bag of bytes" in printed and "always 'ham'" in printed and "true \\ taken for" in printed
    last = metrics_without_time(tmp_path / "run")[-1]
    assert last["step"] == 60 and last["heldout_accuracy"] > 0.9 and last["heldout_matthews"] > 0.7

    _, heldout = split_examples(files, "", 0.3, Columns("text", "label"))
    again = tmp_path / "again.jsonl"
    again.write_text("".join(json.dumps({"text": e.text, "label": e.label}) + "\n" for e in heldout))
    result = score(tmp_path / "run", again)
    for name in ("loss", "accuracy", "f1", "matthews"):
        assert result[name] == pytest.approx(last[f"heldout_{name}"], rel=1e-4)
    assert np.sum(result["confusion"]) == result["examples"] == len(heldout) and result["labels"] == ["ham", "spam"]
    with pytest.raises(UserError, match=r"run: a model with task.name = 'classification' predicts no next token"):
        continue_text(tmp_path / "run")
    with pytest.raises(UserError, match="--context=8: only a language model has windows"):
        score(tmp_path / "run", again, context=8)
    with pytest.raises(UserError, match="--text_field=body: the model of .*/run reads the columns it was trained on"):
        score(tmp_path / "run", again, text_field="body")


def test_pretraining_holds_out_the_texts_that_the_classifier_holds_out(tmp_path):
    files = write_labelled(tmp_path / "mails.jsonl")
    config = classify.get_config(f"files={files},pretrain=next_token")
    validate(config)
    assert config.model.causal and config.model.embed_dim == classify.get_config().model.embed_dim
    held_out = LanguageModel.load(config, Workdir(tmp_path / "run")).data.heldout_documents
    _, heldout = split_examples(files, "", 0.0, Columns("text", "label"))
    assert held_out == tuple(example.text for example in heldout)


def test_a_stopped_run_goes_on_and_other_labels_are_refused(tmp_path):
    files = write_labelled(tmp_path / "mails.jsonl")
    fields = {"optimizer__schedule": "constant", "eval__every": 4}
    run(labelled_config(files, num_steps=8, **fields), tmp_path / "unbroken")
    for num_steps in (4, 8):
        run(labelled_config(files, num_steps=num_steps, **fields), tmp_path / "resumed")
    assert saved_arrays(tmp_path / "resumed") == saved_arrays(tmp_path / "unbroken")
    assert metrics_without_time(tmp_path / "resumed") == metrics_without_time(tmp_path / "unbroken")
    write_labelled(tmp_path / "mails.jsonl", ("good", "bad"))
    with pytest.raises(UserError, match=r"resumed was trained on the labels ham, spam; .* has bad, good"):
        run(labelled_config(files, num_steps=12, **fields), tmp_path / "resumed")


def test_a_language_models_weights_come_along_and_the_head_is_new(tmp_path, capsys):
    text = write_text(tmp_path / "a.txt")
    write_workdir(tmp_path / "lm", tiny_config(data__files=text))
    files = write_labelled(tmp_path / "mails.jsonl")
    config = labelled_config(files, init_from=str(tmp_path / "lm"), num_steps=3, optimizer__train="geometry")
    run(config, tmp_path / "run")
    assert "new: classifier/bias, classifier/kernel" in capsys.readouterr().err
    before, after = saved_arrays(tmp_path / "lm"), saved_arrays(tmp_path / "run")
    same = {name for name in before if name.startswith("['params']") and after.get(name) == before[name]}
    assert any("embedding" in name for name in same) and not any("mechanism" in name for name in same)


def test_a_regression_runs_by_the_same_command(tmp_path, capsys):
    files = write_labelled(tmp_path / "mails.jsonl", (1, 2.5))
    config = labelled_config(files, task__name="regression", task__pooling="mean", num_steps=4, eval__every=4)
    run(config, tmp_path / "run")
    assert "squared error" in capsys.readouterr().out
    last = metrics_without_time(tmp_path / "run")[-1]
    result = score(tmp_path / "run", files)
    assert {"heldout_loss", "heldout_pearson", "heldout_spearman"} < last.keys() and result["examples"] == 60
    reported = report.report(SimpleNamespace(runs=str(tmp_path / "run"), out=str(tmp_path / "page")))
    assert reported["rows"][0]["heldout_spearman"]["mean"] == last["heldout_spearman"]


def test_the_largest_numbers_that_are_allowed_are_learned_and_larger_ones_claim_no_directory(tmp_path):
    def numbers(size):
        files = write_labelled(tmp_path / "mails.jsonl", (size, -size))
        return labelled_config(files, task__name="regression", num_steps=4, eval__every=4)

    with pytest.raises(UserError, match=r"mails.jsonl:\d+: the label '-?1e\+18' is too large"):
        run(numbers(1e18), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run(numbers(1e15), tmp_path / "run")
    assert np.isfinite(metrics_without_time(tmp_path / "run")[-1]["heldout_loss"])


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("classification", ("ham", "eggs"), "training has not seen the label 'eggs'"),
        ("regression", (1, "many"), "the label 'many' is not a number"),
    ],
)
def test_a_dry_run_refuses_the_held_out_labels_that_training_refuses(tmp_path, task, labels, message):
    files = write_labelled(tmp_path / "mails.jsonl", ("ham", "spam") if task == "classification" else (1, 2))
    heldout = write_labelled(tmp_path / "dev.jsonl", labels)
    fields = {"task__name": task, "task__heldout_files": heldout, "data__heldout_fraction": 0.0}
    config = labelled_config(files, **fields)
    for start in (lambda: dry_run(config), lambda: run(config, tmp_path / "run")):
        with pytest.raises(UserError, match=rf"dev.jsonl:\d+: {message}"):
            start()


def test_a_dry_run_refuses_fewer_examples_than_a_batch(tmp_path):
    with pytest.raises(UserError, match="training examples, fewer than batch_size = 64"):
        dry_run(labelled_config(write_labelled(tmp_path / "mails.jsonl"), batch_size=64))


def test_the_config_takes_files_and_says_what_it_would_train(tmp_path, capsys):
    files = write_labelled(tmp_path / "mails.jsonl")
    dry_run(classify.get_config(f"files={files},attention=softmax,length=64,pooling=last"))
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["classes"] == "2" and shown["layers"] == "2 x softmax" and shown["tokens/step"] == "1,024 = 16 x 64"
    assert classify.get_config(f"files={files},heldout={files}").task.heldout_files == files
    for text, value in (("False", False), ("true", True)):
        assert classify.get_config(f"causal={text}").model.causal is value
    with pytest.raises(UserError, match="configs/classify.py: 'causal=no': causal must be True or False"):
        classify.get_config("causal=no")
    with pytest.raises(UserError, match="configs/classify.py has no argument 'file'; allowed: files, heldout"):
        classify.get_config("file=a.tsv")


def test_a_classifier_that_sees_later_tokens_as_its_language_model_did_not_says_so(tmp_path, capsys):
    write_workdir(tmp_path / "lm", tiny_config())
    files = write_labelled(tmp_path / "mails.jsonl")

    def said(causal):
        dry_run(labelled_config(files, init_from=str(tmp_path / "lm"), model__causal=causal))
        return capsys.readouterr().err

    source = f"init_from = {tmp_path / 'lm'}"
    assert said(False) == f"note: model.causal = False, but True in {source}; --config.model.causal=True keeps it\n"
    assert said(True) == ""


def test_held_out_files_win_over_a_share_that_nobody_asked_for(tmp_path):
    files, heldout = write_labelled(tmp_path / "mails.jsonl"), write_labelled(tmp_path / "dev.jsonl", count=9)
    config = classify.get_config(f"files={files}")
    columns = Columns("text", "label")
    assert split_examples(files, "", config.data.heldout_fraction, columns) == split_examples(files, "", 0.15, columns)
    config.task.heldout_files = heldout
    dry_run(config)
    assert len(Classification.load(config, Workdir(tmp_path / "run")).heldout) == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__source": "text"}, "data.source = 'text' with task.name = 'classification'; allowed: 'labelled'"),
        ({"task__name": "language_model", "task__pooling": "mean"}, "'language_model'; allowed: 'last'"),
        ({"task__pooling": "max"}, "task.pooling = 'max': allowed: last, mean"),
        ({"optimizer__z_loss": 0.1}, "optimizer.z_loss = 0.1 with task.name = 'classification'; allowed: 0.0"),
        ({"task__heldout_files": "dev.tsv"}, "data.heldout_fraction = 0.3 with task.heldout_files = 'dev.tsv'"),
        ({"task__label_column": "class"}, "mails.jsonl:1: there is no label in 'class'"),
        ({"task__text_column": "body"}, 'mails.jsonl:1: no "body" field that is a string'),
        ({"batch_size": 64}, "training examples, fewer than batch_size = 64"),
        ({"model__causal": False, "model__attention__window": 16}, "model.causal = False with window = 16: allowed: 0"),
        (
            {"model__causal": False, "model__attention__kind": "softmax_local", "model__attention__local_window": 4},
            "model.causal = False: 'softmax_local' is causal only",
        ),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, changes, message):
    config = labelled_config(write_labelled(tmp_path / "mails.jsonl"), **changes)
    with pytest.raises(UserError) as error:
        run(config, tmp_path / "run")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("ham", "ham"), "training examples have the label 'ham'; a classification needs two classes or more"),
        ((1, 2.5), "the label '2.5' is for a regression, but task.name = 'classification'"),
        (("ham", ""), "there is no label in 'label'"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, labels, message):
    with pytest.raises(UserError, match=message):
        run(labelled_config(write_labelled(tmp_path / "mails.jsonl", labels)), tmp_path / "run")


def test_a_language_model_takes_no_field_of_a_classifier(tmp_path):
    for field in ("task__pooling", "model__causal"):
        config = tiny_config(
            data__files=write_text(tmp_path / "a.txt"), **{field: {"task__pooling": "mean"}.get(field, False)}
        )
        with pytest.raises(UserError, match="with task.name = 'language_model'; allowed"):
            run(config, tmp_path / "run")
