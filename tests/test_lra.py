"""From a generated benchmark to a number that another process finds again."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import lra
from darkformer_jax import evaluate, prepare_data
from darkformer_jax.config.fields import flat_fields
from darkformer_jax.config.usage import require_new_uses
from darkformer_jax.config.validation import validate
from darkformer_jax.data.aan import write_aan
from darkformer_jax.data.images import Images, write_images
from darkformer_jax.data.imdb import write_imdb
from darkformer_jax.data.listops import Scale, listops_tokenizer, write_listops
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from darkformer_jax.runs.checkpoints import Checkpoints
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.classification import Classification
from darkformer_jax.tasks.language_model import LanguageModel
from darkformer_jax.training.experiment import Experiment
from darkformer_jax.training.init_from import initialize_from
from tests.data import test_aan, test_imdb
from tests.tiny_runs import metrics_without_time, run

pytestmark = pytest.mark.standard_promotion

TINY = Scale(4, 4, 4, 30, {"train": 60, "val": 20, "test": 20})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tiny files of a task that reads words, of one that reads pixels and of those that read bytes, by task."""
    directory = tmp_path_factory.mktemp("lra")
    write_listops(str(directory / "listops"), TINY, seed=0)
    rng = np.random.default_rng(0)
    images = [Images(rng.integers(0, 256, (n, 4, 4), np.uint8), (np.arange(n) % 3).astype(np.uint8)) for n in (60, 5)]
    write_images(str(directory / "fashion_mnist"), (images[0], images[1]), None)
    test_imdb.write_release(directory, count=30)
    write_imdb(str(directory / "text"), str(directory))
    test_aan.write_release(directory / "pairs", copies=20)
    write_aan(str(directory / "retrieval"), str(directory / "pairs"), length=15)
    return {name: directory / name for name in ("listops", "fashion_mnist", "text", "retrieval")}


@pytest.fixture(scope="module")
def listops(data):
    return data["listops"]


def tiny(arguments):
    config = lra.get_config(f"{arguments},m=16,batch=8,steps=2")
    config.update_from_flattened_dict({"model.num_layers": 1, "sequence_length": 32, "sample.max_new_tokens": 4})
    return config


def texts(file):
    _, *lines = file.read_text().splitlines()
    return [line.split("\t")[0] for line in lines]


def test_a_test_figure_is_the_same_bit_for_bit_in_another_process(listops, tmp_path, capsys):
    config = lra.get_config(f"task=listops,files={listops},attention=dark,m=16,batch=8,steps=3")
    config.update_from_flattened_dict({"model.num_layers": 1, "sequence_length": 64, "eval.batch_size": 8})
    run(config, tmp_path / "run")
    flags = [f"--workdir={tmp_path / 'run'}", f"--text={listops / 'basic_test.tsv'}"]
    here = evaluate.evaluate(evaluate.parse_flags(["evaluate", *flags]))
    command = [sys.executable, "-m", "darkformer_jax.evaluate", *flags, f"--json={tmp_path / 'there.json'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    there = json.loads((tmp_path / "there.json").read_text())
    assert here["examples"] == 20 and here["cut_share"] == 0
    for name in ("loss", "accuracy", "confusion", "text_fingerprint"):
        assert here[name] == there[name]
    assert "no test figure" not in done.stdout
    evaluate.evaluate(evaluate.parse_flags(["evaluate", flags[0], f"--text={listops / 'basic_val.tsv'}"]))
    assert f"note: {listops / 'basic_val.tsv'} is of the run's task.heldout_files" in capsys.readouterr().out
    refused = r"run: its tokenizer \(fingerprint .*\) is not the one that its model was trained with"
    exchange_two_symbols(tmp_path / "run" / "tokenizer.json")
    with pytest.raises(UserError, match=refused):
        evaluate.evaluate(evaluate.parse_flags(["evaluate", *flags]))
    with pytest.raises(UserError, match=refused):
        run(lra.get_config(f"task=listops,files={listops},init_from={tmp_path / 'run'}"), tmp_path / "tuned")


def exchange_two_symbols(path):
    definition = json.loads(path.read_text())
    ids = definition["model"]["vocab"]
    ids["1"], ids["2"] = ids["2"], ids["1"]
    path.write_text(json.dumps(definition))


@pytest.mark.parametrize("task", ["listops", "fashion_mnist", "retrieval"])
def test_a_classifier_begins_with_the_weights_of_its_pretraining_and_a_new_head(data, task, tmp_path):
    pretraining = tiny(f"task={task},files={data[task]},pretrain=next_token")
    run(pretraining, tmp_path / "pretrained")
    assert "heldout_bits_per_byte" in metrics_without_time(tmp_path / "pretrained")[-1]
    assert (tmp_path / "pretrained" / "samples.txt").exists()
    config = tiny(f"task={task},files={data[task]},init_from={tmp_path / 'pretrained'}")
    assert config.model.to_dict() == pretraining.model.to_dict() and config.model.causal

    experiment = Experiment.of(config, Classification.load(config, Workdir(tmp_path / "tuned")).objective)
    state, _ = initialize_from(Workdir(tmp_path / "pretrained"), experiment, experiment.initial_state())
    checkpoints = Checkpoints(Workdir(tmp_path / "pretrained"))
    _, saved = checkpoints.restore(checkpoints.saved_shapes(2), 2)
    checkpoints.close()
    assert sorted(state.params.keys() - saved["params"].keys()) == ["classifier"]
    params = {name: state.params[name] for name in saved["params"]}
    same = (params, state.projections), (saved["params"], saved["projections"])
    jax.tree.map(np.testing.assert_array_equal, *same)

    run(config, tmp_path / "tuned")
    assert "heldout_accuracy" in metrics_without_time(tmp_path / "tuned")[-1]


def test_pretraining_reads_the_training_texts_alone_and_is_judged_on_the_validation_split(listops, tmp_path):
    task = LanguageModel.load(tiny(f"task=listops,files={listops},pretrain=next_token"), Workdir(tmp_path / "run"))
    tokenizer = listops_tokenizer()
    for stream, split in ((task.data.train, "train"), (task.data.heldout, "val")):
        (tokens,), (is_start,) = stream.read(np.zeros(1, np.int64), stream.num_tokens - 1)
        documents = np.split(tokens, np.flatnonzero(is_start)[1:])
        wanted = texts(listops / f"basic_{split}.tsv")
        assert [document[1:].tolist() for document in documents] == [tokenizer.encode(text) for text in wanted]


@pytest.mark.parametrize(("task", "longest"), [("text", 1001), ("retrieval", 2002)])
def test_texts_are_rows_of_bytes_and_only_longer_reviews_are_cut(data, task, longest, tmp_path):
    config = lra.get_config(f"task={task},files={data[task]}")
    loaded = Classification.load(config, Workdir(tmp_path / "run"))
    assert loaded.tokenizer.vocab_size == 257 and config.sequence_length == longest
    examples = [json.loads(line) for line in (data[task] / "train.jsonl").read_text().splitlines()]
    texts = [example[config.task.text_column].encode() for example in examples]
    is_longer = [1 + len(text) > longest for text in texts]
    assert any(is_longer) == (task == "text") and loaded.train.cut_share == np.mean(is_longer)
    batch = loaded.train.read(np.arange(len(texts)))
    for row, text in zip(batch["inputs"], texts, strict=True):
        wanted = [256, *text][:longest]
        assert row[: len(wanted)].tolist() == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pretrain=next_token,causal=False", "model.causal = False with task.name = 'language_model'; allowed: True"),
        ("pretrain=next_token,attention=linformer", "model.causal = True: in 'linformer' a token depends on later"),
        (
            "pretrain=next_token,pooling=mean",
            "task.pooling = 'mean' with task.name = 'language_model'; allowed: 'last'",
        ),
    ],
)
def test_what_predicts_no_next_token_is_not_pretrained(arguments, message):
    with pytest.raises(UserError, match=message):
        validate(lra.get_config(f"task=listops,{arguments}"))


@pytest.mark.parametrize("scale", lra.SCALES)
@pytest.mark.parametrize("task", lra.TASKS)
@pytest.mark.parametrize("kind", [kind for kind in MIXERS if MIXERS[kind].bidirectional])
def test_every_mechanism_that_sees_both_sides_has_the_same_model_around_it(task, scale, kind):
    config, plain = (lra.get_config(f"task={task},scale={scale}{more}") for more in (f",attention={kind}", ""))
    validate(config)
    assert not config.model.causal and config.task.heldout_files.startswith(f"data/{task}/")
    around, same = (
        {name: value for name, value in flat_fields(c.to_dict()) if not name.startswith("model.attention.")}
        for c in (config, plain)
    )
    assert around == same


@pytest.mark.parametrize(
    ("task", "sizes", "recipe"),
    [
        ("listops", (4, 512, 8, 512, 1024), (32, 5000, 1000, 1.6e-3, 0.1)),
        ("cifar10", (1, 128, 8, 64, 128), (256, 35_000, 175, 5e-4, 0.0)),
        ("pathfinder", (1, 128, 8, 64, 128), (512, 62_400, 312, 1e-3, 0.0)),
        ("text", (4, 256, 4, 256, 1024), (32, 20_000, 8000, 5.6e-4, 0.1)),
        ("retrieval", (4, 128, 4, 128, 512), (32, 5000, 1250, 3.5e-4, 0.1)),
    ],
)
def test_scale_paper_has_the_sizes_of_the_official_code(task, sizes, recipe):
    config = lra.get_config(f"task={task},scale=paper")
    m, o = config.model, config.optimizer
    assert (m.num_layers, m.embed_dim, m.num_heads, m.num_heads * m.head_dim, m.mlp_dim) == sizes
    assert m.num_kv_heads == m.num_heads
    assert (config.batch_size, config.num_steps, o.warmup_steps, o.learning_rate, o.weight_decay) == recipe


@pytest.mark.parametrize("kind", [kind for kind in MIXERS if MIXERS[kind].bidirectional])
def test_a_mechanism_for_texts_up_to_a_length_is_for_the_length_that_is_asked_for(kind):
    config = lra.get_config(f"task=listops,length=256,attention={kind}")
    validate(config)
    require_new_uses(config, ["sequence_length", "model.attention.kind"])
    assert config.model.attention.horizon == (256 if "horizon" in MIXERS[kind].uses else 0)


@pytest.mark.parametrize(
    "arguments", ["pretrain=masked", "scale=large", "scale=small,scale=paper", "task=imdb", "window=64", "task="]
)
def test_arguments_that_it_does_not_have_are_refused(arguments):
    with pytest.raises(UserError, match=r"configs/lra.py"):
        lra.get_config(arguments)


def documented_commands():
    """The commands of docs/lra.md in its order, as words."""
    text = (Path(__file__).parent.parent / "docs" / "lra.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (paper,) = re.findall(r"^    paper=(\S+)$", text, re.MULTILINE)
    lines = re.findall(r"^    (python .*)$", text.replace("$paper", paper), re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in lines]


def flag(words, name):
    return next((word.partition("=")[2] for word in words if word.startswith(f"--{name}=")), None)


def test_the_documented_commands_are_accepted_and_each_reads_what_one_before_it_wrote():
    written = set()
    commands = documented_commands()
    for words in commands:
        command = words[0] if words[0] != "-m" else words[1]
        if command == "train.py":
            path, _, arguments = flag(words, "config").partition(":")
            config = lra.get_config(arguments)
            assert path == "configs/lra.py" and os.path.dirname(config.data.files) in written, words
            assert not config.init_from or config.init_from in written, words
        if command == "darkformer_jax.prepare_data":
            prepare_data.parse_flags(words[1:])
        if command == "darkformer_jax.evaluate":
            assert {flag(words, "workdir"), os.path.dirname(flag(words, "text"))} <= written, words
            continue
        out = flag(words, "workdir" if command == "train.py" else "out")
        assert out not in written or command == "benchmarks.lra", words  # which goes on in its directory
        written.add(out)
    assert len(commands) > 25 and {"data/listops", "runs/listops-dark", "data/paper/listops"} <= written
