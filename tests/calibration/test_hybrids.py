"""Models that share layers, against the same models run whole, one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.calibration.hybrids import Hybrids
from darkformer_jax.config.specs import model_spec
from darkformer_jax.data.progress import no_progress
from darkformer_jax.data.tokenizers import BytesTokenizer
from darkformer_jax.model.network import Network
from darkformer_jax.model.transformer import Block
from tests.tiny_runs import tiny_config

DARK = {
    "model__attention__window": 8,
    "model__attention__chunk_size": 8,
    "model__num_layers": 3,
    "model__attention__num_sinks": 1,
}


def network(pattern):
    return Network.of(model_spec(tiny_config(**DARK, model__attention__pattern=pattern), 257))


def by_layers(exact, replaced, layers):
    """The arrays of a model whose pattern names every layer, each cut out of one of two models of one stack."""
    params, projections = {name: exact[0][name] for name in ("embedding", "final_norm")}, {}
    for layer in range(3):
        own, fixed = replaced if layer in layers else exact
        params[f"blocks_{layer}"] = jax.tree.map(lambda leaf, row=layer: leaf[row : row + 1], own["blocks_0"])
        if layer in layers:
            projections[f"blocks_{layer}"] = jax.tree.map(
                lambda leaf, row=layer: leaf[row : row + 1], fixed["blocks_0"]
            )
    return params, projections


@functools.cache
def whole(pattern):
    """The logits of one row, as a jitted function of the model's arrays."""
    made = network(pattern)

    @jax.jit
    def logits(arrays, row):
        places = jnp.arange(len(row))[None]
        return made.bind(*arrays)(row[None], jnp.ones_like(places), places)[0][0]

    return logits


def nats(logits, tokens, first):
    log_p = jax.nn.log_softmax(logits)[jnp.arange(len(tokens) - 1), tokens[1:]]
    return -np.asarray(log_p)[first - 1 :]


@pytest.fixture(scope="module")
def pair():
    """(the arrays of the exact model, those of the replaced one), with equal weights outside of the mechanisms."""
    exact = jax.jit(network("softmax").init)(jax.random.key(0))
    params, projections = jax.jit(network("dark").init)(jax.random.key(1))
    mechanism = {"M": params["blocks_0"]["attention"]["mechanism"]["M"]}
    block = exact[0]["blocks_0"]
    params = exact[0] | {"blocks_0": block | {"attention": block["attention"] | {"mechanism": mechanism}}}
    return exact, (params, projections)


@pytest.mark.parametrize("begin", [0, 1])
def test_shared_beginnings_change_no_figure(pair, begin):
    exact, replaced = pair
    passages = np.array(jax.random.randint(jax.random.key(2), (2, 48 + begin), 0, 257), np.int32)
    tokenizer = BytesTokenizer()
    tokenizer.adds_bos = bool(begin)
    both = Hybrids(network("softmax").bind(*exact), network("dark").bind(*replaced), passages, tokenizer)
    sets = [frozenset(), frozenset({0}), frozenset({1}), frozenset({0, 2}), frozenset(range(3))]
    found = both.measure(sets, no_progress)
    for layers, quality in zip(sets, found, strict=True):
        pattern = ",".join("dark" if layer in layers else "softmax" for layer in range(3))
        arrays = by_layers(exact, replaced, layers)
        loss, copy = [], []
        for passage in passages:
            once = passage[begin : begin + 24]
            repeated = np.concatenate([passage[:begin], once, once])
            loss.append(nats(whole(pattern)(arrays, passage), passage, 1))
            copy.append(nats(whole(pattern)(arrays, repeated), repeated, 24 + begin))
        assert {len(x) for x in copy} == {24}
        np.testing.assert_allclose(quality, (np.mean(loss), np.mean(copy)), rtol=2e-6)
    assert len({quality.loss for quality in found}) == len(sets)


def test_each_kind_of_layer_is_traced_once(pair, monkeypatch):
    exact, replaced = pair
    passages = np.zeros((2, 34), np.int32)
    both = Hybrids(network("softmax").bind(*exact), network("dark").bind(*replaced), passages, BytesTokenizer())
    traced, run = [], Block.__call__

    def counted(self, *arguments):
        traced.append(type(self.attention.mechanism).__name__)
        return run(self, *arguments)

    monkeypatch.setattr(Block, "__call__", counted)
    both.measure([frozenset(), frozenset({1}), frozenset(range(3))], no_progress)
    assert sorted(traced) == ["Dark", "Softmax"]


def test_the_bar_counts_every_run_of_a_layer(pair):
    exact, replaced = pair
    both = Hybrids(
        network("softmax").bind(*exact), network("dark").bind(*replaced), np.zeros((1, 34), np.int32), BytesTokenizer()
    )
    bars = []

    def bar(total, unit, label=""):
        bars.append(no_progress(total, unit, label))
        bars[-1].count, bars[-1].wanted = 0, total
        bars[-1].update = lambda: setattr(bars[-1], "count", bars[-1].count + 1)
        return bars[-1]

    both.measure([frozenset({i}) for i in range(3)] + [frozenset()], bar)
    assert bars[0].count == bars[0].wanted == (3 + 2 + 1) + 3
