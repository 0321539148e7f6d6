"""`~` at the beginning of a path is the home, in every flag and field: a shell leaves it there in `--out=~/x`."""

import os

import pytest

from darkformer_jax import calibrate, convert, evaluate, generate, linearise, lm_eval, prepare_data, report
from darkformer_jax.errors import UserError
from tests.pretrained.tiny_sources import import_source, write_llama
from tests.tiny_runs import Command, run, tiny_config, write_text

pytestmark = pytest.mark.standard_promotion

VERBS = {"calibrate": calibrate, "convert": convert, "evaluate": evaluate, "generate": generate}
VERBS |= {"linearise": linearise, "lm_eval": lm_eval, "prepare_data": prepare_data, "report": report}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home with a model, a text, a directory that is not empty, and an experiment."""
    directory = tmp_path_factory.mktemp("home")
    write_llama(directory / "hf")
    import_source(directory / "hf", directory / "run")
    write_text(directory / "text.txt")
    (directory / "empty.txt").touch()
    (directory / "taken").mkdir()
    (directory / "taken" / "file.json").touch()
    lines = ("from darkformer_jax.config import base", "def get_config(steps):", "    return base.get_config()")
    (directory / "experiment.py").write_text("\n".join(lines))
    return directory


@pytest.fixture(autouse=True)
def elsewhere(home, tmp_path, monkeypatch):
    """The current directory: nothing may be written there, such as a folder named ~."""
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    yield
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generate --workdir=~/none --prompt=a", "{home}/none/config.json cannot be read"),
        ("generate --workdir=~/run --prompts_file=~/empty.txt", "{home}/empty.txt: the file is empty"),
        ("evaluate --workdir=~/none --text=~/text.txt", "{home}/none/config.json cannot be read"),
        ("evaluate --workdir=~/run --text=~/none.txt", "no file matches '{home}/none.txt'"),
        ("evaluate --workdir=~/run --text=~/text.txt --json=~/taken/file.json", "{home}/taken/file.json: the file ex"),
        ("lm_eval --workdir=~/none --tasks=a", "{home}/none/config.json cannot be read"),
        ("lm_eval --workdir=~/run --tasks=a --include_path=~/none", "--include_path={home}/none: no such directory"),
        ("lm_eval --workdir=~/run --tasks=~/none.yaml", "--tasks={home}/none.yaml: no such file"),
        ("lm_eval --workdir=~/run --tasks=a --json=~/taken/file.json", "{home}/taken/file.json: the file exists"),
        ("convert --source=~/none --workdir=~/new", "--source={home}/none: no such file"),
        ("convert --source=~/hf --workdir=~/taken", "~/taken is there already"),
        ("convert --workdir=~/none --export_hf=~/new", "{home}/none/config.json cannot be read"),
        ("convert --workdir=~/run --export_hf=~/taken", "~/taken is there already"),
        ("calibrate --workdir=~/none --text=~/text.txt --out=~/new", "{home}/none/config.json cannot be read"),
        ("calibrate --workdir=~/run --text=~/none.txt --out=~/new", "no file matches '{home}/none.txt'"),
        ("calibrate --workdir=~/run --text=~/text.txt --out=~/taken", "~/taken is there already"),
        (
            "calibrate --workdir=~/run --text=~/text.txt --test_text=~/none.txt --out=~/new "
            "--passages=2 --context=16 --window=0",
            "no file matches '{home}/none.txt'",
        ),
        ("linearise --workdir=~/none --text=~/text.txt --out=~/new", "{home}/none/config.json cannot be read"),
        (
            "linearise --workdir=~/run --text=~/none.txt --out=~/new --stages=transfer --context=16 --window=0",
            "{home}/none.txt",
        ),
        (
            "linearise --workdir=~/run --text=~/text.txt --out=~/taken --stages=transfer --context=16 --window=0",
            "{home}/taken: has",
        ),
        ("report --runs=~/none --out=~/new", "--runs={home}/none: no run matches"),
        ("report --runs=~/run --out=~/taken", "~/taken is there already"),
        ("prepare_data --source=text --files=~/none.txt --out=~/new", "no file matches '{home}/none.txt'"),
        ("prepare_data --source=news --files=~/taken --out=~/new", "directory '{home}/taken' holds no news.en"),
        ("prepare_data --source=text --files=~/text.txt --out=~/taken", "~/taken is there already"),
        ("prepare_data --source=text --files=~/text.txt --out=~/new --tokenizer=~/none", "tokenizer '{home}/none' is"),
    ],
)
def test_flags_of_verbs(command, message, home, capsys):
    argv = command.split()
    verb = VERBS[argv[0]]
    with pytest.raises(SystemExit) as ended:
        verb.main(verb.parse_flags(argv))
    assert ended.value.code == 2 and message.format(home=home) in capsys.readouterr().err
    assert not (home / "new").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.files": "~/none.txt"}, "no file matches '{home}/none.txt'"),
        ({"data.source": "news", "data.files": "~/taken"}, "directory '{home}/taken' holds no news.en"),
        ({"data.source": "array_record", "data.files": "~/taken"}, "{home}/taken"),
        ({"data.tokenizer": "~/none"}, "tokenizer '{home}/none' is not a file"),
        ({"init_from": "~/none"}, "init_from = {home}/none: there is no checkpoint"),
        ({"distill.workdir": "~/none", "distill.weight": 0.5}, "{home}/none/config.json cannot be read"),
        (
            {"task.name": "regression", "data.source": "labelled", "data.files": "~/none.tsv", "optimizer.z_loss": 0.0},
            "no file matches '{home}/none.tsv'",
        ),
        (
            {
                "task.name": "regression",
                "data.source": "labelled",
                "data.files": "~/table.tsv",
                "task.heldout_files": "~/none.tsv",
                "optimizer.z_loss": 0.0,
            },
            "no file matches '{home}/none.tsv'",
        ),
    ],
)
def test_fields_of_a_config(changes, message, home):
    (home / "table.tsv").write_text("text\tlabel\na\t1\nb\t2\n")
    with pytest.raises(UserError) as error:
        run(tiny_config(**{"data.files": "~/text.txt"} | changes), "~/new")
    assert message.format(home=home) in str(error.value)


def test_the_file_of_a_config_and_the_workdir_of_a_training(home, tmp_path_factory):
    flags = ["--workdir=~/trained", "--dry_run", "--config.num_layers=2"]
    streams = tmp_path_factory.mktemp("streams")
    for path, message in (
        ("~/experiment.py:1", "num_layers: there is no such field"),
        ("~/none.py", f"{home}/none.py"),
    ):
        ended = Command("train.py", [f"--config={path}", *flags], streams, environment={"HOME": str(home)}).wait()
        assert ended.status == 2 and message in ended.err
