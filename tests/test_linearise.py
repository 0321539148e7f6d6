"""The verb: an exact model in, a linear one out, stage by stage; killed anywhere, the same command ends the same."""

import json
import shutil
import signal

import pytest

from darkformer_jax import evaluate, generate, linearise
from darkformer_jax.errors import UserError
from darkformer_jax.linearisation import run as linearisation
from darkformer_jax.linearisation.text import read_text
from darkformer_jax.runs.workdir import Workdir
from tests.tiny_runs import READS_COMPILED, Command, saved_arrays, tiny_config, write_text, write_workdir

pytestmark = pytest.mark.standard_promotion  # an optimizer runs

SMALL = (
    "--context=32", "--long_context=48", "--batch_size=2", "--passages=6", "--num_features=4", "--window=0", "--lora=2",
    "--dtype=float32", "--test_tokens=200", "--steps=transfer=2,hidden=3,logits=3,long=2",
)  # fmt: skip
HEADS = ("--exact_heads=auto:1", "--geometry=balanced", "--geometry_init=0.7")
DIRECTORIES = ("1-transfer", "2-hidden", "3-logits", "4-long")


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    directory = tmp_path_factory.mktemp("exact")
    config = tiny_config(model__attention__kind="softmax", model__num_layers=2, sequence_length=64)
    write_workdir(directory, config)
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 12000)


def command(exact, text, out, *flags):
    return ["linearise", f"--workdir={exact}", f"--text={text}", f"--out={out}", *SMALL, *flags]


def run(*arguments):
    linearise.main(linearise.parse_flags(command(*arguments)))


@pytest.fixture(scope="module")
def whole(exact, text, tmp_path_factory):
    """All stages in one go."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(exact, text, out)
    return out


@pytest.fixture(scope="module")
def with_heads(exact, text, tmp_path_factory):
    """Likewise, beside an exact head."""
    out = tmp_path_factory.mktemp("with_heads") / "out"
    run(exact, text, out, *HEADS)
    return out


def test_the_last_stage_is_a_linear_model_and_the_report_says_what_each_cost(whole, exact, capsys):
    assert sorted(path.name for path in whole.iterdir() if path.is_dir()) == list(DIRECTORIES)
    report = json.loads((whole / "report.json").read_text())
    assert list(report["models"]) == ["exact", "transfer", "hidden", "logits", "long"]
    assert report["context"] == 48 and report["copied"] == 24
    assert all(figures["tokens"] == 200 and figures["copy"] > 0 for figures in report["models"].values())
    assert (whole / "report.png").read_bytes().startswith(b"\x89PNG")
    for name in DIRECTORIES[1:]:
        config = Workdir(whole / name).read_config()
        assert config["model"]["attention"]["kind"] == "dark" and config["model"]["lora_rank"] == 2
        assert config["distill"]["workdir"] == str(exact)
        assert config["distill"]["hidden_weight"] == (name == "2-hidden")
    assert Workdir(whole / "4-long").read_config()["sequence_length"] == 48
    prompt = ["generate", f"--workdir={whole}/4-long", "--prompt=the", "--max_new_tokens=2"]
    generate.main(generate.parse_flags(prompt))
    assert "the" in capsys.readouterr().out


def test_the_same_command_on_a_finished_directory_only_reports(whole, exact, text, capsys, monkeypatch):
    monkeypatch.setattr(linearisation, "run_stage", None)
    monkeypatch.setattr(linearisation, "measure", None)
    run(exact, text, whole)
    printed = capsys.readouterr().out
    assert "4-long" in printed and printed.count("done") == 4
    assert f"the model: {whole}/4-long" in printed
    assert "over exact" in printed and "stage 1 of 4" not in printed


KILLS = """
import os, signal, sys
sys.path.insert(0, os.getcwd())
from absl import app
from darkformer_jax import linearise
from darkformer_jax.calibration import fitting
from darkformer_jax.training.log import TrainingLog

stage = os.environ["KILLED_IN"]
saved, errors = TrainingLog.saved, fitting.errors
layers = []

def saved_and_killed(self, step):
    saved(self, step)
    if step == 2 and str(self._curve._workdir).endswith(stage):
        os.kill(os.getpid(), signal.SIGKILL)

def errors_and_killed(*arguments):
    layers.append(1)
    if stage == "transfer" and len(layers) == 3:  # in the second layer
        os.kill(os.getpid(), signal.SIGKILL)
    return errors(*arguments)

TrainingLog.saved, fitting.errors = saved_and_killed, errors_and_killed
app.run(linearise.main, flags_parser=linearise.parse_flags)
"""


def test_killed_in_each_stage_the_same_command_ends_bit_for_bit_the_same(with_heads, exact, text, tmp_path, capfd):
    script, out = tmp_path / "kills.py", tmp_path / "out"
    script.write_text(KILLS)
    for stage in ("transfer", "2-hidden", "3-logits", "4-long"):
        streams = tmp_path / stage
        streams.mkdir()
        argv = command(exact, text, out, *HEADS)[1:]
        killed = Command(str(script), argv, streams, environment={"KILLED_IN": stage}, jax_config=READS_COMPILED)
        ended = killed.wait()
        assert ended.status == -signal.SIGKILL, ended.err
        left = {path.suffix for path in out.glob(".1-transfer.*")}  # the next command removes it
        assert left == ({".partial", ".begun"} if stage == "transfer" else set())
    was = (out / "1-transfer/calibration.json").stat().st_mtime_ns
    assert not (out / "report.png").exists()
    run(exact, text, out, *HEADS)
    assert f"resuming {out}/4-long from step" in capfd.readouterr().err
    assert (out / "1-transfer/calibration.json").stat().st_mtime_ns == was
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == list(DIRECTORIES)
    for name in DIRECTORIES:
        assert saved_arrays(out / name) == saved_arrays(with_heads / name)
    assert json.loads((out / "report.json").read_text()) == json.loads((with_heads / "report.json").read_text())


def test_more_stages_may_follow_and_begin_where_the_last_one_ended(exact, text, whole, tmp_path):
    run(exact, text, tmp_path / "out", "--stages=transfer,hidden", "--steps=transfer=2,hidden=3")
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == list(DIRECTORIES[:2])
    run(exact, text, tmp_path / "out", "--stages=transfer,hidden,logits", "--steps=transfer=2,hidden=3,logits=3")
    assert saved_arrays(tmp_path / "out/3-logits") == saved_arrays(whole / "3-logits")


def test_the_heads_that_transfer_leaves_exact_stay_exact_in_later_stages(with_heads):
    (layer,) = json.loads((with_heads / "1-transfer/calibration.json").read_text())["heads"]["chosen"]
    for name in DIRECTORIES:
        attention = Workdir(with_heads / name).read_config()["model"]["attention"]
        entries = attention["pattern"].split(",")
        assert ["exact_kv_heads=1" in entry for entry in entries] == [number == int(layer) for number in (0, 1)]
        assert attention["balanced"] and attention["geometry_init"] == 0.7


def test_a_directory_that_was_begun_before_there_were_exact_heads_goes_on(exact, text, tmp_path, capsys):
    few = ("--stages=transfer", "--steps=transfer=0")
    run(exact, text, tmp_path, *few)
    settings = json.loads((tmp_path / "settings.json").read_text())
    for name in ("geometry", "geometry_init", "far_gain", "exact_heads"):
        del settings[name]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    run(exact, text, tmp_path, *few)
    assert f"the model: {tmp_path}/1-transfer" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(exact, text, tmp_path, *few, "--exact_heads=auto:1")
    assert "--exact_heads: none -> auto:1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir={whole}/1-transfer"], "its layers are dark; allowed: an exact model, of softmax, softmax_local"),
        (["--workdir={dir}/none"], "{dir}/none/config.json cannot be read"),
        (["--text={dir}/none.txt"], "no file matches"),
        (["--text={dir}/few.txt"], "{dir}/few.txt: 0 passages of --context=32 tokens; 6 are needed (--passages)"),
        (["--steps=hidden=20000"], "--text={text}: too little for hidden: "),
        (["--batch_size=900"], "--text={text}: too little for hidden: "),
        (["--test_text={text}"], "--test_text={text}: has {text} of --text; allowed: other text"),
        (["--test_text={dir}/few.txt"], "no document has 24 tokens to be repeated"),
        (["--passages=4000"], "passages of --context=32 tokens; 4000 are needed (--passages)"),
        (["--context=100", "--long_context=200"], "--context=200: {exact} was made for 64 tokens; allowed: at most"),
        (["--long_context=65"], "--long_context=65: {exact} was made for 64 tokens; allowed: at most that"),
        (["--long_context=32"], "--long_context=32: must be above --context=32"),
        (["--stages=hidden,logits"], "--stages=hidden,logits: allowed: transfer,hidden,logits,long, or some of them"),
        (["--stages=transfer,long,logits"], "or some of them in this order"),
        (["--steps=hidden=0"], "--steps=hidden=0: 'hidden=0': must be at least 1"),
        (["--steps=hiden=5"], "--steps=hiden=5: 'hiden=5': allowed: each stage once"),
        (["--stages=transfer", "--steps=long=5"], "--steps=long=5: long is not in --stages=transfer"),
        (["--exact_layers=2"], "--exact_layers: there is no layer 2; allowed: 0 to 1"),
        (["--exact_layers=auto"], "--exact_layers=auto: how many? allowed: auto:N"),
        (["--exact_heads=3"], "--exact_heads=3; allowed: none, auto:N with N from 1, auto with --cache_budget"),
        (["--exact_heads=auto:4"], "--exact_heads=auto:4: of 4 key/value heads one at least must be replaced"),
        (["--exact_heads=auto:1", "--exact_layers=1"], "with --exact_layers=1: allowed: one of them"),
        (["--exact_heads=auto", "--cache_budget=1kB@64"], "--cache_budget=1kB@64: is 0.001 MB; without an exact head"),
        (["--window=7"], "model.attention.window = 7"),
        (["--batch_size=0"], "--batch_size=0: must be from 1 to"),
        (["--dtype=float16"], "argument --dtype: invalid choice: 'float16'"),
        (["--out={dir}"], "--out={dir}: has few.txt, but no settings.json; give a new or an empty directory"),
        (["--out={whole}", "--lora=4", "--seed=1"], "undo, or give a new directory: --lora: 2 -> 4; --seed: 0 -> 1"),
        (["--out={whole}", "--steps=transfer=2,hidden=4,logits=3,long=2"], "--steps: hidden=3 -> hidden=4"),
        (
            ["--out={whole}", "--stages=transfer", "--steps=transfer=2"],
            "others may follow, none may go",
        ),
    ],
)
def test_a_mistake_is_one_line_before_anything_begins(exact, text, whole, tmp_path, flags, message, capsys):
    (tmp_path / "few.txt").write_text("only few words ")
    names = {"dir": tmp_path, "whole": whole, "exact": exact, "text": text}
    before = sorted(path.name for path in whole.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        run(exact, text, tmp_path / "out", *(flag.format(**names) for flag in flags))
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.err.count("\n") == 1, printed.err
    assert message.format(**names) in printed.err
    assert not (tmp_path / "out").exists() and sorted(path.name for path in whole.rglob("*")) == before


def test_moments_of_too_few_tokens_are_named_before_anything_begins(text, tmp_path, capsys):
    config = tiny_config(model__attention__kind="softmax", model__head_dim=16, sequence_length=64)
    write_workdir(tmp_path / "exact", config)
    few = ("--context=16", "--passages=2", "--geometry=balanced")
    with pytest.raises(SystemExit):
        run(tmp_path / "exact", text, tmp_path / "out", *few)
    message = "--geometry=balanced: needs at least 17 tokens to fit on, of heads of 16; --passages=2 of --context=16"
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_too_little_disk_is_said_before_anything_begins(exact, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30, 1000))
    with pytest.raises(SystemExit):
        run(exact, text, tmp_path / "out")
    assert "of disk, and 0.0 MiB are free" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_directory_that_cannot_be_made_is_said_before_the_plan(exact, text, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit_:
        run(exact, text, tmp_path / "file/out")
    printed = capsys.readouterr()
    assert exit_.value.code == 2 and "out cannot be written: Not a directory" in printed.err and not printed.out


def test_after_a_transfer_that_failed_other_flags_may_begin(exact, text, tmp_path, monkeypatch, capsys):
    few = ("--stages=transfer", "--steps=transfer=0")

    def fail(*_):
        raise UserError("no such thing")

    with monkeypatch.context() as patch:
        patch.setattr(linearisation, "run_stage", fail)
        with pytest.raises(SystemExit):
            run(exact, text, tmp_path, *few, "--long_context=64", "--num_features=8")
    assert "no such thing" in capsys.readouterr().err and (tmp_path / "report.json").exists()
    run(exact, text, tmp_path, *few)
    assert json.loads((tmp_path / "settings.json").read_text())["num_features"] == 4
    assert f"the model: {tmp_path}/1-transfer" in capsys.readouterr().out


def test_all_models_are_measured_in_one_dtype_and_transfer_says_what_it_found(exact, tmp_path, capsys):
    """The stage `transfer` writes a model that computes in bfloat16, whatever --dtype is."""
    text, other = write_text(tmp_path / "text.txt", 12000), tmp_path / "other.txt"
    other.write_text("".join(f"{i} is not {i * i}. " for i in range(200)))
    few = ("--stages=transfer", "--steps=transfer=0", f"--test_text={other}")
    run(exact, text, tmp_path / "out", *few)
    assert "1-transfer: relative error of attention over 2 layers" in capsys.readouterr().out
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["dtype"] == "float32"
    losses = {}
    for dtype in ("float32", "bfloat16"):
        scores = tmp_path / f"{dtype}.json"
        flags = ("--context=32", "--max_tokens=200", f"--dtype={dtype}", f"--json={scores}")
        given = ["evaluate", f"--workdir={tmp_path}/out/1-transfer", f"--text={other}", *flags]
        evaluate.main(evaluate.parse_flags(given))
        losses[dtype] = json.loads(scores.read_text())["loss"]
    found = report["models"]["transfer"]["loss"]
    assert found == pytest.approx(losses["float32"], rel=1e-6)
    assert abs(losses["bfloat16"] / found - 1) > 1e-5


def test_a_copy_reaches_beyond_the_window_or_the_report_says_so(tmp_path, capsys):
    config = tiny_config(model__attention__kind="softmax", model__num_layers=1, sequence_length=640)
    write_workdir(tmp_path / "exact", config)
    text = write_text(tmp_path / "text.txt", 60000)
    for window, copied, is_shown in ((64, 320, False), (320, 320, True)):
        out = tmp_path / str(window)
        few = ("--context=640", "--stages=transfer", "--steps=transfer=0", f"--window={window}")
        run(tmp_path / "exact", text, out, *few)
        assert json.loads((out / "report.json").read_text())["copied"] == copied
        said = f"(the first lies in the window of {window}, so no feature is asked)"
        assert (said in capsys.readouterr().out) == is_shown


def test_copies_are_as_long_as_the_text_has_them(exact, text, tmp_path):
    (tmp_path / "short.jsonl").write_text('{"text": "' + "a bc def " * 70 + '"}\n')  # 630 tokens
    for window, copied in ((128, 512), (256, 512), (300, 600), (320, 512)):
        flags = ("--long_context=1400", f"--test_text={tmp_path}/short.jsonl", f"--window={window}")
        settings = linearise.settings_of(linearise.parse_flags(command(exact, text, tmp_path / "out", *flags)))
        assert read_text(settings).copied.shape == (1, copied)


def test_a_transfer_that_is_done_is_not_judged_again(exact, text, tmp_path, capsys):
    """An older version fitted passages that the window shows whole; what followed can still go on."""
    few = ("--window=64", "--stages=transfer")
    run(exact, text, tmp_path, *few, "--steps=transfer=0")
    settings = json.loads((tmp_path / "settings.json").read_text())
    settings["steps"]["transfer"] = 2
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    capsys.readouterr()
    run(exact, text, tmp_path, *few, "--steps=transfer=2")
    assert f"the model: {tmp_path}/1-transfer" in capsys.readouterr().out


def test_flags_are_refused_before_the_text_is_read(exact, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(linearisation, "read_text", None)
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").touch()
    for flag, message in (
        ("--window=7", "model.attention.window = 7"),
        ("--exact_heads=auto:4", "one at least must be replaced"),
        ("--window=64", "--context=32: a window of 64 shows all of it, so there is nothing to fit"),
        (f"--out={tmp_path}/used", "has file, but no settings.json"),
        (f"--out={tmp_path}/used/file/out", "used/file/out cannot be written: Not a directory"),
    ):
        with pytest.raises(SystemExit):
            run(exact, text, tmp_path / "out", flag)
        assert message in capsys.readouterr().err


def test_text_that_has_changed_is_refused(exact, tmp_path, capsys):
    text = write_text(tmp_path / "text.txt", 12000)
    run(exact, text, tmp_path / "out", "--stages=transfer", "--steps=transfer=0")
    write_text(tmp_path / "text.txt", 12500)
    with pytest.raises(SystemExit):
        run(exact, text, tmp_path / "out", "--stages=transfer", "--steps=transfer=0")
    assert "the files of --text or --test_text have changed" in capsys.readouterr().err
