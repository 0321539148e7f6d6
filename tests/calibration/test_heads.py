"""What heads gain by staying exact: gradients through mixtures of two models."""

import jax
import numpy as np
import pytest

from darkformer_jax.calibration.heads import MixedHeads
from darkformer_jax.calibration.hybrids import Hybrids
from darkformer_jax.config.specs import model_spec
from darkformer_jax.data.progress import no_progress
from darkformer_jax.data.tokenizers import BytesTokenizer
from darkformer_jax.model.network import Network
from darkformer_jax.ops.keys import key_of_seed
from tests.tiny_runs import tiny_config

FIELDS = {"model__num_layers": 3, "model__num_heads": 4, "model__num_kv_heads": 2, "model__dtype": "float32"}
PASSAGES = np.random.default_rng(0).integers(0, 256, (2, 48)).astype(np.int32)


@pytest.fixture(scope="module")
def models():
    """An exact model, and the same with features in the layers 0 and 2."""
    changes = {"attention__chunk_size": 8, "attention__window": 8, "attention__window_kernel": "softmax"}
    changes |= {"attention__num_features": 8, "attention__pattern": "dark,softmax,dark"}
    network = Network.of(model_spec(tiny_config(**FIELDS, **{f"model__{k}": v for k, v in changes.items()}), 257))
    exact = Network.of(model_spec(tiny_config(**FIELDS, model__attention__pattern="softmax,softmax,softmax"), 257))
    params, projections = network.init(key_of_seed(0))
    shared = jax.tree.map(lambda x: x, params)
    for place in (0, 2):
        del shared[f"blocks_{place}"]["attention"]["mechanism"]
    return exact.bind(shared, {}), network.bind(params, projections)


def test_whole_layers_have_the_quality_that_hybrids_have(models):
    heads = MixedHeads(*models, (0, 2), BytesTokenizer())
    shares = np.ones((3, 2))
    shares[2] = 0
    (wanted,) = Hybrids(*models, PASSAGES, BytesTokenizer()).measure([frozenset({2})], no_progress)
    assert heads.measure(shares, PASSAGES) == pytest.approx(wanted, rel=1e-5)


def test_gains_are_the_differences_of_the_quality(models):
    heads = MixedHeads(*models, (0, 2), BytesTokenizer())
    gains = heads.gains(PASSAGES[:1], no_progress)
    assert np.all(gains[1] == -np.inf)

    def cost(share, layer, head, change):
        shares = np.full((3, 2), share)
        shares[layer, head] += change
        quality = heads.measure(shares, PASSAGES[:1])
        return quality.loss + quality.copy / 4

    for layer, head in ((0, 1), (2, 0)):
        slopes = [(cost(t, layer, head, -0.01) - cost(t, layer, head, 0.01)) / 0.02 for t in (0.9, 0.5, 0.1)]
        assert gains[layer, head] == pytest.approx(np.mean(slopes), rel=0.05, abs=3e-4)
