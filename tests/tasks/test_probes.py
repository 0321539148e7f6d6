"""What probes say of models whose answers are known."""

import math

import jax
import numpy as np
import pytest

from darkformer_jax.data.probe_rows import ProbeRow, ProbeText, position_rows
from darkformer_jax.data.probe_words import LABELS
from darkformer_jax.data.tokenizers import BytesTokenizer
from darkformer_jax.errors import UserError
from darkformer_jax.runs.load import load_model
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.probes import ask, measure, parse_distances, parse_probes
from darkformer_jax.tasks.row_scores import RowScores, make_scorer
from tests.tiny_runs import tiny_config, write_workdir

pytestmark = pytest.mark.standard_promotion  # the state of a checkpoint is made with its optimizer

VOCABULARY = 257


def random_text(context=2048):
    """Letters in random order, so that no long piece comes twice unless a probe repeats it."""
    letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, 40_000)
    return ProbeText([letters.astype(np.int32)], BytesTokenizer(), context, seed=0)


def copies_what_came_before(rows):
    """Predicts what followed the longest piece before that is the end of what it has read; of one letter, nothing."""
    return [score_copies(row) for row in rows]


def score_copies(row):
    tokens = row.tokens.tolist()
    correct = [False]
    for place in range(1, len(tokens)):
        longest, predicted = 3, None
        for before in range(1, place):
            if tokens[before - 1] == tokens[place - 1]:
                size = next((n for n in range(1, before) if tokens[before - 1 - n] != tokens[place - 1 - n]), before)
                if size >= longest:
                    longest, predicted = size, tokens[before]
        correct.append(predicted == tokens[place])
    nll = np.where(correct, 0.0, math.log(VOCABULARY))
    return RowScores(nll, np.array(correct), np.zeros(len(row.candidates)))


def knows_nothing(rows):
    """All tokens are equally likely, and the first id of the vocabulary counts as the largest."""
    uniform = math.log(VOCABULARY)
    return [
        RowScores(np.full(len(r.tokens), uniform), r.tokens == 0, np.full(len(r.candidates), -uniform)) for r in rows
    ]


def means(asked, scorer):
    return [{name: figure["mean"] for name, figure in entry["figures"].items()} for entry in measure(asked, scorer)]


@pytest.mark.parametrize("name", ["copy", "repeat"])
def test_a_model_that_copies_reads_the_second_copy_at_no_cost_and_one_that_knows_nothing_at_log_v(name):
    asked = ask(name, random_text(), [128, 200], 2)
    uniform = math.log(VOCABULARY)
    for figures in means(asked, copies_what_came_before):
        assert figures["second_copy"] == 0.0 and figures["accuracy"] == 1.0
        assert figures["first_copy"] == pytest.approx(uniform, rel=0.05)  # three letters may come again by chance
        assert figures["gain"] == figures["first_copy"]
    for figures in means(asked, knows_nothing):
        wanted = {"second_copy": uniform, "first_copy": uniform, "gain": 0.0, "accuracy": 0.0}
        assert figures == pytest.approx(wanted)


def test_a_model_that_copies_finds_every_fact_and_one_that_knows_nothing_none():
    asked = ask("lookup", random_text(), [400], 2)
    assert means(asked, copies_what_came_before) == [{"right": 1.0, "answer": 0.0}]
    assert means(asked, knows_nothing) == [pytest.approx({"right": 0.0, "answer": math.log(VOCABULARY)})]


def test_an_answer_with_one_wrong_token_is_wrong():
    def forgets_a_digit(rows):
        for row, score in zip(rows, copies_what_came_before(rows), strict=True):
            for _, end in row.parts["400"]:
                if chr(row.tokens[end - 1]).isdigit():
                    score.correct[end - 1] = False
            yield score

    ((figures),) = means(ask("lookup", random_text(), [400], 3), lambda rows: list(forgets_a_digit(rows)))
    assert figures == {"right": pytest.approx(1 / 3), "answer": 0.0}  # of three facts, two have numbers


def test_a_model_that_knows_nothing_is_right_by_chance_and_one_that_obeys_the_rule_always():
    asked = ask("classes", random_text(), [100], 4)
    assert [one.at for one in asked] == ["0", "100"]
    assert means(asked, knows_nothing) == [{"right": 1 / len(LABELS)}] * 2

    def obeys(rows):
        return [s._replace(candidates=np.eye(4)[r.answer]) for r, s in zip(rows, knows_nothing(rows), strict=True)]

    def defies(rows):
        return [s._replace(candidates=-np.eye(4)[r.answer]) for r, s in zip(rows, knows_nothing(rows), strict=True)]

    assert means(asked, obeys) == [{"right": 1.0}] * 2
    assert means(asked, defies) == [{"right": 0.0}] * 2


def test_bits_are_those_of_the_octave():
    def later_is_cheaper(rows):
        return [s._replace(nll=1024.0 - np.arange(len(s.nll))) for s in knows_nothing(rows)]

    asked = ask("positions", random_text(600), None, 2)
    assert [(one.at, one.place) for one in asked] == [("0-255", 255), ("256-511", 511), ("512-599", 599)]
    bits = [figures["bits_per_token"] for figures in means(asked, later_is_cheaper)]
    wanted = [1024 - np.mean(range(first + 1, last + 2)) for first, last in ((0, 255), (256, 511), (512, 599))]
    assert bits == pytest.approx(np.array(wanted) / math.log(2))


def test_the_standard_error_is_that_of_the_rows():
    def one_row_each(rows):
        return [s._replace(nll=np.full(len(s.nll), float(i))) for i, s in enumerate(knows_nothing(rows))]

    (entry,) = measure(ask("copy", random_text(), [128], 4), one_row_each)
    assert entry["rows"] == 4 and entry["figures"]["second_copy"] == {
        "mean": 1.5,
        "standard_error": pytest.approx(np.std([0, 1, 2, 3], ddof=1) / 2),
    }
    (single,) = measure(ask("copy", random_text(), [128], 1), one_row_each)
    assert single["figures"]["second_copy"]["standard_error"] is None


def test_default_distances_that_do_not_fit_are_left_out_in_words(capsys):
    for name, there in (("copy", ["512", "1,024"]), ("repeat", ["512", "1,024"]), ("lookup", ["512", "1,024"])):
        assert [one.at for one in ask(name, random_text(2048), None, 2)] == there
        assert f"note: {name} at 4,096 is left out: {name} needs rows of" in capsys.readouterr().err
    with pytest.raises(UserError, match="copy needs rows of 640 tokens, and the context is 512"):
        ask("copy", random_text(512), None, 2)
    with pytest.raises(UserError, match="copy needs rows of 4,224 tokens, and the context is 2,048"):
        ask("copy", random_text(2048), [512, 4096], 2)


def test_the_same_rows_come_whatever_else_is_asked():
    alone = measure(ask("copy", random_text(), [200], 2), knows_nothing)
    among = measure(ask("copy", random_text(), [100, 200], 2), knows_nothing)
    assert among[1] == alone[0] and among[0]["fingerprint"] != alone[0]["fingerprint"]


def test_lists_of_probes_and_distances():
    assert parse_probes("copy, positions,copy") == ["copy", "positions"]
    with pytest.raises(UserError, match="--probes=copy,needle: 'needle' is no probe; allowed: copy, repeat, lookup"):
        parse_probes("copy,needle")
    assert parse_distances("1024,512") == [512, 1024]
    with pytest.raises(UserError, match="--distances=1k: must be whole numbers"):
        parse_distances("1k")
    with pytest.raises(UserError, match="--distances=63: must be at most 8 numbers of tokens, and none below 64"):
        parse_distances("63")
    with pytest.raises(UserError, match="must be at most 8 numbers"):
        parse_distances("100,200,300,400,500,600,700,800,900")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    write_workdir(directory, tiny_config())
    return load_model(Workdir(directory))


def test_scores_are_the_models_own_and_padding_changes_none(model):
    """Rows of three lengths in one batch of five, against one forward pass for each."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 90).astype(np.int32)
    rows = [ProbeRow(tokens, {}), ProbeRow(tokens[:41], {}, (7, 250, 3), 0), ProbeRow(tokens[5:75], {})]
    read = []
    scored = make_scorer(model, 5, read.append)(rows)
    assert read == [90 + 41 + 70]
    forward = jax.jit(lambda ids: model.network.bind(model.params, model.projections)(
        ids[None], jax.numpy.ones_like(ids)[None], jax.numpy.arange(len(ids))[None])[0][0])  # fmt: skip
    for row, score in zip(rows, scored, strict=True):
        logp = np.asarray(jax.nn.log_softmax(forward(row.tokens)))
        wanted = -logp[np.arange(len(row.tokens) - 1), row.tokens[1:]]
        assert math.isnan(score.nll[0]) and not score.correct[0]
        np.testing.assert_allclose(score.nll[1:], wanted, rtol=1e-4)
        assert (score.correct[1:] == (logp[:-1].argmax(axis=-1) == row.tokens[1:])).all()
        np.testing.assert_allclose(score.candidates, logp[-1, list(row.candidates)], rtol=1e-4)


def test_a_model_that_is_not_finite_is_refused(model):
    broken = model._replace(params=jax.tree.map(lambda x: x * np.nan, model.params))
    with pytest.raises(UserError, match="the model's loss is nan: its weights are damaged"):
        make_scorer(broken, 2, print)(position_rows(random_text(64), 1))
