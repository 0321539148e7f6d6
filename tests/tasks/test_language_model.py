import functools
import gzip
import math
import random
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax import generate
from darkformer_jax.data import Mixture, heldout_batches
from darkformer_jax.data.stream import memory_stream
from darkformer_jax.data.tokenizers import BytesTokenizer
from darkformer_jax.model.sampling import Sampler
from darkformer_jax.runs.origin import write_origin
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.language_model import (
    LanguageModel,
    TextEvaluation,
    bits_of_sources,
    compressors,
    tokens_per_byte,
)
from darkformer_jax.training.evaluation import make_eval_step, measure
from tests.tiny_runs import experiment_of, tiny_config, write_text, write_workdir

TEXTS = ["def f(x):\n    return x\n", "héllo wörld " * 9, "a", "import os, sys; print(os, sys)" * 3]
LENGTH = 16


class EndsOfTheirOwn(BytesTokenizer):
    """Bytes whose documents end with an id of their own."""

    vocab_size = 258
    eos_id = 257


@functools.cache
def experiment():
    return experiment_of(tiny_config(model__attention__kind="softmax", sequence_length=LENGTH), 258)


@functools.cache
def arrays():
    network = experiment().network
    rng = np.random.default_rng(0)
    # Larger than an initialisation, so that losses of tokens differ a lot.
    params = network.map_params(lambda _, variable: jnp.asarray(rng.normal(size=variable.shape), jnp.float32))
    return params, {}


@functools.cache
def eval_step():
    return make_eval_step(experiment().network, experiment().objective, experiment().mesh)


def result(stream, batch_size, max_batches=0):
    batches = heldout_batches(stream, batch_size=batch_size, sequence_length=LENGTH, max_batches=max_batches)
    sums, rows = measure(eval_step(), *arrays(), batches, experiment().batch_sharding)
    assert not rows
    return TextEvaluation.of(sums, tokens_per_byte(stream))


def nll_and_correct(tokens, is_start, skipped=()):
    """Of every token but the first, in float64 by rows of the stream; targets at `skipped` places do not count."""
    network = experiment().network
    params, projections = arrays()
    logits_of = jax.jit(lambda *batch: network.bind(params, projections)(*batch)[0])
    losses, correct = [], []
    for start in range(0, len(tokens) - 1, LENGTH):
        inputs, targets = tokens[start : start + LENGTH], tokens[start + 1 : start + LENGTH + 1]
        inputs = inputs[: len(targets)]
        starts = is_start[start : start + len(inputs)].copy()
        starts[0] = True
        segments = np.zeros((1, LENGTH), np.int32)
        segments[0, : len(inputs)] = np.cumsum(starts)
        positions = np.zeros((1, LENGTH), np.int32)
        for i in range(1, len(inputs)):
            positions[0, i] = 0 if starts[i] else positions[0, i - 1] + 1
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(inputs)] = inputs
        logits = np.asarray(logits_of(padded, segments, positions), np.float64)[0]
        for i, target in enumerate(targets):
            if start + 1 + i not in skipped:
                row = logits[i] - logits[i].max()
                losses.append(math.log(np.exp(row).sum()) - row[target])
                correct.append(row.argmax() == target)
    return np.array(losses), np.array(correct)


def flat(documents):
    tokens = np.concatenate([np.array(ids, np.int64) for ids in documents])
    is_start = np.concatenate([np.arange(len(ids)) == 0 for ids in documents])
    return tokens, is_start


def test_loss_accuracy_and_bits_per_byte_are_those_computed_by_hand():
    stream = memory_stream(TEXTS, BytesTokenizer())
    documents = [[256, *text.encode()] for text in TEXTS]
    tokens, is_start = flat(documents)
    tokens, is_start = np.append(tokens, 256), np.append(is_start, False)  # the separator that ends the stream
    losses, correct = nll_and_correct(tokens, is_start)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert len(losses) == num_bytes + len(TEXTS)
    measured = result(stream, 4)
    assert measured.tokens == len(losses)
    np.testing.assert_allclose(measured.loss, losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(measured.accuracy, correct.mean(), rtol=1e-6)
    np.testing.assert_allclose(measured.bits_per_byte, losses.sum() / math.log(2) / num_bytes, rtol=1e-5)


def test_what_follows_the_end_of_a_document_is_not_predicted():
    stream = memory_stream(TEXTS, EndsOfTheirOwn())
    documents = [[256, *text.encode(), 257] for text in TEXTS]
    tokens, is_start = flat(documents)
    losses, _ = nll_and_correct(tokens, is_start, skipped=np.flatnonzero(is_start).tolist())
    measured = result(stream, 4)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert measured.tokens == len(losses) == num_bytes + len(TEXTS)
    np.testing.assert_allclose(measured.loss, losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(measured.bits_per_byte, losses.sum() / math.log(2) / num_bytes, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_batch_size_does_not_matter(batch_size):
    stream = memory_stream(TEXTS, BytesTokenizer())
    wanted, measured = result(stream, 4), result(stream, batch_size)
    assert measured.tokens == wanted.tokens
    np.testing.assert_allclose(measured[:4], wanted[:4], rtol=1e-6)


def test_a_part_of_the_split_is_its_first_batches():
    stream = memory_stream(TEXTS, BytesTokenizer())
    assert result(stream, 4, max_batches=1).tokens == 4 * LENGTH
    assert result(stream, 4, max_batches=10**6) == result(stream, 4)


def test_nothing_to_evaluate_is_no_division_by_zero():
    nothing = TextEvaluation.of(dict.fromkeys(("nll", "correct", "weight"), np.zeros(())), 1.0)
    assert nothing == TextEvaluation(0.0, 0.0, 0.0, 0)


def test_names_in_the_metrics_file():
    measured = result(memory_stream(TEXTS, BytesTokenizer()), 4)
    assert list(measured.as_metrics()) == [
        "heldout_loss",
        "heldout_bits_per_byte",
        "heldout_accuracy",
        "heldout_tokens",
    ]
    assert f"bits per byte {measured.bits_per_byte:.4f}" in str(measured)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_every_source_of_a_mixture_has_the_bits_that_it_has_alone(batch_size):
    streams = tuple(memory_stream(texts, BytesTokenizer()) for texts in (TEXTS[:2], TEXTS[2:], ["x" * 40]))
    heldout = Mixture(("books", "code", "x"), streams, (5, 3, 2))
    batches = heldout_batches(heldout, batch_size=batch_size, sequence_length=LENGTH)
    sums, rows = measure(eval_step(), *arrays(), batches, experiment().batch_sharding)
    alone = [result(stream, 4) for stream in streams]
    of_sources = bits_of_sources(heldout, rows)
    assert [name for name, _ in of_sources] == ["books", "code", "x"]
    np.testing.assert_allclose([bits for _, bits in of_sources], [one.bits_per_byte for one in alone], rtol=1e-5)
    whole = TextEvaluation.of(sums, tokens_per_byte(heldout))._replace(of_sources=of_sources)
    assert whole.tokens == sum(one.tokens for one in alone)
    nats = sum(one.loss * one.tokens for one in alone)  # of all held-out text, whatever the weights
    np.testing.assert_allclose(whole.loss * whole.tokens, nats, rtol=1e-5)
    np.testing.assert_allclose(whole.bits_per_byte, nats / math.log(2) / heldout.num_bytes, rtol=1e-5)
    assert list(whole.as_metrics())[4:] == [f"heldout_bits_per_byte/{name}" for name in ("books", "code", "x")]
    assert f"by source:  books {alone[0].bits_per_byte:.4f}  code {alone[1].bits_per_byte:.4f}  x " in str(whole)


def test_a_source_of_which_nothing_is_measured_has_no_figure():
    streams = (memory_stream(["x" * 400], BytesTokenizer()), memory_stream(["y"], BytesTokenizer()))
    heldout = Mixture(("long", "short"), streams, (1, 1))
    batches = heldout_batches(heldout, batch_size=2, sequence_length=LENGTH, max_batches=1)
    _, rows = measure(eval_step(), *arrays(), batches, experiment().batch_sharding)
    assert [name for name, _ in bits_of_sources(heldout, rows)] == ["long"]


@pytest.mark.standard_promotion  # the state of a checkpoint is made with its optimizer
def test_samples_stop_at_the_ends_of_the_original_model_as_generate_does(tmp_path, monkeypatch, capsys):
    config = tiny_config(data__files=write_text(tmp_path / "text.txt"), sample__prompts=("ab", "c"))
    workdir = Workdir(tmp_path / "run")
    state = write_workdir(workdir.local, config)
    write_origin(workdir, {"config": {"eos_token_id": 7}})

    def stream(self, prompts, max_new_tokens):
        for token in (*b"xy", 7, *b"z"):
            yield np.full(len(prompts), token)

    monkeypatch.setattr(Sampler, "stream", stream)
    last = TextEvaluation(1.0, 1.0, 0.5, 9)
    task = LanguageModel.load(config, workdir)
    task.report(experiment_of(config).network, state.params, state.projections, workdir, last)
    samples = (workdir / "samples.txt").read_text()
    assert samples == "--- 'ab'\nabxy\n--- 'c'\ncxy\n" and samples in capsys.readouterr().out
    (tmp_path / "prompts.txt").write_text("ab\nc\n")
    generate.main(generate.parse_flags(["", f"--workdir={workdir}", f"--prompts_file={tmp_path}/prompts.txt"]))
    assert capsys.readouterr().out == samples


@pytest.mark.standard_promotion  # the state of a checkpoint is made with its optimizer
def test_samples_continue_held_out_text_and_say_from_where(tmp_path, monkeypatch, capsys):
    text = "".join(f"the {index}th sentence of a tale. " for index in range(400))
    (tmp_path / "tale.txt").write_text(text)
    config = tiny_config(data__files=str(tmp_path / "tale.txt"), sample__prompts=("mine", "", ""))
    task = LanguageModel.load(config, Workdir(tmp_path / "run"))
    experiment = experiment_of(config)
    state = write_workdir(tmp_path / "run", config)
    monkeypatch.setattr(Sampler, "stream", lambda self, prompts, count: iter([np.full(len(prompts), ord("!"))]))
    hint = task.report(
        experiment.network, state.params, state.projections, Workdir(tmp_path / "run"), TextEvaluation(1.0, 1.0, 0.5, 9)
    )
    lines = (tmp_path / "run" / "samples.txt").read_text().splitlines()
    assert lines[0] == "prompts from the held-out text, at 0%, 50% of it:" and lines[0] in capsys.readouterr().out
    first, second, mine = (line.removesuffix("!") for line in lines[2::2])
    heldout = task.data.heldout_text().decode()
    assert first != second and mine == "mine"
    assert first in heldout[: len(heldout) // 2] and second in heldout[len(heldout) // 2 :]
    assert hint.endswith(f"--prompt='{first}'")


def test_compressors_are_bits_per_byte_in_the_right_order() -> None:
    words = [f"word{index} " for index in range(500)]
    rng = random.Random(0)
    text = "".join(rng.choice(words) for _ in range(20_000)).encode()
    rates = compressors(text)
    assert list(rates) == ["gzip -9", "xz -9"]
    assert 0.5 < rates["xz -9"] < rates["gzip -9"] < 4
    assert rates["gzip -9"] == pytest.approx(8 * len(gzip.compress(text, 9)) / len(text))
    assert compressors(rng.randbytes(10_000))["xz -9"] == pytest.approx(8, rel=0.01)
    with pytest.raises(ValueError, match="nothing"):
        compressors(b"")


@pytest.mark.skipif(shutil.which("xz") is None or shutil.which("gzip") is None, reason="needs the programs")
def test_compressors_agree_with_the_programs() -> None:
    text = Path(random.__file__).read_bytes() * 3
    for command, rate in compressors(text).items():
        packed = subprocess.run([*command.split(), "-c"], input=text, capture_output=True, check=True).stdout
        assert rate == pytest.approx(8 * len(packed) / len(text), rel=2e-2)
