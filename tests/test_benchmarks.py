import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    contexts,
    exact_heads,
    exact_layers,
    exported,
    gpu,
    gpu_programs,
    lra,
    made_up_chats,
    paper,
    recall,
    zoo,
)
from benchmarks.grid import is_done
from benchmarks.learning import FAR, REPEATED, Result, Run, ngram_bits, repeat_distance, table
from configs.lra import get_config as get_lra_config
from configs.paper import get_config
from darkformer_jax.data import Data
from darkformer_jax.data.conversations import read_conversations, split
from darkformer_jax.data.stream import memory_stream
from darkformer_jax.data.tokenizers import BytesTokenizer
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from darkformer_jax.mixers.encoders import EncoderMechanism
from darkformer_jax.pretrained.export import export_workdir
from darkformer_jax.runs.workdir import Workdir
from tests.tiny_runs import run_commands, tiny_config, write_workdir


def test_a_captain_answers_in_every_conversation(tmp_path):
    for name in ("one", "two"):
        made_up_chats.main([f"--out={tmp_path}/{name}.jsonl"])
    one, two = ([c.messages for c in read_conversations(f"{tmp_path}/{name}.jsonl")] for name in ("one", "two"))
    assert one == two and len(one) == 100
    answers = [message["content"] for messages in one for message in messages[1::2]]
    assert all(answer.startswith("Ahoy! ") for answer in answers)
    assert all(split(list(read_conversations(f"{tmp_path}/one.jsonl")), 0.05))


def test_a_repeat_is_found_in_its_own_document_only():
    text = np.arange(REPEATED + 3)  # no token twice
    filler = np.arange(1000, 1000 + FAR)
    tokens = np.concatenate([text, filler, text])
    last = len(tokens) - 2
    one_document = np.ones(len(tokens) - 1, np.int32)
    found = repeat_distance(tokens, one_document)
    assert found[last] == len(text) + FAR
    assert np.flatnonzero(found).tolist() == list(range(last - 3, last + 1))  # the first that ends REPEATED known ones
    two_documents = one_document.copy()
    two_documents[len(text) + FAR :] = 2
    assert not repeat_distance(tokens, two_documents).any()


def test_the_table_shows_the_best_learning_rate_by_the_mean_over_seeds():
    def run(rate, seed):
        return Run("dark", "", rate, 0.1, 10, seed, 1)

    def result(bits):
        return Result(bits, 0.5, 1.0, [1.0, 2.0, 3.0, 4.0], 1.0, 2.0, 3.0)

    lines = table(
        {run(1e-3, 0): result(2.0), run(1e-3, 1): result(2.2), run(1e-2, 0): result(1.9), run(1e-2, 1): result(9)}
    )
    assert len(lines.splitlines()) == 3
    assert "| 0.001 of 0.001, 0.01 | 2.100 ± 0.141 |" in lines


def test_ngram_bits_of_a_text_that_its_last_byte_decides():
    texts = ["ab" * 200], ["ab" * 50]
    train, heldout = (memory_stream(part, BytesTokenizer()) for part in texts)
    data = Data(train, heldout, BytesTokenizer(), None)
    assert 0.9 < ngram_bits(data, 0) < 1.3
    assert ngram_bits(data, 1) < 0.2


def test_the_config_of_every_run_of_the_paper_builds():
    runs = paper.plan(paper._arguments(["--out=nowhere", "--learning_rates=1e-3", "--num_features=16"]))
    assert len(runs) >= len(paper.VARIANTS)
    for arguments in runs.values():
        assert get_config(arguments).optimizer.learning_rate == 1e-3


def test_recall_asks_for_what_was_named_once_and_is_not_shown_again():
    rows = recall.make_rows(0, 3, 4)
    again, other = recall.make_rows(0, 3, 4), recall.make_rows(0, 4, 4)
    assert all(np.array_equal(rows[name], again[name]) for name in rows)
    assert not np.array_equal(rows["inputs"], other["inputs"])
    for row in range(4):
        inputs, targets = rows["inputs"][row], rows["targets"][row]
        key, value = np.divmod(inputs[: recall.PAIRS] - recall.FIRST_PAIR, recall.VALUES)
        named = dict(zip(key, recall.KEYS + value, strict=True))
        assert len(named) == recall.PAIRS
        assert max(named) < recall.KEYS <= min(named.values()) < recall.FIRST_PAIR <= max(inputs) < recall.VOCABULARY
        assert rows["weights"][row].tolist() == [0.0] * recall.PAIRS + [1.0] * (recall.LENGTH - recall.PAIRS)
        for place in range(recall.PAIRS, recall.LENGTH):
            assert targets[place] == named[inputs[place]]
            assert key[place - rows["distance"][row, place]] == inputs[place]


def test_paper_runs_differ_and_a_run_is_done_with_its_last_checkpoint(tmp_path):
    args = paper._arguments(
        [f"--out={tmp_path}", "--seeds=2", "--num_features=8,16", "--variants=softmax;dark, window"]
    )
    runs = paper.plan(args)
    assert list(runs) == [
        "softmax-lr0.001-s0", "softmax-lr0.001-s1", "dark-window-m8-lr0.001-s0", "dark-window-m8-lr0.001-s1",
        "dark-window-m16-lr0.001-s0", "dark-window-m16-lr0.001-s1",
    ]  # fmt: skip
    arguments = runs["dark-window-m16-lr0.001-s1"]
    assert arguments == "dark,window=32,m=16,lr=0.001,seed=1,steps=150,geometry_lr=0.003"
    workdir = tmp_path / "run"
    workdir.mkdir()
    assert not is_done(workdir, get_config(arguments))
    rates = {"learning_rate": 0.001, "geometry_learning_rate": 0.003}
    config = {"num_steps": 150, "optimizer": rates, "data": {"files": get_config(arguments).data.files}}
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "metrics.jsonl").write_text('{"step": 150, "heldout_loss": 2.0}\n')
    assert not is_done(workdir, get_config(arguments))
    (workdir / "checkpoints/150").mkdir(parents=True)
    assert is_done(workdir, get_config(arguments))
    for old, new, message in (
        (",steps=150", ",steps=3", "num_steps = 150, not 3"),
        (",lr=0.001", ",lr=0.1", "learning_rate = 0.001, not 0.1"),
    ):
        with pytest.raises(UserError, match=message):
            is_done(workdir, get_config(arguments.replace(old, new)))
    (workdir / "metrics.jsonl").write_text('{"step": 150, "heldo')
    assert not is_done(workdir, get_config(arguments))


def test_exact_heads_are_compared_at_equal_numbers():
    ranked = [(layer, head) for layer in (2, 0, 1) for head in (1, 0, 2)]
    chosen = exact_heads.chosen_heads(ranked, 4)
    assert list(chosen) == ["auto", "every k-th", "random 0", "random 1", "random 2"]
    assert chosen["auto"] == ranked[:4]
    assert chosen["every k-th"] == [(0, 0), (0, 2), (1, 1), (2, 0)]
    assert all(len(set(heads)) == 4 and set(heads) < set(ranked) for heads in chosen.values())
    fewer = exact_heads.chosen_heads(ranked, 2)
    assert all(fewer[name] == chosen[name][:2] for name in chosen if name != "every k-th")  # a draw is an order


@pytest.mark.parametrize(
    ("benchmark", "flags", "message"),
    [
        (exact_layers, ["--out={dir}/x.json", "--choices", "auto", "rando"], "--choices rando: allowed: auto, "),
        (exact_layers, ["--out={dir}/none/x.json"], "--out {dir}/none/x.json: cannot be written; allowed: a file in"),
        (exact_layers, ["--out={dir}"], "--out {dir}: cannot be written; allowed: a file in"),
        (exact_heads, ["--out={dir}/none/x.json"], "--out {dir}/none/x.json: cannot be written; allowed: a file in"),
    ],
)
def test_a_comparison_refuses_mistakes_before_it_begins(benchmark, flags, message, tmp_path, capsys, monkeypatch):
    given = [f"--{name}=/nope" for name in ("exact", "replaced", "text", "test_text")]
    monkeypatch.setattr("sys.argv", ["it", *given, *(flag.format(dir=tmp_path) for flag in flags)])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert message.format(dir=tmp_path) in capsys.readouterr().err


def test_the_zoo_has_every_mixer_and_states_that_grow_only_with_a_cache():
    entries = zoo.every_mixer()
    assert {entry.partition("(")[0] for entry in entries} == set(MIXERS)
    specs = [{entry: zoo.spec_of(entry, length) for entry in entries} for length in (512, 1024)]
    encoders = {entry for entry, spec in specs[0].items() if not spec.causal}
    assert encoders == {kind for kind, mixer in MIXERS.items() if issubclass(mixer, EncoderMechanism)}
    short, long = (
        {e: zoo.state_bytes(spec, length, "float32") for e, spec in of.items() if spec.causal}
        for length, of in zip((512, 1024), specs, strict=True)
    )
    assert {entry for entry in short if long[entry] != short[entry]} == {"softmax"}
    per_token = (2 * zoo.HEADS * zoo.HEAD_DIM + 2) * 4  # a key, a value, the segment and the position
    assert long["softmax"] - short["softmax"] == 512 * per_token


def test_the_table_of_the_zoo_says_why_a_layer_is_left_out():
    figures = {"median_ms": 12.0, "ratio": 1.5}
    row = {"mixer": "dark", "length": 1024, "state_bytes": 2048, "flops_per_token": 2.5e6, "forward": figures}
    text = zoo.table([row | {"forward+backward": {"skipped": "needs 9.0 GiB, 1.0 GiB are free"}}])
    assert text.endswith("| 1,024 | `dark` | 12 (1.50x) | needs 9.0 GiB, 1.0 GiB are free | 2 | 2.50 |")
    row |= {"mixer": "linformer", "state_bytes": None, "forward+backward": figures}
    assert zoo.table([row]).endswith("| 1,024 | `linformer` | 12 (1.50x) | 12 (1.50x) | none | 2.50 |")


def test_every_run_of_the_grid_has_a_config_and_a_tuned_one_begins_where_its_own_pretraining_ended(tmp_path):
    args = lra.parse([f"--out={tmp_path}", "--tasks=listops,fashion_mnist", "--attention=dark,mamba2", "--seeds=2"])
    runs = lra.plan(args)
    assert len(runs) == 2 * 2 * (1 + 2 * 2)
    assert list(runs)[:3] == ["listops-dark-scratch-s0", "listops-dark-pretrained", "listops-dark-tuned-s0"]
    for name, run in runs.items():
        config = get_lra_config(run.arguments)
        assert config.model.causal
        task, attention, kind, *seed = name.split("-")
        assert (config.model.attention.kind, f"s{config.seed}") == (attention, seed[0] if seed else "s0")
        assert (config.task.name == "classification") == (run.test is not None) == (kind != "pretrained")
        assert config.init_from == (str(tmp_path / f"{task}-{attention}-pretrained") if kind == "tuned" else "")


def test_a_classifier_of_the_grid_waits_for_a_pretraining_that_is_done(tmp_path, monkeypatch):
    began = []
    monkeypatch.setattr(lra, "train", lambda workdir, config: began.append(workdir.name))  # and none ends
    args = [f"--out={tmp_path}", "--attention=dark", "--seeds=1"]
    with pytest.raises(SystemExit, match="scratch-s0, listops-dark-pretrained, listops-dark-tuned-s0"):
        lra.main(args)
    assert began == ["listops-dark-scratch-s0", "listops-dark-pretrained"]
    (tmp_path / "listops-dark-scratch-s0").mkdir()
    config = get_lra_config("task=listops,steps=1000").to_dict() | {"data": {"files": "other/basic_train.tsv"}}
    (tmp_path / "listops-dark-scratch-s0" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="has files = other/basic_train.tsv, not data/listops/basic_train.tsv"):
        lra.main(args)


def test_the_cache_of_an_exported_dark_model_stays_and_that_of_exact_attention_grows(tmp_path, capsys):
    from tests.pretrained import exported_models  # skips this test alone where torch is missing

    name = "llama-hybrid-tied"
    export_workdir(Workdir(exported_models.exported(name).workdir), str(tmp_path / "exact"), as_exact=True)
    args = [f"--exact={tmp_path}/exact", f"--linear={exported_models.exported(name).directory}", "--turns=3"]
    exported.main([*args, "--contexts=9,40", "--new_tokens=2", f"--out={tmp_path}/figures.json"])
    results = json.loads((tmp_path / "figures.json").read_text())["results"]
    size = {place: {name: of["cache_bytes"] for name, of in results[place].items()} for place in ("9", "40")}
    config = json.loads((tmp_path / "exact/config.json").read_text())
    per_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 4  # float32
    assert (size["9"]["exact"], size["40"]["exact"]) == (9 * per_token, 40 * per_token)
    assert size["9"]["linear"] == size["40"]["linear"]
    assert all(len(of[rate]) == 3 for figures in results.values() for of in figures.values() for rate in exported.RATES)
    assert "| 40 |" in capsys.readouterr().out


def test_the_table_of_exported_models_has_ratios_of_medians():
    figures = {
        "exact": {"cache_bytes": 4_000_000, "tokens_per_second": [10.0, 20.0, 90.0], "cpu_ms_per_token": [50.0]},
        "linear": {"cache_bytes": 1_000_000, "tokens_per_second": [30.0, 1.0, 30.0], "cpu_ms_per_token": [40.0]},
    }
    assert exported.table({1500: figures}).splitlines()[2:] == [
        "| 1,500 | exact | 20.0 | 50.0 | 4.0 |",
        "| 1,500 | linear | 30.0 | 40.0 | 1.0 |",
        "| 1,500 | ratio | 1.50 | 0.80 | 0.25 |",
    ]


def test_by_context_the_state_of_features_stays_and_what_would_take_too_long_is_left_out(tmp_path):
    for kind in ("softmax", "dark"):
        write_workdir(tmp_path / kind, tiny_config(model__attention__kind=kind))
    write_workdir(tmp_path / "half", tiny_config(model__attention__kind="softmax", model__dtype="bfloat16"))
    names = [f"{tmp_path}/{kind}" for kind in ("softmax", "dark", "half")]
    rows = contexts.measure(names, [16, 32], new_tokens=2, repeats=1, limit=600)
    sizes = {(row["workdir"], row["context"]): row["state_bytes"] for row in rows}
    assert sizes[names[0], 32] > 1.5 * sizes[names[0], 16]
    assert sizes[names[1], 32] == sizes[names[1], 16]
    assert sizes[names[2], 32] == sizes[names[0], 32]  # all compute in the first one's dtype
    assert len(contexts.lines(rows, names[0])) == 1 + 6
    assert len(contexts.measure(names[:2], [16, 32], new_tokens=2, repeats=1, limit=0)) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdirs=/nope", "--contexts=16"], "error: /nope"),
        (["--workdirs=x", "--contexts=16,x"], "error: --contexts=16,x: allowed: rising whole numbers from 1"),
        (["--workdirs=x", "--contexts=16,8"], "error: --contexts=16,8: allowed: rising"),
        (["--workdirs=x", "--repeats=0"], "error: --new_tokens=16 --repeats=0: must be at least 1"),
    ],
)
def test_contexts_refuses_a_mistake_in_one_line(flags, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["contexts", *flags])
    with pytest.raises(SystemExit) as exit_:
        contexts.main()
    printed = capsys.readouterr().err
    assert exit_.value.code == 2 and printed.startswith(message) and printed.count("\n") == 1


def test_the_trainings_on_a_gpu_are_experiments_that_train_accepts(tmp_path):
    commands = [gpu.training(form, 8192, argparse.Namespace(shape="1b"), tmp_path / "run") for form in gpu.FORMS]
    for form, ended in zip(gpu.FORMS, run_commands([(c[1], [*c[2:], "--dry_run"]) for c in commands]), strict=True):
        assert ended.status == 0, ended.err
        assert "tokens/step    16,384 = 2 x 8192\n" in ended.out and "parameters     1,03" in ended.out
        assert f"22 x {gpu.FORMS[form]['kind']}\n" in ended.out


def test_steps_on_a_gpu_are_timed_before_they_are_recorded(tmp_path):
    times = [None, 100.0, 200.0, 50.0]  # the first line has no speed, the last one has recorded steps
    lines = [{"step": 10 * i, "time": {} if t is None else {"tokens_per_second": t}} for i, t in enumerate(times)]
    lines[-1]["time"]["device_memory_bytes"] = 2**30
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    got = gpu.figures(tmp_path)
    assert got["tokens_per_second"] == 200.0 and got["mfu"] is None and got["device_memory_bytes"] == 2**30
    row = {"form": "dark", "context": 8192, "failed": None} | got
    exact = {"form": "softmax", "context": 8192, "failed": None} | got | {"tokens_per_second": 400.0}
    failed = {"form": "dark", "context": 64, "failed": "error: no room"}
    words = gpu.table([exact, row, failed])
    assert "200" in words and "0.50x" in words and "1.0" in words and "failed: error: no room" in words


def test_programs_of_loops_are_counted_once_per_step():
    def run(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: jax.lax.fori_loop(0, 3, lambda _, x: jnp.sort(x), x), x)

    hlo = jax.jit(run).lower(jnp.zeros(64)).compile().as_text()
    starts, written = gpu_programs.count(hlo)
    sorts = hlo.count(" sort(")
    assert sorts == 1 and 15 <= starts < 15 + 5 * 20
    assert written * 2**30 >= 15 * 256
