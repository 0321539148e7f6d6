"""Texts in Parquet files."""

import json
import sys

import numpy as np
import pytest

from darkformer_jax.data import load_data
from darkformer_jax.data.labelled import Columns, read_examples
from darkformer_jax.data.parquet_files import require_pyarrow
from darkformer_jax.data.prepared import prepare
from darkformer_jax.data.sources import open_corpus
from darkformer_jax.data.text_files import ignore_read
from darkformer_jax.errors import UserError

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = [f"document {i} caf\u00e9\n" * (i % 5 + 1) for i in range(3000)]


def write(path, column, name="text", **options):
    parquet.write_table(pa.table({"id": np.arange(len(column)), name: column}), path, **options)
    return str(path)


def documents(files, field="text"):
    read = []
    corpus = open_corpus("text", str(files), field)
    found = list(corpus.documents(read.append))
    assert sum(read) == corpus.num_bytes and min(read) >= 0  # a progress bar ends at 100%
    assert found == list(corpus.documents(ignore_read))
    return found


@pytest.mark.parametrize("options", [{}, {"row_group_size": 700}, {"row_group_size": 1, "compression": "zstd"}])
@pytest.mark.parametrize("kind", ["string", "large_string", "string_view"])
def test_any_column_of_strings_is_read_in_its_order(kind, options, tmp_path):
    path = write(tmp_path / "a.parquet", pa.array(TEXTS[:1500], kind), "content", **options)
    found = documents(path, "content")
    assert [text for _, text in found] == TEXTS[:1500]
    assert [name for name, _ in found[:2]] == [f"{path}:1", f"{path}:2"]


def test_categories_are_strings_and_empty_texts_are_no_documents(tmp_path):
    path = write(tmp_path / "a.parquet", pa.array(["one", "", "two", "one"]).dictionary_encode())
    assert documents(path) == [(f"{path}:1", "one"), (f"{path}:3", "two"), (f"{path}:4", "one")]


def test_a_row_group_is_not_read_before_its_turn(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, pa.array(TEXTS), row_group_size=1000, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    start = parquet.read_metadata(path).row_group(2).column(1).data_page_offset
    data[start : start + 64] = b"\xff" * 64
    path.write_bytes(data)
    rows = open_corpus("text", str(path)).documents(ignore_read)
    assert [next(rows).text for _ in range(2000)] == TEXTS[:2000]
    with pytest.raises(UserError, match=r"^cannot read .*a.parquet: [^\n]+$"):
        next(rows)


def test_a_model_learns_the_same_from_parquet_as_from_json_lines(tmp_path):
    write(tmp_path / "a.parquet", pa.array(TEXTS[:300]), row_group_size=70)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:300]))
    one, other = (load_data("text", f"{tmp_path}/a.{kind}", "bpe:300", 0.1) for kind in ("parquet", "jsonl"))
    assert one.fingerprint == other.fingerprint
    options = {"source": "text", "tokenizer_spec": "bpe:300", "heldout_fraction": 0.1}
    prepare(str(tmp_path / "out"), files=f"{tmp_path}/a.parquet", **options)
    prepared = load_data("array_record", str(tmp_path / "out"), "bpe:300", 0.1)
    assert prepared.train.num_tokens == one.train.num_tokens
    everything = (np.array([0]), one.train.num_tokens)
    np.testing.assert_array_equal(prepared.train.read(*everything)[0], one.train.read(*everything)[0])


def not_utf8(count):
    values = pa.py_buffer(b"\xff\xfe" * count)
    return pa.Array.from_buffers(pa.string(), count, [None, pa.array(["ab"] * count).buffers()[1], values])


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array(["a", "b", None]), 'a.parquet: row 3 of 3: "text" is null; a row needs text$'),
        (pa.array([None, "b"]).dictionary_encode(), 'a.parquet: row 1 of 2: "text" is null'),
        (pa.array([], pa.string()), "a.parquet is empty; a data file needs text$"),
        (pa.array([1, 2]), 'a.parquet: the column "text" has the type int64; allowed: string or large_string$'),
        (pa.array([b"a"]), 'the column "text" has the type binary; allowed: string or large_string$'),
        (not_utf8(2), 'a.parquet: row 1 of 2: "text" is not UTF-8 text at offset 0$'),
    ],
)
def test_a_column_that_is_not_text_is_named(column, message, tmp_path):
    with pytest.raises(UserError, match=message):
        documents(write(tmp_path / "a.parquet", column))


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    path = write(tmp_path / "a.parquet", pa.array(["a"]), "content")
    message = r'a.parquet: no column "text"; it has: id, content \(data.text_field or --text_field names the one'
    with pytest.raises(UserError, match=message):
        documents(path)
    parquet.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(UserError, match='a.parquet has 2 columns "text"; allowed: one'):
        documents(path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 100])
def test_a_file_that_is_no_parquet_is_named(content, tmp_path):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"^cannot read .*a.parquet: [^\n]+$"):
        documents(tmp_path)


def test_without_pyarrow_the_refusal_says_what_to_install_before_anything_is_read(tmp_path, monkeypatch):
    (tmp_path / "a.txt").touch()  # is refused when it is read
    (tmp_path / "b.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = (
        "b.parquet: Parquet files need the package pyarrow: bash launch/install.sh parquet, or pip install pyarrow$"
    )
    with pytest.raises(UserError, match=message):
        open_corpus("text", str(tmp_path))
    monkeypatch.undo()
    require_pyarrow("b.parquet")


@pytest.mark.parametrize("labels", [["ham", "spam", "ham"], [0, 1, 0], [0.5, 1.25, -3.0]])
def test_labelled_rows_are_the_examples_of_json_lines(labels, tmp_path):
    texts = ["a", "b\nc", "d"]
    parquet.write_table(pa.table({"label": labels, "text": texts, "id": [1, 2, 3]}), tmp_path / "a.parquet")
    lines = [json.dumps({"text": text, "label": label}) for text, label in zip(texts, labels, strict=True)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n")
    columns = Columns("text", "label")
    rows, of_lines = (read_examples(str(tmp_path / name), columns) for name in ("a.parquet", "b.jsonl"))
    assert [row[:2] for row in rows] == [line[:2] for line in of_lines]
    assert rows[1].place == f"{tmp_path}/a.parquet:2"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"text": ["a", "b"], "label": ["x", None]}, "a.parquet:2: there is no label in 'label'"),
        ({"text": ["a", "b"], "class": ["x", "y"]}, 'no column "label"; it has: text, class .task.text_column or'),
        ({"text": ["a", "b"], "label": [[1], [2]]}, "a.parquet:1: the label in 'label' is neither a string nor a"),
        ({"text": ["a", " "], "label": ["x", "y"]}, "a.parquet:2: the text in 'text' is empty"),
        ({"text": [1, 2], "label": ["x", "y"]}, "the column .text. has the type int64"),
    ],
)
def test_what_is_wrong_in_labelled_rows_is_named(table, message, tmp_path):
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        read_examples(str(tmp_path / "a.parquet"), Columns("text", "label"))


def test_labelled_rows_may_be_pairs(tmp_path):
    table = pa.table({"b": ["It is.", "No."], "label": [1, 0], "a": ["Is it?", "Is it so?"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    rows = read_examples(str(tmp_path / "a.parquet"), Columns("a,b", "label"))
    assert [row[:2] for row in rows] == [("Is it?\nIt is.", "1"), ("Is it so?\nNo.", "0")]


@pytest.mark.parametrize("other", [["plain", "too"], [{"text": "nested"}, {"text": "too"}], [{"x": 1}, {"x": 2}]])
def test_a_column_whose_name_has_a_point_is_read_whatever_the_other_columns_are(tmp_path, other):
    table = {"id": [1, 2], "meta": other, "meta.text": ["flat", "as well"], "meta.label": ["x", "y"]}
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    examples = read_examples(str(tmp_path / "a.parquet"), Columns("meta.text", "meta.label"))
    assert [example[:2] for example in examples] == [("flat", "x"), ("as well", "y")]
