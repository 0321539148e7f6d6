import gzip
import json

import pytest

from darkformer_jax.data import text_files
from darkformer_jax.data.sources import open_corpus
from darkformer_jax.data.text_files import ignore_read
from darkformer_jax.errors import UserError


def documents(source, files):
    read = []
    corpus = open_corpus(source, str(files))
    found = list(corpus.documents(read.append))
    assert sum(read) == corpus.num_bytes  # a progress bar ends at 100%
    assert found == list(corpus.documents(lambda count: None))
    return found


def test_stdlib():
    found = dict(documents("stdlib", ""))
    assert len(found) > 500
    assert "def namedtuple" in found["collections/__init__.py"]
    assert "pydoc_data/topics.py" not in found
    assert "statement" in found["pydoc_data/topics.py/while"]
    assert not any("/test/" in name or "site-packages" in name or name.startswith("test/") for name in found)
    assert 9e6 < sum(map(len, found.values())) < 16e6


def test_text_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_bytes("caf\u00e9\r\nline\n".encode())
    (tmp_path / "sub/b.txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "c.jsonl").write_text('{"text": "one\\ntwo"}\n\n{"text": ""}\n{"id": 3, "text": "three"}')
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "four"}\n'))
    (tmp_path / "ignored.csv").write_text("1,2")
    expected = ["caf\u00e9\r\nline\n", "one\ntwo", "three", "four", "packed"]
    assert [text for _, text in documents("text", tmp_path)] == expected
    by_globs = documents("text", f"{tmp_path}/**/*.gz, {tmp_path}/*.jsonl*,{tmp_path}/a.txt")
    assert [text for _, text in by_globs] == expected
    assert by_globs[2].name.endswith("c.jsonl:4")
    (tmp_path / "e.md.gz").write_bytes(gzip.compress(b"# title"))
    assert [text for _, text in documents("text", tmp_path / "e.md.gz")] == ["# title"]


def test_the_text_may_be_in_any_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "not this", "content": "one"}\n{"content": "two"}\n')
    assert [text for _, text in open_corpus("text", str(tmp_path), "content").documents(ignore_read)] == ["one", "two"]
    with pytest.raises(UserError, match='a.jsonl:2: no "text" field that is a string; it has: content '):
        documents("text", tmp_path)


def test_a_long_text_file_is_read_in_pieces_that_add_up(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", 100)
    monkeypatch.setattr(text_files, "_PIECE_BYTES", 300)
    lines = "".join(f"line {i} \u00e9\n" for i in range(100))
    unbroken = "\u4f60\U0001f600" * 200
    for text in (lines, unbroken, lines + unbroken + lines):
        (tmp_path / "long.txt").write_text(text, encoding="utf-8")
        pieces = [piece for _, piece in documents("text", tmp_path)]
        assert len(pieces) > 3 and max(map(len, pieces)) <= 400
        assert "".join(pieces) == text
    (tmp_path / "long.txt").write_text(lines, encoding="utf-8")
    assert all(piece.endswith("\n") for _, piece in documents("text", tmp_path))


def test_news_is_read_as_released(tmp_path):
    train = tmp_path / "training-monolingual.tokenized.shuffled"
    heldout = tmp_path / "heldout-monolingual.tokenized.shuffled"
    train.mkdir()
    heldout.mkdir()
    (train / "news.en-00002-of-00100").write_text("third .\n\n fourth . \n")
    (train / "news.en-00001-of-00100").write_text("first .\nsecond .")
    (heldout / "news.en-00000-of-00100").write_text("the published test set .\n")
    (heldout / "news.en.heldout-00000-of-00050").write_text("the published test set .\n")
    assert [text for _, text in documents("news", tmp_path)] == ["first .", "second .", "third .", "fourth ."]


@pytest.mark.parametrize("block", [2, 1 << 20])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "caf\u00e9 \ufeff\nline\n"),
        ("a.md.gz", "# title"),
        ("a.jsonl", '{"text": "one"}\n{"text": "\ufefftwo"}\n'),
        ("a.jsonl.gz", '\n{"text": "one"}'),
        ("news.en-00001-of-00100", "first .\nsecond .\n"),
    ],
)
def test_a_byte_order_mark_is_text_everywhere_but_at_the_beginning(name, content, block, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", block)
    monkeypatch.setattr(text_files, "_PIECE_BYTES", 5)
    source, read = ("news" if name.startswith("news") else "text"), []
    for mark in ("", "\ufeff"):
        data = (mark + content).encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        read.append("".join(text for _, text in documents(source, tmp_path)))
    assert read[0] == read[1] != ""


def test_offsets_are_those_of_the_file_with_its_byte_order_mark(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", 4)
    monkeypatch.setattr(text_files, "_PIECE_BYTES", 4)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert documents("text", tmp_path) == [(f"{tmp_path}/a.txt", "one\n"), (f"{tmp_path}/a.txt@7", "two\n")]


@pytest.mark.parametrize("block", [3, 1 << 20])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", "x.txt is empty"),
        ("x.txt.gz", gzip.compress(b"", mtime=0), "x.txt.gz is empty"),
        ("x.txt", b"\xef\xbb\xbf", "x.txt is empty"),
        ("x.txt", b"\xef\xbb\xbfbad\xff", "x.txt is not UTF-8 text: byte 0xff at offset 6"),
        ("x.txt.gz", b"no gzip", "cannot read .*x.txt.gz"),
        ("x.txt.gz", gzip.compress(b"cut short" * 100, mtime=0)[:-9], "cannot read .*x.txt.gz"),
        ("x.txt", b"good\nbad\xff", "x.txt is not UTF-8 text: byte 0xff at offset 8"),
        ("x.txt", b"h\0i\0", "x.txt is not UTF-8 text: NUL byte at offset 1"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "x.jsonl is not UTF-8 text: byte 0xe9 at offset 24"),
        (
            "x.jsonl",
            b'{"text": "a"}\n\n{"id": 3, "txt": "b"}\n',
            r'x.jsonl:3: no "text" field that is a string; it has: id, txt \(data.text_field or --text_field names the',
        ),
        ("x.jsonl", b"{}\n", 'x.jsonl:1: no "text" field that is a string; it has: nothing'),
        ("x.jsonl", b'{"text": 1}\n', 'x.jsonl:1: no "text" field that is a string; it is a number$'),
        ("x.jsonl", b'{"text": null}\n', 'x.jsonl:1: no "text" field that is a string; it is null$'),
        ("x.jsonl", b'["text"]\n', 'x.jsonl:1: no "text" field that is a string; the line is a list, not an object$'),
        ("x.jsonl", json.dumps({str(i): i for i in range(99)}).encode(), "it has: 0, 1, .*, 18, 19, ... "),
        ("x.jsonl", b"{'text': 'a'}\n", "x.jsonl:1: not a JSON object"),
        ("x.jsonl", json.dumps({"text": "ab\ud800"}).encode(), "x.jsonl:1: .*surrogate at character 2"),
    ],
)
def test_files_that_are_not_text(name, content, message, block, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", block)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        documents("text", tmp_path)


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", 100)
    (tmp_path / "x.jsonl").write_text("\n" + "a" * 5000)
    with pytest.raises(UserError, match="x.jsonl:2: the line is longer than 1000 bytes"):
        documents("text", tmp_path)


@pytest.mark.parametrize(
    ("source", "files", "message"),
    [
        ("text", "", "globs of .txt"),
        ("text", "{dir}/*.txt", r"no file matches '.*\*.txt'"),
        (
            "text",
            "{dir}",
            "holds no .txt, .*, .parquet file; it holds 2 .zst, 1 .arrow, 1 .csv, 1 .gz, 1 without a suf",
        ),
        ("text", "{dir}/empty", "holds no .txt, .*, .parquet file; it holds no file$"),
        ("text", "{dir}/x.csv", "x.csv is not a file the text source reads; allowed: .txt, .*, .jsonl.gz, .parquet$"),
        ("text", "{dir}/*.zst", "a.jsonl.zst is not a file the text source reads; allowed: .txt, .*, .parquet$"),
        ("text", "{dir}/x.arrow", "x.arrow is not a file the text source reads; allowed: .txt, .*, .parquet$"),
        (
            "text",
            "{dir}/x.parquet.gz",
            "x.parquet.gz is not a file the text source reads; allowed: .txt, .*, .parquet$",
        ),
        ("news", "{dir}", "holds no news.en-"),
        ("news", "{dir}/x.csv", "is not a directory"),
        ("web", "", "'web' is unknown; allowed: stdlib, text, news"),
    ],
)
def test_sources_that_find_nothing(source, files, message, tmp_path):
    (tmp_path / "x.csv").write_text("1,2")
    (tmp_path / "empty").mkdir()
    for name in ("a.jsonl.zst", "b.txt.zst", "x.arrow", "x.parquet.gz", "README"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=message):
        open_corpus(source, files.format(dir=tmp_path))


def test_what_is_left_of_a_directory_is_said(tmp_path, caplog):
    for name in ("a.txt", "b.jsonl.zst", "c.jsonl.zst", "d.csv", ".DS_Store"):
        (tmp_path / name).write_text("text")
    assert len(list(open_corpus("text", str(tmp_path)).documents(ignore_read))) == 1
    assert f"of directory {tmp_path} these files are not read: 2 .zst, 1 .csv" in caplog.text
    caplog.clear()
    open_corpus("text", f"{tmp_path}/*.txt")
    assert not caplog.text
