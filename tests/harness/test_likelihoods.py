import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.data.progress import no_progress
from darkformer_jax.errors import UserError
from darkformer_jax.harness.likelihoods import Pair, PairScorer
from darkformer_jax.runs.load import load_model
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.trained_model import TrainedModel
from tests.tiny_runs import tiny_config, write_workdir

pytestmark = pytest.mark.standard_promotion  # the state of a checkpoint is made with its optimizer

random = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    write_workdir(directory, tiny_config())
    return load_model(Workdir(directory))


@pytest.fixture(scope="module")
def alone(model):
    return TrainedModel(model)


def ids(*shape):
    return random.integers(0, 256, shape).tolist()


def one_by_one(alone, pairs, max_length):
    """(log p, is greedy) of every pair, each alone."""
    for context, continuation in pairs:
        whole = [*context, *continuation][-(max_length + 1) :]
        logp = np.asarray(jax.nn.log_softmax(alone.logits(whole[:-1])), np.float64)[-len(continuation) :]
        chosen = logp[np.arange(len(continuation)), continuation]
        yield chosen.sum(), (logp.argmax(axis=-1) == continuation).all()


def score(model, pairs, batch_size=4, max_length=32):
    return PairScorer(model, batch_size, max_length).score([Pair(*pair) for pair in pairs], no_progress)


def test_pairs_in_batches_have_the_likelihoods_of_pairs_alone(model, alone):
    pairs = [(ids(before), ids(after)) for before, after in [(1, 1), (30, 2), (3, 17), (5, 5), (12, 1), (1, 32)]]
    for got, (logp, is_greedy) in zip(score(model, pairs, 3), one_by_one(alone, pairs, 32), strict=True):
        assert got.log_probability == pytest.approx(logp, rel=1e-5) and got.is_greedy == is_greedy


def test_the_end_of_a_pair_that_is_too_long_is_read(model, alone):
    pairs = [(ids(50), ids(3)), (ids(90), ids(32))]
    for got, (logp, _) in zip(score(model, pairs), one_by_one(alone, pairs, 32), strict=True):
        assert got.log_probability == pytest.approx(logp, rel=1e-5)


def test_more_places_than_are_in_memory_at_a_time(model, alone):
    pairs = [(ids(3), ids(150)), (ids(2), ids(65)), (ids(100), ids(64))]
    got = score(model, pairs, max_length=200)
    for answer, (logp, _) in zip(got, one_by_one(alone, pairs, 200), strict=True):
        assert answer.log_probability == pytest.approx(logp, rel=1e-5)


def test_the_likeliest_continuation_is_greedy_and_no_other_is(model, alone):
    context = ids(9)
    likeliest = []
    for _ in range(3):
        likeliest.append(int(alone.logits(context + likeliest)[-1].argmax()))
    other = [likeliest[0], (likeliest[1] + 1) % 256, likeliest[2]]
    last = [*likeliest[:2], (likeliest[2] + 1) % 256]
    greedy = [answer.is_greedy for answer in score(model, [(context, c) for c in (likeliest, other, last)])]
    assert greedy == [True, False, False]


def test_pairs_that_differ_in_their_last_token_are_one_row(model, alone, monkeypatch):
    context = ids(6)
    pairs = [(context, [7]), (context, [8]), (context[:-1], [context[-1], 9]), (context, [7]), (ids(6), [7])]
    scorer = PairScorer(model, 8, 32)
    shapes = []
    step = scorer._step
    monkeypatch.setattr(scorer, "_step", lambda *a, width: shapes.append(a[2].shape) or step(*a, width=width))
    got = scorer.score([Pair(*pair) for pair in pairs], no_progress)
    assert shapes == [(2, 16)]
    assert got[0] == got[3]
    for answer, (logp, is_greedy) in zip(got, one_by_one(alone, pairs, 32), strict=True):
        assert answer.log_probability == pytest.approx(logp, rel=1e-5) and answer.is_greedy == is_greedy


def test_lengths_share_few_programs(model, monkeypatch):
    scorer = PairScorer(model, 2, 1000)
    shapes = set()
    monkeypatch.setattr(scorer, "_step", lambda *a, width: shapes.add((*a[2].shape, width)) or _nothing(a, width))
    scorer.score([Pair(ids(n), ids(1)) for n in range(1, 301)], no_progress)
    assert {shape[1] for shape in shapes} == {16, 24, 32, 48, 64, 96, 128, 192, 256, 384}
    assert len(shapes) == 10


def _nothing(arguments, width):
    rows, lasts = arguments[2].shape[0], arguments[4]
    return np.zeros((rows, width)), np.zeros((rows, width), np.int32), np.zeros(lasts.shape)


def test_no_pairs_have_no_likelihoods(model):
    assert score(model, []) == []


def test_damaged_weights_are_named(model):
    broken = model._replace(params=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), model.params))
    with pytest.raises(UserError, match="a log-likelihood is nan: the model's weights are damaged"):
        score(broken, [(ids(3), ids(2))])
