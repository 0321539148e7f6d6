import re
import subprocess
import sys

import numpy as np
import pytest

from darkformer_jax import prepare_data
from darkformer_jax.data import load_data

BENCHMARKS = [
    *([f"--source={source}"] for source in ("fashion_mnist", "cifar10", "imdb", "aan")),
    *(["--source=lra_release", f"--task={task}"] for task in ("listops", "pathfinder32")),
    ["--source=glue", "--task=rte"],
]


def run(*flags):
    prepare_data.main(prepare_data.parse_flags(["prepare_data", *flags]))


def write_release(root):
    """Sentences laid out as the One Billion Word release is."""
    random = np.random.default_rng(0)
    words = ["the", "a", "market", "of", "news", "said", "in", "government", "on", "was", "people", "and"]
    directory = root / "training-monolingual.tokenized.shuffled"
    directory.mkdir(parents=True)
    for shard in (1, 2, 3):
        sentences = [" ".join(random.choice(words, 12)) + " ." for _ in range(300)]
        (directory / f"news.en-{shard:05d}-of-00100").write_text("\n".join(sentences) + "\n")
    return root


def test_the_one_billion_word_road(tmp_path, capsys):
    release = write_release(tmp_path / "release")
    out = str(tmp_path / "out")
    run("--source=news", f"--files={release}", f"--out={out}", "--tokenizer=bpe:300", "--heldout_fraction=0.05")
    printed = capsys.readouterr()
    assert "train" in printed.out and "documents" in printed.out
    assert "tokenising: 100%" in printed.err
    data = load_data("array_record", out, "bpe:300", 0.05)
    assert data.train.num_documents + data.heldout.num_documents == 900
    assert 20 < data.heldout.num_documents < 75


def test_the_text_may_be_in_any_field(tmp_path):
    (tmp_path / "x.jsonl").write_text("".join(f'{{"text": 1, "content": "document {i}"}}\n' for i in range(99)))
    flags = ("--source=text", f"--files={tmp_path}/x.jsonl", "--text_field=content", f"--out={tmp_path}/out")
    run(*flags, "--heldout_fraction=0.2")
    data = load_data("array_record", f"{tmp_path}/out", "", 0)
    assert data.train.num_documents + data.heldout.num_documents == 99


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source=news", "--files={dir}"], "error: directory .* holds no news.en"),
        (["--source=text", "--files={dir}/*.txt"], "error: no file matches"),
        (["--source=text", "--files={dir}/x.jsonl", "--tokenizer=bpe:9"], "error: tokenizer 'bpe:9'"),
        (["--source=text", "--files={dir}/x.jsonl", "--heldout_fraction=2"], "error: heldout_fraction=2.0"),
        (["--source=text", "--files={dir}/x.jsonl", "--shard_tokens=0"], "error: shard_tokens=0"),
        (["--source=text"], "error: .*"),
        (["--source=web"], "error: .*--source.*web"),
        (["--source=stdlib", "--sauce=1"], "error: .*--sauce"),
        (["--source=text", "--files={dir}/x.jsonl", "--text_field=body"], 'error: .*x.jsonl:1: no "body" field'),
        (
            ["--source=news", "--files={dir}", "--text_field=text"],
            "error: --text_field=text: --source=news does not use it; allowed: text",
        ),
        (
            ["--source=stdlib", "--files={dir}"],
            "error: --files=.*: --source=stdlib does not use it; allowed: text, news",
        ),
    ],
)
def test_mistakes_get_one_line_and_status_2(flags, message, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(SystemExit) as exit_:
        run(*(flag.format(dir=tmp_path) for flag in flags), f"--out={tmp_path / 'out'}")
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.match(message, lines[0])
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("flags", BENCHMARKS, ids=" ".join)
@pytest.mark.parametrize("name", ["archive.tar.gz", "nowhere"])
def test_what_is_no_directory_is_said_to_be_a_file_or_not_there(flags, name, tmp_path, capsys):
    (tmp_path / "archive.tar.gz").write_bytes(b"x")
    with pytest.raises(SystemExit) as exit_:
        run(*flags, f"--files={tmp_path / name}", f"--out={tmp_path / 'out'}")
    assert exit_.value.code == 2
    what = "is a file" if name == "archive.tar.gz" else "is not there"
    assert re.fullmatch(f"error: .*/{name} {what}; --files is the directory .*\n", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["archive.tar.gz"]


def test_help_and_status_of_the_command(tmp_path):
    command = [sys.executable, "-m", "darkformer_jax.prepare_data"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    for flag in ("--source", "--files", "--out", "--tokenizer", "--heldout_fraction", "--shard_tokens"):
        assert flag in shown.stdout
    failed = subprocess.run(
        [*command, "--source=news", f"--files={tmp_path}", f"--out={tmp_path}/out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: directory") and failed.stderr.count("\n") == 1
