import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax import evaluate
from darkformer_jax.cli.progress import progress_bar
from darkformer_jax.data.sources import open_corpus
from darkformer_jax.data.tokenizers import train_bpe
from darkformer_jax.data.windows import ScoredDocument
from darkformer_jax.errors import UserError
from darkformer_jax.runs.load import load_model
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.next_token import predict, token_sums
from darkformer_jax.tasks.text_scores import TextScorer, make_quarter_step
from tests.tiny_runs import make_chunks, random_batch, run_commands, tiny_config, write_workdir

pytestmark = pytest.mark.standard_promotion  # the state of a checkpoint is made with its optimizer

TEXTS = ("def f(x):\n    return x  # ü骰\n" * 3, "one", "import os\n" * 7)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    write_workdir(directory, tiny_config())
    return directory


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("texts")
    (directory / "a.txt").write_text(TEXTS[0])
    (directory / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[1:]))
    return directory


def run(workdir, texts, *flags):
    return evaluate.evaluate(evaluate.parse_flags(["evaluate", f"--workdir={workdir}", f"--text={texts}", *flags]))


def scored_one_by_one(workdir, context, stride):
    """(place in the window, nll, correct) of every token, each window alone."""
    model = load_model(Workdir(workdir))

    @jax.jit
    def log_probabilities(inputs, is_real):
        places = jnp.arange(context)[None]
        logits, _ = model.network.bind(model.params, model.projections)(inputs[None], is_real[None], places)
        return jax.nn.log_softmax(logits[0])

    rows = []
    for text in TEXTS:
        for window in ScoredDocument.of(text, model.tokenizer).windows(context, stride):
            length = len(window.targets)
            is_real = (np.arange(context) < length).astype(np.int32)
            logp = np.asarray(log_probabilities(np.resize(window.inputs, context), is_real))
            for place in range(window.num_skipped, length):
                target = window.targets[place]
                rows.append((place, -float(logp[place, target]), float(logp[place].argmax() == target)))
    return np.array(rows)


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (18, 7)])
def test_the_figures_are_those_of_the_tokens_one_by_one(workdir, texts, context, stride, capsys):
    flags = (f"--context={context}", f"--stride={stride}")
    result = run(workdir, texts, *flags, "--batch_size=3")
    rows = scored_one_by_one(workdir, context, stride)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert result["tokens"] == result["bytes"] == num_bytes == len(rows)
    assert result["documents"] == 3 and result["files"] == 2 and result["step"] == 3
    assert result["loss"] == pytest.approx(rows[:, 1].mean(), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(rows[:, 1].mean()), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(rows[:, 1].sum() / math.log(2) / num_bytes, rel=1e-5)
    assert result["accuracy"] == pytest.approx(rows[:, 2].mean())
    for quarter in result["quarters"]:
        inside = rows[(quarter["first_position"] <= rows[:, 0]) & (rows[:, 0] <= quarter["last_position"])]
        assert quarter["tokens"] == len(inside)
        assert quarter["loss"] == pytest.approx(inside[:, 1].mean(), rel=1e-5)
        assert quarter["accuracy"] == pytest.approx(inside[:, 2].mean())
    assert sum(quarter["tokens"] for quarter in result["quarters"]) == len(rows)
    assert result["quarters"][-1]["last_position"] == context - 1
    table = capsys.readouterr().out
    assert f"{num_bytes:,} bytes; windows of {context} tokens, stride {stride}" in table
    assert f"{result['loss']:.4f}" in table and table.count("\n") == 7

    again = run(workdir, texts, *flags, "--batch_size=100")
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-5)


def test_the_model_computes_in_the_dtype_that_is_asked_for(workdir, texts):
    own, same, rounded = (run(workdir, texts, *flags) for flags in ((), ("--dtype=float32",), ("--dtype=bfloat16",)))
    assert [found["dtype"] for found in (own, same, rounded)] == ["float32", "float32", "bfloat16"]
    assert own["loss"] == same["loss"] != rounded["loss"] == pytest.approx(own["loss"], rel=0.01)


def test_some_tokens_from_the_first_file_on(workdir, texts):
    result = run(workdir, f"{texts}/a.txt,{texts}/b.jsonl", "--context=8", "--max_tokens=30")
    rows = scored_one_by_one(workdir, 8, 8)[:30]
    assert result["tokens"] == 30 and result["documents"] == 1
    assert result["loss"] == pytest.approx(rows[:, 1].mean(), rel=1e-5)
    assert result["bytes"] == 28  # two of the next character's three bytes are scored, and not the character
    all_of_it = run(workdir, texts, "--context=8", "--max_tokens=100000")
    assert all_of_it["bytes"] == sum(len(text.encode()) for text in TEXTS)


def test_quarters_that_no_token_falls_into(workdir, texts, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("abc")
    result = run(workdir, tmp_path)  # the context is the run's sequence_length, 32
    assert (result["context"], result["stride"], result["tokens"]) == (32, 32, 3)
    assert result["quarters"][1] | {"tokens": 0, "loss": None, "accuracy": None} == result["quarters"][1]
    assert capsys.readouterr().out.splitlines()[-1].split() == ["24-31", "0", "-", "-", "-", "-"]
    json.dumps(result, allow_nan=False)
    five = run(workdir, tmp_path, "--context=5")
    assert [quarter["tokens"] for quarter in five["quarters"]] == [2, 1, 0, 0]
    assert len(capsys.readouterr().out.splitlines()) == 6  # no row for the places 6 and 7, which are not there


def test_bits_per_byte_of_tokens_longer_than_a_byte(tmp_path, texts):
    config = tiny_config(data__tokenizer="bpe:300", model__vocab_size=320)
    write_workdir(tmp_path, config)
    (tmp_path / "tokenizer.bytes").unlink()
    train_bpe(300, TEXTS).save(str(tmp_path))
    result = run(tmp_path, texts, "--context=16")
    assert result["tokens"] < result["bytes"] == sum(len(text.encode()) for text in TEXTS)
    bits = result["loss"] * result["tokens"] / math.log(2)
    assert result["bits_per_byte"] == pytest.approx(bits / result["bytes"])
    parts = [quarter["bits_per_byte"] * quarter["tokens"] for quarter in result["quarters"]]
    assert sum(parts) / result["tokens"] == pytest.approx(result["bits_per_byte"])


def test_the_sums_of_quarters_are_those_of_the_loss(workdir):
    model = load_model(Workdir(workdir))
    batch = jax.tree.map(jnp.asarray, random_batch(0))
    sums = make_quarter_step(model.network)(model.params, model.projections, batch)
    wanted = token_sums(predict(model.network.bind(model.params, model.projections), batch), batch)
    for name in ("nll", "correct", "weight"):
        assert sums[name].shape == (4,)
        np.testing.assert_allclose(sums[name].sum(), wanted[name], rtol=1e-5)


def test_the_sums_of_quarters_are_the_same_from_logits_in_chunks(workdir, monkeypatch):
    model = load_model(Workdir(workdir))
    batch = jax.tree.map(jnp.asarray, random_batch(0))
    whole = make_quarter_step(model.network)(model.params, model.projections, batch)
    make_chunks(monkeypatch, 9)  # of 128 tokens
    chunked = make_quarter_step(model.network)(model.params, model.projections, batch)
    assert chunked.keys() == whole.keys() and whole["nll"].min() > 1
    for name, sums in whole.items():
        np.testing.assert_allclose(chunked[name], sums, rtol=1e-6)


def test_one_program_for_all_batches(workdir, texts):
    model = load_model(Workdir(workdir))
    calls = []

    class Counting(type(model.network)):
        def bind(self, params, projections):
            calls.append(1)
            return super().bind(params, projections)

    fields = {name: getattr(model.network, name) for name in model.network.__dataclass_fields__}
    scorer = TextScorer(model, 8, 8, make_quarter_step(Counting(**fields)))
    scorer.score(open_corpus("text", str(texts)), 100, 3, None, progress_bar)
    assert calls == [1]  # traced once


def test_the_text_may_be_in_any_field(workdir, tmp_path):
    for field in ("text", "content"):
        (tmp_path / f"{field}.jsonl").write_text("".join(json.dumps({field: text}) + "\n" for text in TEXTS))
    flags = ("--context=16", "--text_field=content")
    results = run(workdir, tmp_path / "text.jsonl", "--context=16"), run(workdir, tmp_path / "content.jsonl", *flags)
    one, other = ({**result, "text": None, "seconds": None} for result in results)
    assert one == other


def test_a_result_is_written_and_never_overwritten(workdir, texts, tmp_path, capsys):
    path = tmp_path / "result.json"
    result = run(workdir, texts, "--context=16", f"--json={path}")
    assert json.loads(path.read_text()) == result
    capsys.readouterr()
    before = path.read_bytes()
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(evaluate.parse_flags(["", f"--workdir={workdir}", f"--text={texts}", f"--json={path}"]))
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"error: --json={path}: the file exists, and results are not overwritten\n"
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text={dir}/none/*.txt"], "no file matches '{dir}/none/*.txt'"),
        (["--text={dir}/notes.csv"], "{dir}/notes.csv is not a file the text source reads"),
        (["--text={dir}/pipe.txt"], "{dir}/pipe.txt is not a regular file"),
        (["--context=99999999999999999999999"], "--context=99999999999999999999999: must be from 1 to 2147483647"),
        (["--json="], "--json=: give the name of a file"),
        (["--text={dir}/empty.txt"], "{dir}/empty.txt is empty"),
        (["--text={dir}/blank.jsonl"], "--text={dir}/blank.jsonl: no document has a token to score"),
        (["--text={dir}/good.txt,{dir}/late.txt"], "{dir}/late.txt is not UTF-8 text: byte 0xff at offset 0"),
        (["--text={dir}/bad.jsonl"], '{dir}/bad.jsonl:1: no "text" field that is a string'),
        (["--text={dir}/bad.jsonl", "--text_field=body"], '{dir}/bad.jsonl:1: no "body" field that is a string'),
        (["--context=3"], "--context=3: must be at least 4"),
        (["--context=0"], "--context=0: must be from 1 to"),
        (["--context=x"], "argument --context: 'x' is not a whole number"),
        (["--context=8", "--stride=9"], "--stride=9: must be at most --context=8"),
        (["--stride=-1"], "--stride=-1: must be from 1 to"),
        (["--batch_size=0"], "--batch_size=0: must be from 1 to"),
        (["--max_tokens=0"], "--max_tokens=0: must be from 1 to"),
        (["--json={dir}/none/result.json"], "--json={dir}/none/result.json: its directory does not exist"),
        (["--json={dir}"], "--json={dir}: the file exists"),
        (["--step=4"], "no checkpoint step 4 in"),
        (["--workdir={dir}/none"], "{dir}/none/config.json cannot be read: No such file"),
        (["--sauce=1"], "unrecognized arguments: --sauce=1"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(workdir, tmp_path, flags, message, capsys):
    for name, content in (("empty.txt", b""), ("blank.jsonl", b"\n"), ("bad.jsonl", b"{}"), ("late.txt", b"\xff")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "notes.csv").write_text("notes")
    os.mkfifo(tmp_path / "pipe.txt")
    given = [flag.format(dir=tmp_path) for flag in flags]
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(evaluate.parse_flags(["", f"--workdir={workdir}", f"--text={tmp_path}/good.txt", *given]))
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if "it/s" not in line and "B/s" not in line]
    assert errors[-1].startswith(f"error: {message.format(dir=tmp_path)}")
    assert "Traceback" not in printed.err and printed.out == ""


def test_the_command_itself(workdir, texts):
    flags = [f"--workdir={workdir}", f"--text={texts}", "--context=8"]
    (shown,) = run_commands([("darkformer_jax.evaluate", flags)])
    assert shown.status == 0 and shown.out.startswith(f"{workdir} step 3: 3 documents, ") and "loss=" in shown.err


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A model that was not trained, asked everything, and what it was asked about."""
    directory = tmp_path_factory.mktemp("probed")
    write_workdir(directory, tiny_config(sequence_length=512))
    words = np.random.default_rng(0).choice(["sense", "and", "sensibility", "pride", "prejudice"], 2000)
    (directory / "text.txt").write_text(" ".join(words))
    flags = ("--probes=copy,repeat,lookup,classes,positions", "--distances=192", "--rows=3")
    return directory, run(directory, directory / "text.txt", *flags, f"--json={directory}/probes.json")


def test_probes_of_a_model_that_was_not_trained_are_those_of_chance(probed):
    directory, result = probed
    assert result == json.loads((directory / "probes.json").read_text())
    found = {(entry["probe"], entry["at"]): entry["figures"] for entry in result["probes"]}
    assert list(found) == [("copy", "192"), ("repeat", "192"), ("lookup", "192"), ("classes", "0"), ("classes", "192"),
                           ("positions", "0-255"), ("positions", "256-511")]  # fmt: skip
    for name in ("copy", "repeat"):
        assert found[name, "192"]["second_copy"]["mean"] > math.log(257)  # that of equal probabilities
        assert abs(found[name, "192"]["gain"]["mean"]) < 0.2
    assert found["lookup", "192"]["right"]["mean"] == 0
    for octave in ("0-255", "256-511"):
        assert found["positions", octave]["bits_per_token"]["mean"] > math.log2(257)


def test_the_table_of_probes_has_the_figures(probed, capsys):
    directory, result = probed
    again = run(directory, directory / "text.txt", "--probes=copy", "--distances=192", "--rows=3")
    table = capsys.readouterr().out
    assert again["probes"] == [result["probes"][0]]  # the same rows, whatever else is asked
    figures = result["probes"][0]["figures"]["second_copy"]
    assert f"{figures['mean']:.3f} ± {figures['standard_error']:.3f}" in table
    assert "copy: a passage that comes again" in table and "lookup" not in table


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--probes=needle",), "'needle' is no probe; allowed: copy, repeat"),
        (("--probes=copy",), "copy needs rows of 640 tokens, and the context is 512"),
        (("--probes=copy", "--distances=500"), "copy needs rows of 628 tokens, and the context is 512"),
        (("--probes=copy", "--distances=192", "--rows=300"), "the text is too short: .* and 300 are needed"),
        (("--probes=copy", "--stride=3"), "--stride=3: --probes have none; allowed: no --stride here"),
        (("--probes=copy", "--max_tokens=3"), "--max_tokens=3: --probes have none"),
        (("--rows=3",), "--rows=3: only --probes have it; allowed: no --rows here"),
        (("--distances=3",), "--distances=3: only --probes have it"),
        (("--probes=copy", "--rows=0"), "--rows=0: must be from 1"),
        (("--probes=copy", "--seed=-1"), "--seed=-1: must be from 0"),
    ],
)
def test_probes_that_cannot_be_asked_are_refused(probed, flags, message):
    directory, _ = probed
    with pytest.raises(UserError, match=message):
        run(directory, directory / "text.txt", *flags)


def test_a_classifier_is_not_probed(probed, tmp_path):
    directory, _ = probed
    config = json.loads((directory / "config.json").read_text())
    config["task"]["name"] = "classification"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="task.name = 'classification' predicts no next token"):
        run(tmp_path, directory / "text.txt", "--probes=copy")
