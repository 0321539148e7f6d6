"""GLUE's files as they were released: headers, quotes, pairs, and rows that lack a field."""

import json
import re

import pytest

from darkformer_jax import prepare_data
from darkformer_jax.data.glue import GLUE_TASKS, write_glue
from darkformer_jax.data.labelled import read_texts
from darkformer_jax.errors import UserError

# Per task: the head of its training file, a row and what becomes of it; the head of its test file and a row.
FILES = {
    "cola": (None, 'gj04\t0\t*\tThey drank the "pub.', ('They drank the "pub.', "0"), "index\tsentence", "0\tBill is."),
    "sst2": ("sentence\tlabel", "a gorgeous , witty \t1", ("a gorgeous , witty", "1"), "index\tsentence", "0\tuneasy"),
    "mrpc": (
        *("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t70\t60\tAmrozi accused "the witness".\tHe did, "he said'),
        ('Amrozi accused "the witness".\nHe did, "he said', "1"),
        *("index\t#1 ID\t#2 ID\t#1 String\t#2 String", "0\t1\t2\ta\tb"),
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        *("7\tmain\tMSR\t2012\t1\tnone\tnone\tA plane.\tAn air plane.\t4.25", ("A plane.\nAn air plane.", 4.25)),
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2",
        "0\tmain\tMSR\t2012\t1\tnone\tnone\ta\tb",
    ),
    "qqp": (
        *("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\tHow?\tWhy?\t0", ("How?\nWhy?", "0")),
        *("id\tquestion1\tquestion2", "0\ta\tb"),
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tp1\tp2\tq1\tq2\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t3\t3n\tgov\t( x )\t( y )\tx\ty\tOne.\tTwo.\tneutral\tneutral",
        ("One.\nTwo.", "neutral"),
        *("index\tpromptID\tpairID\tgenre\tp1\tp2\tq1\tq2\tsentence1\tsentence2", "0\t3\t3n\tgov\tx\ty\tx\ty\ta\tb"),
    ),
    "qnli": (
        *("index\tquestion\tsentence\tlabel", "0\tWhen?\tThen.\tnot_entailment", ("When?\nThen.", "not_entailment")),
        *("index\tquestion\tsentence", "0\ta\tb"),
    ),
    "rte": (
        *("index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\tentailment", ("A.\nB.", "entailment")),
        *("index\tsentence1\tsentence2", "0\ta\tb"),
    ),
    "wnli": (
        *("index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\t1", ("A.\nB.", "1")),
        *("index\tsentence1\tsentence2", "0\ta\tb"),
    ),
}


def release(directory, name, more=()):
    """A task's files with one row each, and `more` rows of training."""
    head, row, _, test_head, test_row = FILES[name]
    own = directory / GLUE_TASKS[name].directory
    own.mkdir(parents=True)
    for split in GLUE_TASKS[name].splits:
        lines = [test_head, test_row] if split.startswith("test") else [*filter(None, [head]), row]
        lines += more if split == "train" else ()
        (own / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return own


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_every_task_is_read_as_it_was_released(tmp_path, name):
    release(tmp_path / "glue_data", name)
    result = write_glue(str(tmp_path / "out"), name, str(tmp_path / "glue_data"))
    text, label = FILES[name][2]
    for split in GLUE_TASKS[name].splits:
        (row,) = lines(tmp_path / "out" / f"{split}.jsonl")
        if split.startswith("test"):
            assert row.keys() == {"index", "text"} and row["index"] == "0"
        else:
            assert row == {"text": text, "label": label}
        assert result[split]["examples"] == 1 and result[split]["left_out"] == 0
    assert json.loads((tmp_path / "out" / "statistics.json").read_text()) == result


def test_rows_that_lack_a_field_are_left_out_and_counted(tmp_path, capsys):
    own = release(tmp_path, "qqp", more=["5\t6\t7\tWho?", "8\t9\t10\t\tWhat?\t1", "11\t12\t13\tIs it?\tIt is?\t1"])
    prepare_data.main(
        prepare_data.parse_flags(
            ["prepare_data", "--source=glue", "--task=qqp", f"--files={own}", f"--out={tmp_path}/out"]
        )
    )
    assert [row["label"] for row in lines(tmp_path / "out" / "train.jsonl")] == ["0", "1"]
    said = capsys.readouterr().out
    assert "qqp of GLUE, whose metric is F1" in said
    assert "2 examples, median" in said and "50.0%; 2 rows without a field left out" in said


def test_test_rows_are_all_kept_with_their_index_because_a_submission_has_an_answer_for_each(tmp_path):
    own = release(tmp_path, "qqp")
    (own / "test.tsv").write_text("id\tquestion1\tquestion2\n0\tWho?\tWhat?\n1\tHow?\n2\t\tWhy?\n\n3\tIs it?\tIt is.\n")
    result = write_glue(str(tmp_path / "out"), "qqp", str(own))
    texts = ["Who?\nWhat?", "How?\n", "\nWhy?", "Is it?\nIt is."]
    assert lines(tmp_path / "out" / "test.jsonl") == [
        {"index": str(number), "text": text} for number, text in enumerate(texts)
    ]
    assert result["test"]["examples"] == 4 and result["test"]["left_out"] == 0
    read = read_texts(str(tmp_path / "out" / "test.jsonl"), "text")
    assert [text.place.rpartition(":")[2] for text in read] == ["1", "2", "3", "4"]


def absent(own):
    (own / "dev.tsv").unlink()
    return "rte", r"dev.tsv is missing; rte needs train, dev, test \(.tsv\)"


def other_columns(own):
    (own / "train.tsv").write_text("index\tpremise\tsentence2\tlabel\n0\ta\tb\tentailment\n")
    return "rte", r"train.tsv has no column 'sentence1'; it has: index, premise, sentence2, label"


def other_label(own):
    with open(own / "train.tsv", "a") as file:
        file.write("1\ta\tb\tneutral\n")
    return "rte", r"train.tsv:3: the label 'neutral'; allowed: entailment, not_entailment"


def large_score(own):
    release(own.parent, "stsb", more=["7\tmain\tMSR\t2012\t1\tnone\tnone\ta\tb\t5.5"])
    return "stsb", r"train.tsv:3: the label '5.5'; allowed: numbers from 0 to 5"


def no_row(own):
    (own / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n")
    return "rte", r"dev.tsv has no example"


def no_index(own):
    (own / "test.tsv").write_text("sentence1\tsentence2\na\tb\n")
    return "rte", r"test.tsv does not begin with the column index or id; it has: sentence1, sentence2"


def no_sentence(own):
    with open(own / "test.tsv", "a") as file:
        file.write("1\t \t\n")
    return "rte", r"test.tsv:3: there is no sentence; a test row is predicted, and cannot be left out"


@pytest.mark.parametrize("damage", [absent, other_columns, other_label, large_score, no_row, no_index, no_sentence])
def test_what_is_missing_or_wrong_is_named_and_nothing_is_written(tmp_path, damage):
    own = release(tmp_path / "glue_data", "rte")
    name, message = damage(own)
    with pytest.raises(UserError) as refused:
        write_glue(str(tmp_path / "out"), name, str(tmp_path / "glue_data"))
    assert re.search(message, str(refused.value)), refused.value
    assert not (tmp_path / "out").exists()


def test_a_file_or_nothing_in_place_of_the_directory_is_named_as_such(tmp_path):
    (tmp_path / "glue_data.zip").write_text("x")
    for name, what in (("glue_data.zip", "is a file"), ("glue", "is not there")):
        with pytest.raises(UserError, match=f"{name} {what}; --files is the directory of the release or its RTE: rte"):
            write_glue(str(tmp_path / "out"), "rte", str(tmp_path / name))


def test_it_is_said_that_the_examples_are_not_as_many_as_were_published(tmp_path, capsys):
    flags = ["--source=glue", "--task=rte", f"--files={release(tmp_path, 'rte')}", f"--out={tmp_path}/out"]
    prepare_data.main(prepare_data.parse_flags(["prepare_data", *flags]))
    assert capsys.readouterr().out.endswith("  these are 1 training examples, but 2,490 were published\n")


@pytest.mark.parametrize("flags", [["--task=rte"], ["--files=x"]])
def test_the_task_and_its_directory_are_needed(tmp_path, capsys, flags):
    with pytest.raises(SystemExit):
        prepare_data.main(prepare_data.parse_flags(["prepare_data", "--source=glue", f"--out={tmp_path}/out", *flags]))
    assert "--source=glue needs --task and --files" in capsys.readouterr().err
