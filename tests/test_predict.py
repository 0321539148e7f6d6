import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from darkformer_jax import evaluate, predict
from darkformer_jax.data.labelled import read_texts
from darkformer_jax.errors import UserError
from tests.tasks.labelled_files import labelled_config, write_labelled
from tests.tiny_runs import ROOT, run, run_commands, tiny_config, write_workdir

pytestmark = pytest.mark.standard_promotion


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    directory = tmp_path_factory.mktemp("classifier")
    files = write_labelled(directory / "mails.jsonl", count=120)
    run(labelled_config(files, num_steps=60, optimizer__learning_rate=1e-2), directory / "run")
    return directory / "run"


@pytest.fixture(scope="module")
def regression(tmp_path_factory):
    directory = tmp_path_factory.mktemp("regression")
    files = write_labelled(directory / "mails.jsonl", labels=(-1.5, 2.5))
    run(labelled_config(files, task__name="regression", num_steps=1), directory / "run")
    return directory / "run"


def predicted(workdir, capsys, *flags):
    predict.predict(predict.parse_flags(["predict", f"--workdir={workdir}", *flags]))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_labelled_file_gets_the_labels_that_evaluate_counts(classifier, tmp_path, capsys):
    labelled = write_labelled(tmp_path / "more.jsonl", count=33)
    rows = predicted(classifier, capsys, f"--text={labelled}", "--batch_size=4")
    assert [row["place"] for row in rows] == [f"{labelled}:{line}" for line in range(1, 34)]
    scores = evaluate.evaluate(evaluate.parse_flags(["evaluate", f"--workdir={classifier}", f"--text={labelled}"]))
    labels = [json.loads(line)["label"] for line in Path(labelled).read_text().splitlines()]
    right = sum(row["label"] == label for row, label in zip(rows, labels, strict=True))
    assert right / 33 == scores["accuracy"] and right > 25
    for row in rows:
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert max(row["probabilities"], key=row["probabilities"].get) == row["label"]


def test_a_text_has_the_same_answer_from_every_kind_of_file_and_beside_any_other(classifier, tmp_path, capsys):
    text = "cheap talk, at noon"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.csv").write_text(f'id,text\n1,"{text}"\n2,we met\n')
    (tmp_path / "c.tsv").write_text(f"text\tother\n{text}\tx\n")
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": text}) + "\n")
    first, second, _, third, fourth = predicted(classifier, capsys, f"--text={tmp_path}")
    (alone,) = predicted(classifier, capsys, f"--input={text}")
    assert alone["place"] == "--input" and first["place"] == str(tmp_path / "a.txt")
    for row in (first, second, third, fourth):
        assert row["probabilities"] == pytest.approx(alone["probabilities"], abs=1e-6)


def test_a_regression_gives_a_number_and_a_file_is_written_once(regression, tmp_path, capsys):
    (tmp_path / "long.txt").write_text("we met at noon " * 100)
    out = tmp_path / "out.jsonl"
    flags = (f"--text={tmp_path / 'long.txt'}", f"--out={out}")
    predict.predict(predict.parse_flags(["predict", f"--workdir={regression}", *flags]))
    assert "100.0% of the texts are longer than the model reads" in capsys.readouterr().err
    (row,) = map(json.loads, out.read_text().splitlines())
    assert set(row) == {"place", "number"} and isinstance(row["number"], float)
    with pytest.raises(UserError, match=r"--out=.*out.jsonl: the file exists, and results are not overwritten"):
        predicted(regression, capsys, *flags)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name\nx\n", "a.csv has no column 'text'; it has: name"),
        ("text\n  \n", "a.csv:2: the text in 'text' is empty"),
        ("text\n", "a.csv: there is no text"),
    ],
)
def test_texts_that_cannot_be_read_are_named(classifier, tmp_path, capsys, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        predicted(classifier, capsys, f"--text={tmp_path / 'a.csv'}")


def test_a_file_whose_name_is_no_utf8_has_a_place(classifier, tmp_path):
    Path(os.fsdecode(bytes(tmp_path) + b"/n\xff.txt")).write_text("cheap talk")
    flags = (f"--workdir={classifier}", f"--text={tmp_path}", f"--out={tmp_path / 'out.jsonl'}")
    predict.predict(predict.parse_flags(["predict", *flags]))
    assert json.loads((tmp_path / "out.jsonl").read_text())["place"] == f"{tmp_path}/n\ufffd.txt"


def test_a_reader_that_has_seen_enough_ends_it_without_a_word(classifier, tmp_path):
    text = write_labelled(tmp_path / "many.jsonl", count=3000)  # more than a pipe holds
    command = f"{sys.executable} -m darkformer_jax.predict --workdir={classifier} --text={text} | head -n 1"
    ended = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 141 and len(ended.stdout.splitlines()) == 1
    assert "Traceback" not in ended.stderr and "rror" not in ended.stderr, ended.stderr


@pytest.mark.parametrize("blank", ["\n \n", "\ufeff \t"])
def test_a_blank_text_file_is_refused_by_its_name_as_a_blank_cell_is(tmp_path, blank):
    (tmp_path / "a.txt").write_text("we met")
    (tmp_path / "b.txt").write_text(blank)
    with pytest.raises(UserError, match=r"b.txt: the text is empty$"):
        read_texts(str(tmp_path), "text")


def test_a_mistake_is_one_line(classifier, tmp_path):
    language_model = tmp_path / "lm"
    write_workdir(language_model, tiny_config())
    mistakes = {
        (f"--workdir={language_model}", "--input=x"): "a language model has no labels; `generate` continues texts",
        (f"--workdir={classifier}", "--input= "): "--input is empty; expected a text",
        (f"--workdir={classifier}", "--input=\udcff"): "--input='\\udcff': not UTF-8 text",
        (f"--workdir={classifier}", "--input=x", "--batch_size=0"): "--batch_size=0: must be from 1 to",
        (f"--workdir={classifier}", "--input=x", "--out="): "--out=: give the name of a file",
    }
    finished = run_commands([("darkformer_jax.predict", flags) for flags in mistakes])
    for done, message in zip(finished, mistakes.values(), strict=True):
        assert done.status == 2 and message in done.err and len(done.err.splitlines()) == 1, done.err
