"""lra_release as it was published: its two nestings and its ListOps."""

import csv
import json
import re

import pytest

from darkformer_jax import prepare_data
from darkformer_jax.data.labelled import Columns, read_examples
from darkformer_jax.data.lra_release import released, write_listops_release
from darkformer_jax.data.tokenizers import load_tokenizer

ROWS = [("( ( ( [MAX 1 ) 4 ) ] )", 4), ("( ( ( [SM 1 ) ( ( ( [MIN 2 ) 3 ) ] ) ) ] )", 3), ("7", 7)]


def write_listops(root, more=()):
    """The files as the official code writes them: csv.writer, whose lines end in CR LF. `more` rows are in training."""
    own = root / "listops-1000"
    own.mkdir(parents=True)
    for split in ("train", "val", "test"):
        with open(own / f"basic_{split}.tsv", "w", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerows([("Source", "Target"), *ROWS, *(more if split == "train" else ())])
    return own


def run(capsys, *flags):
    """(exit status, what was printed, the last line of errors) of prepare_data."""
    try:
        prepare_data.main(prepare_data.parse_flags(["prepare_data", *map(str, flags)]))
        status = 0
    except SystemExit as ended:
        status = ended.code
    said = capsys.readouterr()
    return status, said.out, (said.err.splitlines() or [""])[-1]


def test_the_published_expressions_become_what_is_made_from_a_seed(tmp_path, capsys):
    write_listops(tmp_path / "lra_release", more=[("( ( [MED 9 ) ] )", 9)] * 3)
    flags = ("--source=lra_release", "--task=listops", f"--files={tmp_path}", f"--out={tmp_path}/out")
    status, said, _ = run(capsys, *flags)
    assert status == 0
    assert re.search(r"train +6 expressions of 1 to 7 symbols, median 3; the most frequent value has 50.0%", said)
    assert "at 2,000 tokens, up to 0.0% of a split's expressions are cut" in said
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    examples = read_examples(f"{tmp_path}/out/basic_val.tsv", Columns("Source", "Target"))
    assert [(example.text, int(example.label)) for example in examples] == ROWS
    assert tokenizer.decode(tokenizer.encode(ROWS[1][0])).split() == ["[SM", "1", "[MIN", "2", "3", "]", "]"]
    saved = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert saved["train"]["expressions"] == 6 and saved["train"]["shares"]["9"] == 0.5


@pytest.mark.parametrize(("length", "share"), [(1999, 0), (2000, 0.25)])
def test_expressions_that_a_row_cannot_hold_are_counted(tmp_path, length, share):
    digits = length - 2
    write_listops(tmp_path, more=[(f"{'( ' * (digits + 1)}[MAX {'1 ) ' * digits}] )", 1)])
    result = write_listops_release(str(tmp_path / "out"), str(tmp_path))
    assert result["train"]["longest"] == length and result["train"]["cut_share"] == share
    assert result["test"]["cut_share"] == 0


def test_of_two_nestings_the_inner_one_is_read(tmp_path):
    outer = tmp_path / "lra_release"
    (outer / "listops-1000").mkdir(parents=True)
    for files in (tmp_path, outer):
        assert released(str(files), "listops-1000") == outer / "listops-1000"
    inner = outer / "lra_release"
    (inner / "listops-1000").mkdir(parents=True)
    for files in (tmp_path, outer, inner):
        assert released(str(files), "listops-1000") == inner / "listops-1000"


def other_nesting(own):
    own.rename(own.parent / "listops")
    return r"has no directory listops-1000; --files is lra_release, with listops-1000 in it or in its inner lra_release"


def archive(own):
    other_nesting(own)
    own.parent.rename(own.parent.with_name("unpacked"))
    own.parent.touch()
    return r"lra_release is a file; --files is the directory lra_release that the archive unpacks to"


def absent(own):
    (own / "basic_val.tsv").unlink()
    return r"basic_val.tsv is missing; ListOps needs basic_train.tsv, basic_val.tsv, basic_test.tsv"


def no_column(own):
    (own / "basic_test.tsv").write_text("Source\tLabel\n7\t7\n")
    return r"basic_test.tsv has no column 'Target'; it has: Source, Label"


def no_rows(own):
    (own / "basic_test.tsv").write_text("Source\tTarget\n")
    return r"basic_test.tsv has no expression"


def empty(own):
    (own / "basic_test.tsv").write_text("")
    return r"basic_test.tsv is empty"


def torn(own):
    path = own / "basic_train.tsv"
    path.write_bytes(path.read_bytes()[:-3])  # its last row loses its label
    return r"basic_train.tsv:4: the value ''; allowed: a digit"


def bracket(own):
    with open(own / "basic_train.tsv", "a") as file:
        file.write("( ( [MAX 1 ) 4 )\t4\n")
    return r"basic_train.tsv:5: no single expression: 1 operations, 0 closing brackets"


def order(own):
    with open(own / "basic_train.tsv", "a") as file:
        file.write("] 7 [MAX\t7\n")
    return r"basic_train.tsv:5: no single expression: 1 operations, 1 closing brackets"


def two(own):
    with open(own / "basic_train.tsv", "a") as file:
        file.write("7 7\t7\n")
    return r"basic_train.tsv:5: no single expression: 0 operations, 0 closing brackets"


def symbol(own):
    with open(own / "basic_train.tsv", "a") as file:
        file.write("( ( [FIRST 1 ) ] )\t1\n")
    return r"basic_train.tsv:5: the symbol '\[FIRST'; allowed: \[MIN \[MAX \[MED \[SM \] 0 1 2 .* and parentheses"


def label(own):
    with open(own / "basic_val.tsv", "a") as file:
        file.write("( ( [MAX 1 ) ] )\t10\n")
    return r"basic_val.tsv:5: the value '10'; allowed: a digit"


def binary(own):
    (own / "basic_val.tsv").write_bytes(b"\x1f\x8b\x08\x00")
    return r"basic_val.tsv is not UTF-8 text"


@pytest.mark.parametrize(
    "damage",
    [other_nesting, archive, absent, no_column, no_rows, empty, torn, bracket, order, two, symbol, label, binary],
)
def test_what_is_missing_or_damaged_is_named_in_a_line_and_nothing_is_written(tmp_path, capsys, damage):
    message = damage(write_listops(tmp_path / "lra_release"))
    before = set(tmp_path.iterdir())
    flags = ("--source=lra_release", "--task=listops", f"--files={tmp_path}/lra_release", f"--out={tmp_path}/out")
    status, said, error = run(capsys, *flags)
    assert status == 2 and not said and re.match("error: ", error)
    assert re.search(message, error), error
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source=lra_release"], "--source=lra_release needs --task and --files"),
        (["--source=lra_release", "--task=listops"], "--source=lra_release needs --task and --files"),
        (["--source=lra_release", "--task=cola"], "--task=cola: --source=lra_release has: listops, pathfinder32"),
        (["--source=glue", "--task=listops"], "--task=listops: --source=glue has: cola, sst2"),
        (["--source=lra_release", "--task=listops", "--level=easy"], "--level=easy: --task=listops has no levels"),
        (["--source=pathfinder", "--level=easy"], "--level=easy: --source=pathfinder does not use it"),
        (["--source=listops", "--task=listops"], "--task=listops: --source=listops does not use it; allowed: lra_rel"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(tmp_path, capsys, flags, message):
    status, _, error = run(capsys, *flags, f"--out={tmp_path}/out")
    assert status == 2 and message in error
