"""The verb: both directions from the command line, and one line for every mistake."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from darkformer_jax import convert, generate
from darkformer_jax.data.tokenizers import HuggingFaceTokenizer
from darkformer_jax.runs.load import load_model
from darkformer_jax.runs.origin import hand_on_origin
from darkformer_jax.runs.workdir import Workdir
from tests.pretrained.tiny_sources import write_llama


def run(*flags):
    convert.main(convert.parse_flags(["convert", *flags]))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="module")
def workdir(source, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "imported"
    run(f"--source={source}", f"--workdir={directory}")
    return directory


def test_in_generate_and_out(source, workdir, tmp_path, capsys):
    flags = ["generate", f"--workdir={workdir}", "--prompt=w3 w4", "--max_new_tokens=3", "--temperature=0"]
    generate.main(generate.parse_flags(flags))
    assert capsys.readouterr().out.startswith("w3 w4")
    run(f"--workdir={workdir}", f"--export_hf={tmp_path}/out", "--dtype=bfloat16", "--max_shard_size=2KB")
    assert f"{tmp_path}/out: LlamaForCausalLM, step 0, 20 arrays" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    run(f"--source={tmp_path}/out", f"--workdir={tmp_path}/again", "--dtype=float32")
    assert "again: llama, 2 layers of width 16, 64 ids" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--source={dir}/none", "--workdir={dir}/w"],
            "--source={dir}/none: no such file or directory (nothing is downloaded)",
        ),
        (
            ["--source=Org/Model-1.5B", "--workdir={dir}/w"],
            "hf download Org/Model-1.5B --local-dir models/Model-1.5B, then",
        ),
        (["--source={dir}/a.bin", "--workdir={dir}/w"], "--source={dir}/a.bin: allowed: a Hugging Face directory or"),
        (["--source={dir}", "--workdir={dir}/w"], "cannot read {dir}/config.json: No such file"),
        (["--source={source}", "--workdir={dir}"], "{dir} is there already; give a new or an empty directory"),
        (["--source={source}", "--workdir={dir}/a.bin"], "{dir}/a.bin is there already"),
        (["--source={source}", "--workdir={dir}/a.bin/w"], "{dir}/a.bin/w cannot be written: "),
        (["--source={source}", "--workdir={dir}/w", "--dtype=float16"], "--dtype=float16: allowed for a workdir"),
        (["--source={source}", "--workdir={dir}/w", "--step=3"], "--step=3: only an export chooses a checkpoint"),
        (["--workdir={workdir}", "--export_hf={dir}"], "{dir} is there already"),
        (["--workdir={workdir}", "--export_hf={dir}/x", "--step=3"], "no checkpoint step 3 in"),
        (["--workdir={dir}", "--export_hf={dir}/x"], "{dir}/config.json cannot be read"),
        (["--workdir={workdir}", "--export_hf={dir}/x", "--max_shard_size=5"], "--max_shard_size=5: must be a number"),
        (["--workdir={workdir}"], "one of the arguments --source --export_hf is required"),
        (["--source=a", "--export_hf=b", "--workdir=c"], "argument --export_hf: not allowed with argument --source"),
        (["--source=a"], "the following arguments are required: --workdir"),
        (["--source=a", "--workdir=c", "--dtype=int8"], "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(source, workdir, tmp_path, flags, message, capsys):
    (tmp_path / "a.bin").touch()
    names = {"dir": tmp_path, "source": source, "workdir": workdir}
    with pytest.raises(SystemExit) as exit_:
        run(*(flag.format(**names) for flag in flags))
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert message.format(**names) in printed.err and printed.err.count("\n") == 1, printed.err
    assert printed.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_workdir_behind_a_link_or_a_mount_point(source, tmp_path, monkeypatch, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    run(f"--source={source}", f"--workdir={tmp_path}/link")
    assert (tmp_path / "there/config.json").is_file() and (tmp_path / "link").is_symlink()
    capsys.readouterr()
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "mounted")
    with pytest.raises(SystemExit):
        run(f"--source={source}", f"--workdir={tmp_path}/mounted")
    assert "mounted is a mount point; give a directory inside it" in capsys.readouterr().err


def test_a_terminated_import_leaves_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(HuggingFaceTokenizer, "save", lambda self, directory: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit_:
        run(f"--source={source}", f"--workdir={tmp_path}/w")
    assert exit_.value.code == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir()) and signal.getsignal(signal.SIGTERM) is before


def test_a_run_from_an_import_exports_what_the_source_said(source, workdir, tmp_path):
    """The original's lengths and ends of text, however long the rows of the fine-tuning were."""
    run_ = tmp_path / "run"
    shutil.copytree(workdir, run_)
    (run_ / "pretrained.json").unlink()
    config = json.loads((run_ / "config.json").read_text())
    (run_ / "config.json").write_text(json.dumps(config | {"sequence_length": 32}))
    hand_on_origin(Workdir(workdir), Workdir(run_))
    run(f"--workdir={run_}", f"--export_hf={tmp_path}/out")
    exported = json.loads((tmp_path / "out/config.json").read_text())
    assert (exported["max_position_embeddings"], exported["eos_token_id"]) == (64, [1, 2])
    assert load_model(Workdir(run_)).ends == {1, 2}


def test_sources_are_required_to_be_there_before_anything_is_written(tmp_path):
    with pytest.raises(SystemExit):
        run(f"--source={tmp_path}/none", f"--workdir={tmp_path}/w")
    assert not list(tmp_path.iterdir())
