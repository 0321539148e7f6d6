"""aclImdb as it unpacks: a file per review, and a validation split of our own."""

import json
import re

import pytest

from darkformer_jax.data.imdb import write_imdb
from darkformer_jax.data.labelled import Columns, read_examples
from tests.data.test_lra_release import run

RATINGS = {"neg": (1, 4), "pos": (7, 10)}


def review(split, label, number):
    return f"{split} {label} {number}: a film<br /><br />of {number % 7} \u201chours\u201d" + number % 5 * 300 * "."


def write_release(root, count=60):
    """{split: {(text, label)}} of the files in root/aclImdb."""
    written = {"train": set(), "test": set()}
    for split in written:
        for label, ratings in RATINGS.items():
            own = root / "aclImdb" / split / label
            own.mkdir(parents=True)
            for number in range(count):
                text = review(split, label, number)
                (own / f"{number}_{ratings[number % 2]}.txt").write_text(text, encoding="utf-8")
                written[split].add((text, label))
        (root / "aclImdb" / split / "urls_pos.txt").write_text("http://example.org\n")
    unsup = root / "aclImdb" / "train" / "unsup"
    unsup.mkdir()
    (unsup / "0_0.txt").write_text("no label")
    return written


def split_of(out, split):
    return [(e.text, e.label) for e in read_examples(f"{out}/{split}.jsonl", Columns("review", "label"))]


@pytest.mark.parametrize("files", ["", "aclImdb"])
def test_a_tenth_of_the_training_reviews_is_for_validation_and_the_test_split_is_whole(tmp_path, capsys, files):
    written = write_release(tmp_path)
    status, said, _ = run(capsys, "--source=imdb", f"--files={tmp_path / files}", f"--out={tmp_path}/out")
    assert status == 0
    train, val, test = (split_of(tmp_path / "out", split) for split in ("train", "val", "test"))
    assert sorted(train + val) == sorted(written["train"]) and sorted(test) == sorted(written["test"])
    assert 0 < len(val) < 12 + 4 * 3.3  # four standard deviations
    assert len({label for _, label in test[:20]}) == 2  # a part of a split has both classes
    sizes = sorted(len(text.encode()) for text, _ in test)
    saved = json.loads((tmp_path / "out" / "statistics.json").read_text())
    shares = {"neg": 0.5, "pos": 0.5}
    assert saved["test"] == {
        "examples": 120,
        "shares": shares,
        "majority_class": 0.5,
        "shortest_bytes": sizes[0],
        "median_bytes": (sizes[59] + sizes[60]) // 2,
        "longest_bytes": sizes[-1],
        "cut_shares": {"1000": sum(size > 1000 for size in sizes) / 120, "4000": 0.0},
    }
    assert re.search(
        r"test +120 examples; .*, 20.0% over 1,000, 0.0% over 4,000; the most frequent class has 50.0%", said
    )
    assert "these are 240 examples, but 50,000 were published" in said


def test_the_splits_do_not_depend_on_names_and_copies_are_in_one(tmp_path):
    write_release(tmp_path / "a")
    write_imdb(str(tmp_path / "first"), str(tmp_path / "a"))
    own = tmp_path / "a" / "aclImdb" / "train" / "pos"
    paths = sorted(own.iterdir())
    for number, path in enumerate(paths):
        (own / f"{1000 + number}_8.txt").write_bytes(path.read_bytes())
    write_imdb(str(tmp_path / "second"), str(tmp_path / "a"))
    for split in ("train", "val", "test"):
        once, twice = (split_of(tmp_path / name, split) for name in ("first", "second"))
        assert sorted(set(twice)) == sorted(once)
        assert sorted(twice) == sorted(once + [row for row in once if split != "test" and row[1] == "pos"])


def absent(source):
    for path in (source / "test" / "neg").iterdir():
        path.unlink()
    return r"test/neg has no review; --files is aclImdb, with train/neg, train/pos, test/neg, test/pos and a .txt"


def other_nesting(source):
    source.rename(source.parent / "reviews")
    return r"train/neg has no review; --files is aclImdb"


def archive(source):
    source.rename(source.parent / "unpacked")
    (source.parent / "files").rmdir()
    (source.parent / "files").touch()
    return r"files is a file; --files is the directory aclImdb that the archive unpacks to"


def empty(source):
    (source / "train/pos/3_10.txt").write_bytes(b"")
    return r"train/pos/3_10.txt is empty"


def blank(source):
    (source / "train/pos/3_10.txt").write_text(" \n")
    return r"train/pos/3_10.txt: the text is empty"


def torn(source):
    (source / "train/pos/3_10.txt").write_bytes("caf\u00e9".encode()[:-1])
    return r"train/pos/3_10.txt is not UTF-8 text: byte 0xc3 at offset 3"


def rating(source):
    (source / "train/pos/3_10.txt").rename(source / "train/pos/3_4.txt")
    return r"train/pos/3_4.txt: the name is <number>_<rating>.txt, with a rating of 7 to 10"


def other_name(source):
    (source / "test/neg/0_1.txt").rename(source / "test/neg/review.txt")
    return r"test/neg/review.txt: the name is <number>_<rating>.txt, with a rating of 1 to 4"


def few(source):
    for path in [*source.glob("train/*/*.txt")]:
        if path.parent.name != "unsup" and not path.name.startswith("0_"):
            path.unlink()
    return r"aclImdb: its 2 training reviews are too few: none is for validation"


@pytest.mark.parametrize("damage", [absent, other_nesting, archive, empty, blank, torn, rating, other_name, few])
def test_what_is_missing_or_damaged_is_named_in_a_line_and_nothing_is_written(tmp_path, capsys, damage):
    write_release(tmp_path)
    (tmp_path / "files").mkdir()
    message = damage(tmp_path / "aclImdb")
    files = tmp_path / "files" if damage is archive else tmp_path
    before = set(tmp_path.iterdir())
    status, said, error = run(capsys, "--source=imdb", f"--files={files}", f"--out={tmp_path}/out")
    assert status == 2 and not said and error.startswith("error: ")
    assert re.search(message, error), error
    assert set(tmp_path.iterdir()) == before


def test_the_directory_is_needed(tmp_path, capsys):
    status, _, error = run(capsys, "--source=imdb", f"--out={tmp_path}/out")
    assert status == 2 and error == "error: --source=imdb needs --files=<the directory of its files>"
