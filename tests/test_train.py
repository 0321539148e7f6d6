import json
import os
from pathlib import Path

import numpy as np
import pytest

from configs import quickstart
from darkformer_jax.data.tokenizers import BytesTokenizer
from darkformer_jax.runs.workdir import Workdir
from tests.tiny_runs import (
    ROOT,
    experiment_of,
    metrics_without_time,
    run_commands,
    tiny_config,
    tiny_flags,
    write_text,
    write_workdir,
)

pytestmark = pytest.mark.standard_promotion

ABLATION = "--config=configs/ablation.py"


def train(*flags):
    return "train.py", list(flags)


def files_below(directory):
    return {path: path.read_bytes() for path in Path(directory).rglob("*") if path.is_file()}


def test_mistakes_in_flags_are_one_line_and_status_2(tmp_path):
    (tmp_path / "notes.md").write_text("it's no config\n")
    (tmp_path / "takes_nothing.py").write_text(
        "from darkformer_jax.config import base\n\n\ndef get_config():\n    return base.get_config()\n"
    )
    (tmp_path / "imports.py").write_text("import nowhere\n")
    cases = {
        "--config.num_step=3": "num_step: there is no such field in the config; did you mean --config.num_steps?",
        "--config.model.attention.king=dark": "did you mean --config.model.attention.kind?",
        "--config.optimizer.lr=1 --config.epochs=3": "--config.optimizer.learning_rate?; --config.epochs: there is no",
        "--config.xyzzy=1": "there is no such field in the config; darkformer_jax/config/base.py has all fields",
        "--batch_size=4": "--batch_size: there is no such flag; did you mean --config.batch_size?",
        "--dropout=0.1": "--dropout: there is no such flag; there is no dropout here",
        "--dryrun": "--dryrun: there is no such flag; did you mean --dry_run?",
        "--output_dir=x": "--output_dir: there is no such flag; did you mean --workdir?",
        "--resume": "--resume: there is no such flag; a run resumes by itself: give its --workdir",
        "--num_layers=2": "--num_layers: there is no such flag; did you mean --config.model.num_layers?",
        "--config.num_steps=many": "--config.num_steps=many: must be a whole number and at least 1",
        "--config.num_steps=1.5": "--config.num_steps=1.5: must be a whole number and at least 1",
        "--config.num_steps=1e99999999": "--config.num_steps=1e99999999: must be a whole number and at least 1",
        "--config.num_steps many": "--config.num_steps=many: must be a whole number and at least 1",
        "--config.optimizer.learning_rate=fast": "--config.optimizer.learning_rate=fast: must be a number and positive",
        "--config.model.qk_norm=maybe --config.seed=x": "qk_norm=maybe: must be True or False; --config.seed=x: must",
        "--num_processes=x": "flag --num_processes=x: must be a whole number",
        "--config.checkpoint=5": "--config.checkpoint: checkpoint is a section; set its fields one by one, such as",
        "--config.model.attention={'num_features':12}": "model.attention is a section; set its fields one by one",
        "--config.model.attention.num_features=0": "model.attention.num_features = 0: must be at least 1",
        "--config.model.attention.kind=softmax --config.model.attention.num_features=8": "no softmax layer uses it",
        "--config.model.attention.kind=softmax": "but the experiment sets it; add --config.model.attention.window=0",
        "--workdir=": "workdir '': give the name of a directory",
        "--config=nowhere.py": "nowhere.py",
        f"--config={tmp_path}/imports.py": "--config: No module named 'nowhere'",
        f"--config={tmp_path}/notes.md": f"--config: {tmp_path}/notes.md: line 1 is not Python",
        f"--config={tmp_path}/takes_nothing.py:abc": "takes no arguments after a colon",
        "--config=configs/ablation.py:sauce=1": "configs/ablation.py has no argument 'sauce'; allowed: attention, m",
        "--config=configs/ablation.py:d_model=64": "seed; for other fields: did you mean --config.model.embed_dim?",
        "--config=configs/ablation.py:m=x": "configs/ablation.py: 'm=x': m must be a whole number and at least 1",
        "--config=configs/ablation.py:m=32 --config.model.attention.pattern=dark(m=128)": "every dark layer has a",
        "--config=configs/ablation.py:attention=performer,m=8 --config.model.attention.kind=softmax": "no softmax",
        "--config=configs/ablation.py:attention=softmax,m=32": "num_features = 32: no softmax layer uses it",
        "--config=configs/ablation.py:attention=magic": "model.attention.kind = 'magic': allowed: softmax",
        "extra": "'extra' is no flag",
        "--xyzzy=1": "--xyzzy: there is no such flag; --help lists them",
    }
    ended = run_commands([train(f"--workdir={tmp_path}/new", "--dry_run", *flags.split()) for flags in cases])
    for (flag, message), (status, out, err) in zip(cases.items(), ended, strict=True):
        assert status == 2, (flag, err)
        assert err.startswith("error: ") and err.count("\n") == 1 and out == "", (flag, err)
        assert message in err, flag
        assert len(err) < 400, err
    assert not (tmp_path / "new").exists()


def test_arguments_are_checked_with_what_overrides_them_and_a_run_that_has_begun_is_spared(tmp_path):
    text = write_text(tmp_path / "text.txt")
    swapped, begun = f"{ABLATION}:attention=softmax,m=32", f"{ABLATION}:attention=softmax,m=99,steps=8"
    flags = tiny_flags(model__attention__kind="softmax", data__files=text)
    config = tiny_config(model__attention__kind="softmax", data__files=text)
    config.update_from_flattened_dict({"eval.every": 100, "eval.batches": 16, "checkpoint.keep": 1})
    config.model.attention.num_features = 99
    Workdir(tmp_path / "old").write_config(config.to_dict())
    used, resumed, refused = run_commands(
        [
            train("--dry_run", swapped, "--config.model.attention.pattern=dark", f"--workdir={tmp_path}/new"),
            train(begun, *flags, f"--workdir={tmp_path}/old"),
            train(begun, *flags, f"--workdir={tmp_path}/new"),
        ]
    )
    assert used.status == 0, used.err
    assert resumed.status == 0, resumed.err
    assert refused.status == 2 and "num_features = 99: no softmax layer uses it" in refused.err
    assert not (tmp_path / "new").exists()


def test_help_lists_the_flags_and_ends_well():
    (shown,) = run_commands([train("--help")])
    assert shown.status == 0 and "--workdir" in shown.out and "--config" in shown.out


def test_mistakes_in_data_and_directories_are_one_line_and_write_nothing(tmp_path):
    text = write_text(tmp_path / "text.txt")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "one.txt").write_text("h")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    config = tiny_config(data__files=text)
    Workdir(tmp_path / "other").write_config(config.to_dict())
    BytesTokenizer().save(str(tmp_path / "other"))
    before = files_below(tmp_path)
    new = f"--workdir={tmp_path}/new"

    def flags(workdir=new, **changes):
        return train(workdir, *tiny_flags(**{"data__files": text} | changes))

    cases = [
        (flags(data__files=f"{tmp_path}/none/*.txt"), "no file matches"),
        (flags(data__files=""), "data files are not given"),
        (flags(data__files=f"{tmp_path}/empty.txt"), "empty.txt is empty"),
        (flags(data__files=f"{tmp_path}/one.txt"), "too little text"),
        (flags(data__files=f"{tmp_path}/binary.txt"), "binary.txt is not UTF-8 text: NUL byte at offset 0"),
        (flags(data__source="web"), "data.source = 'web': allowed: stdlib, text, news, chat, array_record, labelled"),
        (flags(data__source="array_record", data__files=f"{tmp_path}/none"), "none' does not exist"),
        (flags(data__tokenizer="nowhere.model"), "tokenizer 'nowhere.model' is not a file"),
        (flags(init_from=f"{tmp_path}/none"), f"init_from = {tmp_path}/none: there is no checkpoint"),
        (
            flags(task__name="classification", data__source="labelled", optimizer__z_loss=1e-4),
            "optimizer.z_loss = 0.0001 with task.name = 'classification'; allowed: 0.0",
        ),
        (flags(mesh__data=3), "does not fit the 1 devices"),
        (flags(f"--workdir={foreign}"), "is not empty and has no config.json (it holds thesis.tex)"),
        (flags(f"--workdir={text}"), "text.txt is a file, not a directory"),
        (flags(f"--workdir={text}/below"), "Not a directory"),
        (
            flags("--workdir=s3://bucket/run"),
            "workdir s3://bucket/run: allowed: a local or mounted directory, or gs://",
        ),
        (
            flags(f"--workdir={tmp_path}/other", model__mlp_dim=48, seed=3),
            "model.mlp_dim: 32 -> 48; seed: 0 -> 3",
        ),
        (
            flags(f"--workdir={tmp_path}/other", data__tokenizer="bpe:300"),
            'data.tokenizer: "bytes" -> "bpe:300"',
        ),
    ]
    ended = run_commands([command for command, _ in cases])
    for (command, message), (status, out, err) in zip(cases, ended, strict=True):
        last = err.splitlines()[-1]
        assert status == 2, (command, err)
        assert last.startswith("error: ") and message in last, (message, err)
        assert "Traceback" not in err and out == ""
        expected = ("workdir ", "reading words for the tokenizer", "training the tokenizer")
        lines = filter(None, err.splitlines()[:-1])
        notes = [line for line in lines if not line.startswith(expected) and " parameters; " not in line]
        assert not notes, notes
    assert files_below(tmp_path) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only directories")
def test_a_read_only_directory(tmp_path):
    text = write_text(tmp_path / "text.txt")
    (tmp_path / "locked").mkdir(mode=0o555)
    (ended,) = run_commands([train(f"--workdir={tmp_path}/locked/run", *tiny_flags(data__files=text))])
    assert ended.status == 2 and f"workdir {tmp_path}/locked/run cannot be written: Permission denied" in ended.err


def test_a_disk_that_takes_nothing(tmp_path):
    text = write_text(tmp_path / "text.txt")
    (ended,) = run_commands([train("--workdir=/proc/run", *tiny_flags(data__files=text))])
    assert ended.status == 2
    assert ended.err.splitlines()[-1].startswith("error: workdir /proc/run cannot be written: ")


def write_release(root):
    """Sentences laid out as the One Billion Word release is."""
    rng = np.random.default_rng(0)
    words = ["the", "a", "market", "of", "news", "said", "in", "government", "on", "was", "people", "and"]
    directory = root / "training-monolingual.tokenized.shuffled"
    directory.mkdir(parents=True)
    for shard in (1, 2, 3):
        sentences = [" ".join(rng.choice(words, 12)) + " ." for _ in range(200)]
        (directory / f"news.en-{shard:05d}-of-00100").write_text("\n".join(sentences) + "\n")
    return root


def test_the_whole_road_of_lm_1b(tmp_path):
    release, data, workdir = write_release(tmp_path / "release"), tmp_path / "data", tmp_path / "run"
    reduced = {
        "num_steps": 4,
        "batch_size": 8,
        "sequence_length": 64,
        "model.vocab_size": 512,
        "model.num_layers": 2,
        "model.embed_dim": 32,
        "model.num_heads": 2,
        "model.num_kv_heads": 2,
        "model.head_dim": 8,
        "model.mlp_dim": 64,
        "model.attention.num_features": 8,
        "model.attention.chunk_size": 32,
        "model.attention.projections": "iid",
        "data.files": data,
        "optimizer.warmup_steps": 1,
        "eval.batch_size": 8,
        "checkpoint.every": 2,
        "log.every": 1,
        "sample.max_new_tokens": 4,
    }
    config = ["--config=configs/lm_1b.py", *(f"--config.{name}={value}" for name, value in reduced.items())]
    prepare = ["--source=news", f"--files={release}", "--tokenizer=bpe:300", f"--out={data}", "--heldout_fraction=0.05"]
    prepared, sizes, trained, again, mismatch, written = run_commands(
        [
            ("darkformer_jax.prepare_data", prepare),
            train(*config, f"--workdir={workdir}", "--dry_run"),
            train(*config, f"--workdir={workdir}"),
            train(*config, f"--workdir={workdir}", "--config.num_steps=5", "--config.data.num_workers=2"),
            train(*config, f"--workdir={tmp_path}/new", "--config.data.tokenizer=bytes"),
            ("darkformer_jax.generate", [f"--workdir={workdir}", "--prompt=the market", "--max_new_tokens=5"]),
        ]
    )
    assert prepared.status == 0, prepared.err
    assert sizes.status == 0 and "tokens/step    512 = 8 x 64" in sizes.out, sizes.err
    assert trained.status == 0, trained.err
    assert "step 4/4" in trained.err and "--- 'In a statement , '" in trained.out
    assert "gzip" not in trained.out  # the held-out text is not in memory
    assert again.status == 0, again.err
    assert f"resuming {workdir} from step 4" in again.err
    lines = metrics_without_time(workdir)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if "heldout_loss" in line] == [4, 5]
    assert lines[-2]["loss"] < lines[0]["loss"]
    assert mismatch.status == 2 and "tokenizer 'bytes' does not match" in mismatch.err.splitlines()[-1]
    assert "; add --config.data.tokenizer= for the one that prepared the data" in mismatch.err
    assert prepared.out.endswith(
        f"train on it: --config.data.source=array_record --config.data.files={data} --config.data.tokenizer=\n"
    )
    assert not (tmp_path / "new").exists()
    assert written.status == 0 and written.out.startswith("the market"), written.err
    model = json.loads((workdir / "config.json").read_text())["model"]
    assert experiment_of(tiny_config(model__vocab_size=model["vocab_size"]), 300).network.spec.vocab_size == 512


def test_without_flags_it_is_the_quickstart_from_any_directory(tmp_path):
    config = quickstart.get_config()
    (ended,) = run_commands([(str(ROOT / "train.py"), ["--dry_run"])], cwd=tmp_path)
    assert ended.status == 0, ended.err
    assert f"= {config.batch_size} x {config.sequence_length}\n" in ended.out
    assert f"steps          {config.num_steps:,}\n" in ended.out


def test_a_sequence_longer_than_the_text(tmp_path):
    text = write_text(tmp_path / "text.txt", 300)
    flags = tiny_flags(data__files=text, sequence_length=512, num_steps=3, batch_size=2, eval__batch_size=2)
    (ended,) = run_commands([train(f"--workdir={tmp_path}/run", *flags)])
    assert ended.status == 0, ended.err
    assert len(metrics_without_time(tmp_path / "run")) == 4


def test_a_workdir_alone_resumes_the_run_with_the_config_that_it_has(tmp_path):
    text = write_text(tmp_path / "text.txt")
    workdir = tmp_path / "run"
    flags = tiny_flags(data__files=text, num_steps=4, sample__temperature=1.0, optimizer__clip_norm=2)
    new, begun, again, longer, planned, changed, other = run_commands(
        [
            train(f"--workdir={workdir}", "--dry_run"),  # no run has begun there: the quickstart
            train(f"--workdir={workdir}", *flags),
            train(f"--workdir={workdir}"),
            train("--workdir", str(workdir), "--config.num_steps=6", "--config.sample.temperature=0.5"),
            train(f"--workdir={workdir}", "--dry_run"),
            train(f"--workdir={workdir}", "--config.model.mlp_dim=48"),
            train(f"--workdir={workdir}", "--config=configs/quickstart.py"),
        ]
    )
    assert new.status == 0 and "= 8 x 256\n" in new.out and "no --config" not in new.err, new.err
    assert begun.status == 0 and f"workdir {workdir} (new); reading text" in begun.err, begun.err
    for ended, start in ((again, 4), (longer, 4)):
        assert ended.status == 0, ended.err
        assert f"no --config: the experiment is that of {workdir}/config.json" in ended.err
        assert f"resuming {workdir} from step {start}" in ended.err
    assert [line["step"] for line in metrics_without_time(workdir) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    saved = json.loads((workdir / "config.json").read_text())
    assert (saved["num_steps"], saved["sample"]["temperature"], saved["model"]["mlp_dim"]) == (6, 0.5, 32)
    assert planned.status == 0 and "steps          6\n" in planned.out
    assert changed.status == 2 and changed.err.endswith("use a new workdir or undo: model.mlp_dim: 32 -> 48\n")
    assert other.status == 2 and "belongs to another experiment" in other.err


def test_a_dry_run_answers_as_the_run_in_its_workdir_and_writes_nothing(tmp_path):
    data = write_text(tmp_path / "text.txt")
    write_workdir(tmp_path / "begun", tiny_config(data__files=data, init_from="gone"))
    before = files_below(tmp_path)
    flags = [f for f in tiny_flags(data__files=data, num_steps=16) if "warmup" not in f]
    cases = [["begun", "--config.init_from=gone"], ["begun", "--config.init_from=other"], ["new"]]
    resumed, other, new = run_commands(
        [
            train(
                "--config=darkformer_jax/config/base.py",
                *flags,
                "--dry_run",
                f"--workdir={tmp_path}/{directory}",
                *more,
            )
            for directory, *more in cases
        ]
    )
    assert resumed.status == 0, resumed.err
    assert (
        resumed.err == "note: optimizer.warmup_steps = 2, as the run began\n" and "steps          16\n" in resumed.out
    )
    assert other.status == 2 and other.err.endswith('use a new workdir or undo: init_from: "gone" -> "other"\n')
    assert new.status == 0 and new.err == "note: optimizer.warmup_steps = 4, because num_steps = 16\n", new.err
    assert files_below(tmp_path) == before and not (tmp_path / "new").exists()


def test_a_workdir_of_a_model_that_was_never_trained_there_is_not_trained_with_its_config(tmp_path):
    config = tiny_config(data__files=write_text(tmp_path / "text.txt"))
    Workdir(tmp_path / "imported").write_config(config.to_dict())
    (ended,) = run_commands([train(f"--workdir={tmp_path}/imported")])
    assert ended.status == 2 and "belongs to another experiment" in ended.err and "no --config" not in ended.err


def test_a_damaged_config_of_a_run_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "data.json").write_text("{}")
    (ended,) = run_commands([train(f"--workdir={tmp_path}")])
    assert ended.status == 2 and ended.err.startswith("error: ") and "config.json is not valid JSON" in ended.err
