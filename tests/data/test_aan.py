"""new_aan_pairs.*.tsv: no header, no quoting, a label, two ids and two texts."""

import json
import re

import pytest

from darkformer_jax.data.aan import write_aan
from darkformer_jax.data.labelled import Columns, read_examples
from tests.data.test_lra_release import run

NAMES = {"train": "new_aan_pairs.train.tsv", "val": "new_aan_pairs.eval.tsv", "test": "new_aan_pairs.test.tsv"}
ROWS = [
    ("1.0", "P09-1", "W01-2", "b'He said \"yes\\n", "A reply, in three\u2019s"),
    ("0.0", "P09-1", "D07-3", '"Unbalanced', 'quotes" are text'),
    ("1.0", "W01-2", "D07-3", "x" * 50, "y" * 10),
]


def line(row):
    return "\t".join(row) + "\n"


def write_release(root, copies=1):
    root.mkdir(parents=True)
    for name in NAMES.values():
        (root / name).write_text("".join(map(line, ROWS)) * copies, encoding="utf-8")
    return root


def pairs(out, split):
    return [(e.text, e.label) for e in read_examples(f"{out}/{split}.jsonl", Columns("papers", "label"))]


@pytest.mark.parametrize("nesting", ["", "lra_release/tsv_data", "lra_release/lra_release/tsv_data"])
def test_a_pair_becomes_two_lines_of_one_text_and_quotes_are_text(tmp_path, capsys, nesting):
    write_release(tmp_path / "files" / nesting)
    status, said, _ = run(capsys, "--source=aan", f"--files={tmp_path}/files", f"--out={tmp_path}/out")
    assert status == 0
    for split in NAMES:
        assert pairs(tmp_path / "out", split) == [
            (f"{first}\n{second}", label[0]) for label, _, _, first, second in ROWS
        ]
    saved = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert saved["val"] == {
        "examples": 3,
        "shares": {"0": 1 / 3, "1": 2 / 3},
        "majority_class": 2 / 3,
        "shortest_bytes": 10,
        "median_bytes": 16,
        "longest_bytes": 50,
        "cut_shares": {"4000": 0.0},
    }
    assert (
        "3 examples; bytes of a text: 10 to 50, median 16, 0.0% over 4,000; the most frequent class has 66.7%" in said
    )
    assert "these are 9 examples, but 182,613 were published" in said


def test_each_paper_is_cut_so_that_the_second_is_seen_and_the_share_of_cut_ones_is_counted(tmp_path, capsys):
    write_release(tmp_path / "files")
    flags = ("--source=aan", f"--files={tmp_path}/files", f"--out={tmp_path}/out", "--length=18")
    status, said, _ = run(capsys, *flags)
    assert status == 0 and "33.3% over 18" in said and "task=retrieval,length=38, which shows both papers" in said
    texts = [text for text, _ in pairs(tmp_path / "out", "test")]
    # the apostrophe has three bytes, of which the limit leaves one: it is dropped
    assert texts == [
        "b'He said \"yes\\n\nA reply, in three",
        '"Unbalanced\nquotes" are text',
        "x" * 18 + "\n" + "y" * 10,
    ]


def only_ids(source):
    for name in NAMES.values():
        rows = "".join(line(row[:3]) for row in ROWS)
        (source / name).rename(source / name.replace(".tsv", ".only_ids.tsv"))
        (source / name.replace(".tsv", ".only_ids.tsv")).write_text(rows)
    return (
        r"new_aan_pairs.train.tsv is missing; the task needs new_aan_pairs.train.tsv, new_aan_pairs.eval.tsv, "
        r"new_aan_pairs.test.tsv; new_aan_pairs.eval.only_ids.tsv beside it has only the ids of papers; the files with "
        r"label, two ids and two texts are in tsv_data of lra_release"
    )


def ids_under_the_full_name(source):
    (source / NAMES["train"]).write_text("".join(line(row[:3]) for row in ROWS))
    return r"new_aan_pairs.train.tsv:1 has only the ids of papers; the files with label, two ids and two texts are in"


def absent(source):
    (source / NAMES["val"]).unlink()
    return r"new_aan_pairs.eval.tsv is missing; the task needs .*new_aan_pairs.test.tsv$"


def other_nesting(source):
    source.rename(source.with_name("pairs"))
    source.mkdir()
    return (
        r"has no directory tsv_data; --files is lra_release, with tsv_data in it or in its inner lra_release, or the "
        r"directory of new_aan_pairs.train.tsv"
    )


def append(source, row):
    with open(source / NAMES["test"], "a") as file:
        file.write(line(row))


def label(source):
    append(source, ("2.0", "a", "b", "c", "d"))
    return r"new_aan_pairs.test.tsv:4: the label '2.0'; allowed: 0, 0.0, 1, 1.0"


def header(source):
    (source / NAMES["test"]).write_text(line(("label", "id1", "id2", "text1", "text2")))
    return r"new_aan_pairs.test.tsv:1: the label 'label'; allowed"


def column(source):
    append(source, ("1.0", "a", "b", "c"))
    return r"new_aan_pairs.test.tsv:4: 4 fields; allowed: label, two ids and two texts"


def no_text(source):
    append(source, ("1.0", "a", "b", "c", " "))
    return r"new_aan_pairs.test.tsv:4: text 2 is empty"


def empty(source):
    (source / NAMES["test"]).write_bytes(b"")
    return r"new_aan_pairs.test.tsv is empty"


def blank(source):
    (source / NAMES["test"]).write_text("\n\n")
    return r"the files have no example for test"


def torn(source):
    path = source / NAMES["train"]
    path.write_bytes(path.read_bytes()[:-65])
    return r"new_aan_pairs.train.tsv:3: 3 fields; allowed"


@pytest.mark.parametrize(
    "damage",
    [only_ids, ids_under_the_full_name, absent, other_nesting, label, header, column, no_text, empty, blank, torn],
)
def test_what_is_missing_or_damaged_is_named_in_a_line_and_nothing_is_written(tmp_path, capsys, damage):
    message = damage(write_release(tmp_path / "files"))
    before = set(tmp_path.iterdir())
    status, said, error = run(capsys, "--source=aan", f"--files={tmp_path}/files", f"--out={tmp_path}/out")
    assert status == 2 and not said and error.startswith("error: ")
    assert re.search(message, error), error
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source=aan", "--files={files}", "--length=0"], "--length=0: must be at least 1"),
        (["--source=imdb", "--files={files}", "--length=9"], "--length=9: --source=imdb does not use it; allowed: aan"),
        (["--source=aan"], "--source=aan needs --files"),
    ],
)
def test_flags_that_it_cannot_use_are_refused(tmp_path, capsys, flags, message):
    files = write_release(tmp_path / "files")
    status, _, error = run(capsys, *(flag.format(files=files) for flag in flags), f"--out={tmp_path}/out")
    assert status == 2 and message in error


def test_a_byte_of_each_paper_is_the_least(tmp_path):
    write_aan(str(tmp_path / "out"), str(write_release(tmp_path / "files")), length=1)
    assert [text for text, _ in pairs(tmp_path / "out", "train")] == ["b\nA", '"\nq', "x\ny"]
