import math

import numpy as np
import pytest

import darkformer_jax
from darkformer_jax import evaluate, generate
from darkformer_jax.errors import UserError
from tests.tiny_runs import tiny_config, write_workdir

pytestmark = pytest.mark.standard_promotion  # the state of a checkpoint is made with its optimizer


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    write_workdir(directory, tiny_config())
    return str(directory)


@pytest.fixture(scope="module")
def model(workdir):
    return darkformer_jax.load_model(workdir)


def test_it_writes_what_the_verb_writes(model, workdir, capsys):
    flags = [f"--workdir={workdir}", "--prompt=def ", "--max_new_tokens=9", "--top_k=5", "--seed=3"]
    generate.main(generate.parse_flags(["generate", *flags]))
    assert "def " + model.generate("def ", 9, top_k=5, seed=3) + "\n" == capsys.readouterr().out


def test_its_score_is_the_verbs(model, workdir, tmp_path):
    text = "".join(f"line {i} of {i * i}\n" for i in range(30))
    (tmp_path / "a.txt").write_text(text)
    flags = [f"--workdir={workdir}", f"--text={tmp_path}/a.txt", "--batch_size=1"]
    wanted = evaluate.evaluate(evaluate.parse_flags(["evaluate", *flags]))
    score = model.score(text)
    assert score._asdict() == {name: wanted[name] for name in score._fields}


def test_its_logits_are_those_that_the_score_sums(model):
    text = "def f(x)"
    ids = model.tokenizer.encode(text)
    logits = np.asarray(model.logits(ids), np.float64)
    assert logits.shape == (len(ids), model.tokenizer.vocab_size)
    with_bos = [model.tokenizer.bos_id, *ids] if model.tokenizer.adds_bos else ids
    logits = np.asarray(model.logits(with_bos), np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nll = -np.log([row[token] for row, token in zip(probabilities[:-1], with_bos[1:], strict=True)])
    score = model.score(text)
    assert score.tokens == len(nll) and math.isclose(score.loss, nll.mean(), rel_tol=1e-5)


def test_rows_of_a_batch_and_lengths_do_not_change_the_logits(model):
    ids = np.arange(60, 80)
    one = np.asarray(model.logits(ids))
    batch = np.asarray(model.logits([ids, ids[::-1]]))
    assert batch.shape == (2, 20, model.tokenizer.vocab_size)
    assert np.abs(batch[0] - one).max() < 1e-5
    assert np.abs(np.asarray(model.logits(ids[:7])) - one[:7]).max() < 1e-5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.logits([]), r"ids have shape \(0,\)"),
        (lambda m: m.logits([0.5]), "expected integers"),
        (lambda m: m.logits([1, 10**6]), "ids are from 1 to 1000000; allowed: 0 to"),
        (lambda m: m.logits([[1, 2], [3]]), "the rows of ids have different lengths"),
        (lambda m: m.generate("a", 0), "max_new_tokens = 0: must be a whole number from 1"),
        (lambda m: m.generate("a", 1.5), "max_new_tokens = 1.5: must be a whole number from 1"),
        (lambda m: m.generate("a", top_k=1.5), "top_k = 1.5: must be a whole number from 0"),
        (lambda m: m.generate("a", seed=2**32), "seed = 4294967296: must be a whole number from 0 to 4294967295"),
        (lambda m: m.generate("a", seed=-1), "seed = -1"),
        (lambda m: m.generate("\ud800"), "prompt has a lone surrogate at character 0"),
        (lambda m: m.score("a\ud800"), "text has a lone surrogate at character 1"),
        (lambda m: m.generate("a", temperature=-1.0), "temperature = -1.0"),
        (lambda m: m.score(""), "it has no token to predict"),
        (lambda m: m.score("abc", context=2), "context = 2: must be at least 4"),
        (lambda m: darkformer_jax.load_model("/nowhere"), "/nowhere/config.json cannot be read"),
    ],
)
def test_mistakes_are_named(model, call, message):
    with pytest.raises(UserError, match=message):
        call(model)
