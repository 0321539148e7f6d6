"""The loss in chunks of tokens against whole logits, and against float64."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.distributed.sharding import MESH_AXES, make_mesh, sharding_of
from darkformer_jax.model import token_loss
from darkformer_jax.model.token_loss import LossFactors, Predictions, token_figures
from darkformer_jax.model.unembedding import Unembedding
from tests.tiny_runs import on_eight_devices

ROWS, VOCAB, WIDTH = (3, 7), 37, 16  # 21 tokens, which chunks of 5 do not divide; neither do they the vocabulary
FACTORS = {
    "text": LossFactors(nll=1.0),
    "text and z": LossFactors(nll=1.0, z=0.1),
    "teacher alone": LossFactors(nll=0.0, divergence=1.0),
    "all": LossFactors(nll=0.7, z=0.1, divergence=0.3),
}


def arrays(rows=ROWS, vocab=VOCAB, width=WIDTH, softcap=0.0, dtype="float32", seed=0):
    """(the model's predictions, a teacher's of another width, targets, weights of which a third are 0)."""
    random = np.random.default_rng(seed)
    sides = []
    for own_width, scale in ((width, 1.0), (width + 8, 2.0)):
        hidden = random.normal(size=(*rows, own_width)).astype(np.float32)
        matrix = scale * random.normal(size=(vocab, own_width)).astype(np.float32) * own_width**-0.5
        unembedding = Unembedding(jnp.asarray(matrix), dtype, softcap)
        sides.append(Predictions(jnp.asarray(hidden, dtype), unembedding))
    targets = random.integers(vocab, size=rows).astype(np.int32)
    weights = (random.random(rows) < 2 / 3).astype(np.float32)
    return *sides, jnp.asarray(targets), jnp.asarray(weights)


@pytest.fixture
def chunks_of(monkeypatch):
    """Sets how many tokens a chunk has."""

    def set_size(tokens):
        monkeypatch.setattr(token_loss, "_TOKENS", tokens)
        monkeypatch.setattr(token_loss, "_LOGITS", 1)

    return set_size


def losses_and_gradients(factors, model, teacher, targets, weights):
    """(loss, the figures of each token, the gradients of hidden states and matrix)."""

    @jax.jit
    def both(model):
        taught = teacher if factors.divergence else None
        return jax.value_and_grad(lambda m: token_loss.token_loss(m, targets, weights, factors, taught), has_aux=True)(
            model
        )

    (loss, figures), gradients = both(model)
    return jax.device_get((loss, figures, gradients.hidden, gradients.unembedding.matrix))


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def by_hand(factors, model, teacher, targets, weights):
    """The loss and its gradients in float64: of logits (softmax - onehot), times the slope of the soft-cap."""
    hidden, matrix = np.float64(model.hidden), np.float64(model.unembedding.matrix)
    cap = model.unembedding.softcap
    raw = np.einsum("bnd,vd->bnv", hidden, matrix)
    logits = cap * np.tanh(raw / cap) if cap else raw
    wanted = np.einsum("bnd,vd->bnv", np.float64(teacher.hidden), np.float64(teacher.unembedding.matrix))
    wanted = cap * np.tanh(wanted / cap) if cap else wanted
    log_p, log_q = log_softmax(wanted), log_softmax(logits)
    p, q, onehot = np.exp(log_p), np.exp(log_q), np.eye(logits.shape[-1])[targets]
    log_normalizer = np.log(np.exp(logits).sum(-1))
    loss = factors.nll * -(onehot * log_q).sum(-1)
    loss = loss + factors.z * log_normalizer**2 + factors.divergence * (p * (log_p - log_q)).sum(-1)
    slope = factors.nll * (q - onehot) + factors.divergence * (q - p) + 2 * factors.z * log_normalizer[..., None] * q
    slope = slope * (1 - np.tanh(raw / cap) ** 2 if cap else 1.0) * np.float64(weights)[..., None]
    of_matrix = np.einsum("bnv,bnd->vd", slope, hidden)
    return (np.float64(weights) * loss).sum(), np.einsum("bnv,vd->bnd", slope, matrix), of_matrix


def close(actual, expected, tolerance=1e-6):
    """To `tolerance` of the largest number."""
    actual, expected = np.float64(actual), np.float64(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
def test_chunks_give_the_loss_and_the_gradients_of_whole_logits(factors, softcap, chunks_of):
    given = arrays(softcap=softcap)
    whole = losses_and_gradients(factors, *given)
    chunks_of(5)
    chunked = losses_and_gradients(factors, *given)
    expected = by_hand(factors, *given)
    for measured in (whole, chunked):
        for actual, wanted in zip((measured[0], *measured[2:]), expected, strict=True):
            close(actual, wanted)
    for actual, wanted in zip(jax.tree.leaves(chunked), jax.tree.leaves(whole), strict=True):
        close(actual, wanted)
