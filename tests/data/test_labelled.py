import gzip
import itertools
import json

import numpy as np
import pytest
import tokenizers as hf

from darkformer_jax.data.batches import ordered_batches, shuffled_batches
from darkformer_jax.data.labelled import (
    Columns,
    Example,
    LabelledRows,
    Text,
    class_labels,
    class_names,
    examples_fingerprint,
    load_class_names,
    number_labels,
    read_examples,
    read_texts,
    save_class_names,
    shown_label,
    split_examples,
)
from darkformer_jax.data.listops import listops_tokenizer
from darkformer_jax.data.seen_files import seen_file
from darkformer_jax.data.tokenizers import BytesTokenizer, HuggingFaceTokenizer
from darkformer_jax.errors import UserError

COLUMNS = Columns("text", "label")
BOS = BytesTokenizer.bos_id


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    return str(path)


def examples(pairs):
    return [Example(text, label, f"made.tsv:{line}") for line, (text, label) in enumerate(pairs, start=2)]


PAIR = Columns("sentence1,sentence2", "label")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", "sentence2\tlabel\tsentence1\nIt is.\t1\tIs it, so?\n"),
        ("a.csv", 'label,sentence1,sentence2\n1,"Is it, so?",It is.\n'),
        ("a.jsonl", '{"sentence2": "It is.", "label": 1, "sentence1": "Is it, so?"}\n'),
    ],
)
def test_a_pair_is_a_text_of_two_columns(tmp_path, name, content):
    path = write(tmp_path, name, content)
    (found,) = read_examples(path, PAIR)
    assert found[:2] == ("Is it, so?\nIt is.", "1")
    (text,) = read_texts(path, PAIR.text)
    assert text.text == found.text


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns("sentence1,sentence3", "label"), r"a.tsv has no column 'sentence3'; it has: sentence1, sentence2"),
        (Columns("sentence1,sentence2", "sentence2"), "text and label have the same column 'sentence2'"),
        (Columns("sentence1,", "label"), "task.text_column = 'sentence1,'; allowed: a name, or different names"),
        (Columns("sentence1,sentence1", "label"), "allowed: a name, or different names between commas"),
        (PAIR, r"a.tsv:2: the text in 'sentence2' is empty"),
    ],
)
def test_what_is_no_pair_is_refused(tmp_path, columns, message):
    path = write(tmp_path, "a.tsv", "sentence1\tsentence2\tlabel\nIs it?\t \t1\n")
    with pytest.raises(UserError, match=message):
        read_examples(path, columns)


def rows_of(texts, labels=None, length=6):
    labels = np.arange(len(texts), dtype=np.int32) if labels is None else labels
    return LabelledRows([Example(text, "", "") for text in texts], labels, BytesTokenizer(), length)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", 'label\ttext\nham\tHe said "no\nspam\tbuy, buy\n'),
        ("a.tsv.gz", 'id\ttext\tlabel\r\n7\tHe said "no\tham\r\n\r\n8\tbuy, buy\tspam\r\n'),
        ("a.csv", 'text,label\n"He said ""no",ham\n"buy, buy", spam\n'),
        ("a.jsonl", '{"text": "He said \\"no", "label": "ham"}\n\n{"label": " spam", "text": "buy, buy"}\n'),
    ],
)
def test_every_format_gives_the_same_examples(tmp_path, name, content):
    found = read_examples(write(tmp_path, name, content), COLUMNS)
    assert [example[:2] for example in found] == [('He said "no', "ham"), ("buy, buy", "spam")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv.gz", "text\tlabel\nhi\tham\n"),
        ("a.csv", '"text","label"\nhi,ham\n'),
        ("a.jsonl", '{"text": "hi", "label": "ham"}\n'),
    ],
)
def test_a_byte_order_mark_at_the_beginning_is_no_text(tmp_path, name, content):
    assert read_examples(write(tmp_path, name, "\ufeff" + content), COLUMNS)[0][:2] == ("hi", "ham")


def test_a_quoted_field_of_a_csv_holds_line_ends_and_places_are_where_records_begin(tmp_path):
    path = write(tmp_path, "a.csv", 'text,label\n"one\ntwo",x\nthree,y\n')
    assert read_examples(path, COLUMNS) == [
        Example("one\ntwo", "x", f"{path}:2"),
        Example("three", "y", f"{path}:4"),
    ]


def test_columns_have_the_names_that_are_asked_for_and_json_labels_may_be_numbers(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"s": "a", "y": 1}\n{"s": "b", "y": 2.5}\n{"s": "c", "y": true}\n')
    assert [example.label for example in read_examples(path, Columns("s", "y"))] == ["1", "2.5", "true"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "sentence\tlabel\nx\t1\n", "a.tsv has no column 'text'; it has: sentence, label"),
        ("a.csv", "text,class\nx,1\n", "a.csv has no column 'label'; it has: text, class"),
        ("a.tsv", "text\tlabel\tlabel\nx\t1\t2\n", "a.tsv has 2 columns 'label'; allowed: one"),
        ("a.csv", "\ntext,label\nx,1\n", "a.csv: line 1 is blank; the first line names the columns"),
        ("a.tsv", "text\tlabel\nx\t1\n \t0\n", "a.tsv:3: the text in 'text' is empty"),
        ("a.tsv", "text\tlabel\nx\t1\ny\n", "a.tsv:3: there is no label in 'label'"),
        ("a.csv", 'text,label\n"a\nb",\n', "a.csv:2: there is no label in 'label'"),
        ("a.csv", "text,label\na, b,1\n", "a.csv:2: 3 fields, but the header has 2"),
        ("a.csv", 'text,label\n"a,1\nb,2\n', "a.csv:2: not a record: unexpected end of data"),
        ("a.jsonl", '{"text": "x", "label": null}\n', "a.jsonl:1: there is no label in 'label'"),
        (
            "a.jsonl",
            '{"text": "x", "label": 1.5}\n{"text": "x", "label": NaN}\n',
            "a.jsonl:2: there is no label in 'label'",
        ),
        (
            "a.jsonl",
            '{"text": "x", "label": [1]}\n',
            "a.jsonl:1: the label in 'label' is neither a string nor a number",
        ),
        ("a.jsonl", '{"text": "x", "label": "\\ud800"}\n', 'a.jsonl:1: "label" holds a lone surrogate'),
        (
            "a.jsonl",
            '{"label": "1"}\n',
            'a.jsonl:1: no "text" field that is a string; it has: label (task.text_column names',
        ),
        ("a.jsonl", "{\n", "a.jsonl:1: not a JSON object"),
        ("a.jsonl", "\n", "a.jsonl: there is no example"),
        ("a.txt", "x", "a.txt is not a file the labelled source reads; allowed: .tsv"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(tmp_path, name, content, message):
    with pytest.raises(UserError) as error:
        read_examples(write(tmp_path, name, content), COLUMNS)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_one_column_is_not_text_and_label(tmp_path):
    with pytest.raises(UserError, match="text and label have the same column 'text'; allowed: two columns"):
        read_examples(write(tmp_path, "a.tsv", "text\tlabel\nx\t1\n"), Columns("text", "text"))


def test_columns_that_are_not_read_may_have_the_same_name(tmp_path):
    assert read_examples(write(tmp_path, "a.csv", "label,text,,\nham,hi,,\n"), COLUMNS)[0][:2] == ("hi", "ham")


def test_the_hash_of_the_text_decides_what_is_held_out(tmp_path):
    lines = [json.dumps({"text": f"text {i % 400}", "label": str(i % 2)}) for i in range(800)]
    train, heldout = split_examples(write(tmp_path, "a.jsonl", "\n".join(lines)), "", 0.2, COLUMNS)
    again, _ = split_examples(write(tmp_path, "b.jsonl", "\n".join(reversed(lines))), "", 0.2, COLUMNS)
    assert len(train) + len(heldout) == 800 and 100 < len(heldout) < 220
    assert not {example.text for example in train} & {example.text for example in heldout}
    assert {example.text for example in train} == {example.text for example in again}


def test_a_held_out_file_is_held_out_whole(tmp_path):
    files = [write(tmp_path, f"{name}.tsv", f"text\tlabel\n{name}\t1\n") for name in ("train", "dev")]
    train, heldout = split_examples(*files, 0.0, COLUMNS)
    assert (train[0].text, heldout[0].text) == ("train", "dev")


def test_a_file_that_leaves_a_side_empty_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"0 are held out; change data.heldout_fraction or give task.heldout_files"):
        split_examples(write(tmp_path, "a.tsv", "text\tlabel\nx\t1\n"), "", 0.05, COLUMNS)


def test_classes_are_the_sorted_labels():
    found = examples([("a", "spam"), ("b", "ham"), ("c", "spam")])
    assert class_names(found) == ("ham", "spam")
    labels = class_labels(found, ("ham", "spam"))
    assert labels.tolist() == [1, 0, 1] and labels.dtype == np.int32


@pytest.mark.parametrize("labels", [["0", "1"], ["0.0", "1.0"], ["1.5", "good"], ["nan", "2"], ["nan", "good"]])
def test_whole_numbers_and_names_are_classes(labels):
    assert len(class_names(examples([("a", labels[0]), ("b", labels[1])]))) == 2


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            [("a", "x"), ("b", "x")],
            r"made.tsv: all 2 training examples have the label 'x'; a classification needs two",
        ),
        (
            [("a", "4"), ("b", "3.8")],
            r"made.tsv:3: the label '3.8' is for a regression, but task.name = 'classification'",
        ),
        ([("a", "nan"), ("b", "3.8")], r"made.tsv:3: the label '3.8' is for a regression"),
        ([("a", "3.8"), ("b", "-inf")], r"made.tsv:2: the label '3.8' is for a regression"),
    ],
)
def test_labels_that_are_no_classes_are_refused(pairs, message):
    with pytest.raises(UserError, match=message):
        class_names(examples(pairs))


def test_a_held_out_label_that_training_has_not_seen_is_refused():
    with pytest.raises(UserError, match=r"made.tsv:2: training has not seen the label 'c'; it has seen: a, b"):
        class_labels(examples([("x", "c")]), ("a", "b"))


def test_a_regression_needs_numbers():
    assert number_labels(examples([("a", "1"), ("b", "-2.5")])).tolist() == [1.0, -2.5]
    with pytest.raises(UserError, match=r"made.tsv:3: the label 'nan' is not a number, but task.name = 'regression'"):
        number_labels(examples([("a", "1"), ("b", "nan")]))


@pytest.mark.parametrize("label", ["-1e300", "1e18", "9" * 400, "inf"])
def test_a_number_whose_squared_errors_float32_cannot_add_is_refused(label):
    assert number_labels(examples([("a", "-1e15")])).tolist() == [float(np.float32(-1e15))]
    message = r"made.tsv:3: the label '.*' is too large for squared errors in float32; allowed: up to 1e\+15$"
    with pytest.raises(UserError, match=message):
        number_labels(examples([("a", "1"), ("b", label)]))


def test_labels_are_shown_without_control_characters_and_cut():
    assert shown_label("ham\n\x1b[31m") == r"ham\n\x1b[31m"
    assert shown_label("x" * 5000) == "x" * 40 + "..."
    long = examples([("a", "x" * 5000)])
    with pytest.raises(UserError, match=r"the label 'x{40}\.\.\.'; it has seen: y{40}\.\.\.$"):
        class_labels(long, ["y" * 5000])
    with pytest.raises(UserError, match=r"the label 'x{40}\.\.\.' is not a number"):
        number_labels(long)


def test_a_batch_by_hand():
    split = rows_of(["ab", "cdefghi"], np.array([1, 0], np.int32), length=4)
    batch = split.read(np.array([1, 0, 2]))
    a, b, c, d, e = b"abcde"
    assert batch["inputs"].tolist() == [[BOS, c, d, e], [BOS, a, b, 0], [0, 0, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 0], [0, 0, 0, 0]]
    assert batch["labels"].tolist() == [0, 1, 0]
    assert batch["weights"].tolist() == [1, 1, 0]
    dtypes = {name: array.dtype for name, array in batch.items()}
    assert dtypes.pop("weights") == np.float32
    assert set(dtypes.values()) == {np.dtype(np.int32)}
    assert split.num_tokens.tolist() == [3, 8] and split.cut_share == 0.5


def test_every_epoch_has_every_example_once_in_another_order():
    split = rows_of([f"t{i}" for i in range(12)])
    batches = shuffled_batches(split.read, len(split), seed=3, batch_size=4)
    first, second = np.reshape([batch["labels"] for batch in itertools.islice(batches, 6)], (2, 12)).tolist()
    batches.close()
    assert sorted(first) == sorted(second) == list(range(12)) and first != second


def test_resuming_needs_the_step_alone_and_processes_read_parts_of_the_same_batch():
    split = rows_of([f"t{i}" for i in range(10)])

    def labels(start_step, index=0, count=1):
        options = {"seed": 1, "batch_size": 4, "start_step": start_step}
        batches = shuffled_batches(split.read, len(split), process_index=index, process_count=count, **options)
        taken = [batch["labels"].tolist() for batch in itertools.islice(batches, 5)]
        batches.close()
        return taken

    whole = labels(0)
    assert labels(2)[:3] == whole[2:]
    assert [left + right for left, right in zip(labels(0, 0, 2), labels(0, 1, 2), strict=True)] == whole


def test_held_out_examples_come_in_order_once_and_fillers_weigh_nothing():
    split = rows_of([f"t{i}" for i in range(10)])
    batches = list(ordered_batches(split.read, len(split), batch_size=4))
    weights = np.concatenate([batch["weights"] for batch in batches])
    labels = np.concatenate([batch["labels"] for batch in batches])
    assert labels[weights > 0].tolist() == list(range(10))
    assert weights.tolist() == [1] * 10 + [0] * 2


def test_the_fingerprint_changes_with_a_token_a_label_and_where_an_example_ends():
    labels = np.array([0, 1], np.int32)
    prints = {
        rows_of(["ab", "c"], labels).fingerprint,
        rows_of(["ab", "d"], labels).fingerprint,
        rows_of(["ab", "c"], labels[::-1]).fingerprint,
        rows_of(["abc", "d"], labels).fingerprint,
    }
    assert len(prints) == 4
    assert rows_of(["ab", "c"], labels).fingerprint in prints


def test_class_names_are_saved_and_read_again(tmp_path):
    save_class_names(tmp_path, ("ham", "späm"))
    assert load_class_names(tmp_path) == ("ham", "späm")
    (tmp_path / "labels.json").write_text('{"labels": ["one"]}')
    with pytest.raises(UserError, match="labels.json has no list of two labels or more"):
        load_class_names(tmp_path)


def test_the_fingerprint_of_examples_changes_with_a_text_a_label_and_the_order():
    one, two = Example("a\n", "0", "x:1"), Example("b", "1", "x:2")
    changed = [[two, one], [one], [one._replace(text="a"), two], [one, two._replace(label="0")]]
    assert len({examples_fingerprint(each) for each in ([one, two], *changed)}) == 5
    assert examples_fingerprint([one]) == examples_fingerprint([one._replace(place="y:9")])


def test_a_symbol_without_an_id_is_named_with_its_place():
    known, unknown = Example("( [MAX 1 ) ]", "1", "a.tsv:2"), Example("( [FIRST 1 ) ]", "1", "a.tsv:3")
    with pytest.raises(UserError, match=r"^a.tsv:3: '\[FIRST': the tokenizer has no ids for a word of the text"):
        LabelledRows([known, unknown], np.zeros(2, np.int32), listops_tokenizer(), 8)


def drops_unknown_characters(bos):
    """A tokenizer of `a` and `b` that makes nothing of other characters, as a BPE without an unknown token does."""
    model = hf.models.BPE({"<s>": 0, "a": 1, "b": 2}, [], unk_token=None)
    return HuggingFaceTokenizer(hf.Tokenizer(model).to_str().encode(), bos, "<s>")


@pytest.mark.parametrize("bos", ["<s>", None])
def test_a_text_of_which_the_tokenizer_makes_no_token_is_named_with_its_place(bos):
    texts = [Text("ab", "a.tsv:2"), Text("bc", "a.tsv:3"), Text("cd\n", "a.tsv:4")]
    tokenizer = drops_unknown_characters(bos)
    message = r"^a.tsv:4: the tokenizer makes no token of the text 'cd.*'; allowed: texts with a token$"
    with pytest.raises(UserError, match=message):
        LabelledRows(texts, np.zeros(3, np.int32), tokenizer, 8)
    rows = LabelledRows(texts[:2], np.zeros(2, np.int32), tokenizer, 8)
    assert rows.num_tokens.tolist() == [2 + (bos is not None), 1 + (bos is not None)]


def test_a_file_that_a_run_has_seen_is_found_behind_a_link(tmp_path):
    for name in ("train.tsv", "val.tsv", "test.tsv"):
        (tmp_path / name).write_text("text\tlabel\na\t0\n")
    (tmp_path / "link.tsv").symlink_to(tmp_path / "val.tsv")
    train, val = str(tmp_path / "train.tsv"), str(tmp_path / "val.tsv")
    assert seen_file(f"{tmp_path}/test.tsv,{tmp_path}/link.tsv", train, val) == (val, "task.heldout_files")
    assert seen_file(str(tmp_path), train, val) == (train, "data.files")
    assert seen_file(f"{tmp_path}/test.tsv", train, val) is None and seen_file(train, train, "")[1] == "data.files"
