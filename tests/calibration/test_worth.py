"""What the features of a converted model are worth: the same model with and without them."""

import jax
import pytest

from darkformer_jax.calibration.choice import Choice
from darkformer_jax.calibration.hybrids import Hybrids, Quality
from darkformer_jax.calibration.quality_curve import Point
from darkformer_jax.calibration.worth import Worth, measure_worth
from darkformer_jax.config.specs import model_spec
from darkformer_jax.data.progress import no_progress
from darkformer_jax.data.tokenizers import BytesTokenizer
from darkformer_jax.model.network import Network
from darkformer_jax.ops.keys import key_of_seed
from tests.calibration.test_heads import FIELDS, PASSAGES
from tests.tiny_runs import tiny_config

OPTIONS = {"chunk_size": 8, "window": 8, "window_kernel": "softmax", "num_features": 8}


def network_of(pattern, **options):
    changes = {f"model__attention__{name}": value for name, value in ({"pattern": pattern} | options).items()}
    return Network.of(model_spec(tiny_config(**FIELDS, **changes), 257))


@pytest.fixture(scope="module")
def weights():
    """Those that all models share, and M and w of the layers that see through features."""
    params, projections = network_of("dark", **OPTIONS).init(key_of_seed(0))
    shared = jax.tree.map(lambda x: x, params)
    del shared["blocks_0"]["attention"]["mechanism"]
    return shared, (params, projections)


def models(weights, **options):
    shared, features = weights
    return network_of("softmax").bind(shared, {}), network_of("dark", **options).bind(*features)


def measured(model):
    return Hybrids(model, model, PASSAGES, BytesTokenizer()).measure([frozenset()], no_progress)[0]


@pytest.mark.parametrize("exact_layers", [(), (1,)])
def test_all_three_are_the_models_that_they_are_called(weights, exact_layers):
    exact, replaced = models(weights, **OPTIONS)
    kept = frozenset(range(3)) - set(exact_layers)
    converted = Hybrids(exact, replaced, PASSAGES, BytesTokenizer()).measure([kept], no_progress)[0]
    points = [Point([1], *converted, 0), Point([1, 0, 2], *measured(exact), 0)]
    choice = Choice(1, [1, 0, 2], [], points, 48) if exact_layers else None
    worth = measure_worth(exact, replaced, choice, PASSAGES, BytesTokenizer(), no_progress)
    assert worth.exact == pytest.approx(measured(exact), rel=1e-5)
    assert worth.converted == pytest.approx(converted, rel=1e-5)
    window_options = {name: value for name, value in OPTIONS.items() if name != "num_features"}
    alone = network_of("window_only", **window_options).bind(weights[0], {})
    wanted = Hybrids(exact, alone, PASSAGES, BytesTokenizer()).measure([kept], no_progress)[0]
    assert worth.window_alone == pytest.approx(wanted, rel=1e-5)
    assert abs(worth.window_alone.loss - worth.converted.loss) > 1e-4  # or the comparison would show nothing


def test_features_everywhere_have_no_window_to_compare_with(weights):
    worth = measure_worth(*models(weights, chunk_size=8, num_features=8), None, PASSAGES, BytesTokenizer(), no_progress)
    assert worth.window_alone is None
    assert [line.split()[0] for line in worth.lines()] == ["2", "exact", "converted"]


def test_features_that_lower_no_loss_are_named():
    exact, converted = Quality(3.2, 0.3), Quality(3.21, 0.35)
    idle, useful = (Worth(exact, converted, Quality(loss, 0.4), 4) for loss in (3.212, 3.3))
    assert "--mechanism=window_only" in idle.lines()[-1]
    assert not any("--mechanism" in line for line in useful.lines())
