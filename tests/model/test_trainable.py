import functools

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from darkformer_jax.config.specs import model_spec
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from darkformer_jax.mixers.encoders import EncoderMechanism
from darkformer_jax.model.network import Network
from darkformer_jax.model.trainable import REGIMES, join_params, split_params, trained_paths
from darkformer_jax.training.step import TrainState, from_saved, make_train_step, to_saved
from tests.tiny_runs import experiment_of, fresh_state, random_batch, tiny_config

pytestmark = pytest.mark.standard_promotion  # an optimizer runs

PATTERN = "softmax,dark,lfk"  # of the tests that compile nothing
MIXED_GEOMETRY = {"blocks_1/attention/mechanism/M", "blocks_2/attention/mechanism/projections"}
GEOMETRY = {"blocks_0/attention/mechanism/M"}


def qkv(num_stacks):
    parts = ((name, part) for name in "qkv" for part in ("kernel", "bias"))
    return {f"blocks_{i}/attention/{name}/{part}" for name, part in parts for i in range(num_stacks)}


def lora(num_stacks):
    parts = ((name, part) for name in ("q", "k", "v", "out") for part in ("lora_A", "lora_B"))
    return {f"blocks_{i}/attention/{name}/{part}" for name, part in parts for i in range(num_stacks)}


MIXED = {
    "geometry": MIXED_GEOMETRY,
    "qkv_geometry": MIXED_GEOMETRY | qkv(3),
    "lora": MIXED_GEOMETRY | lora(3),
}
TRAINED = {"geometry": GEOMETRY, "qkv_geometry": GEOMETRY | qkv(1), "lora": GEOMETRY | lora(1)}
CUT_OUT = ("geometry", "qkv_geometry")  # of a model that is otherwise the same
RANK = 2


@functools.cache
def experiment(regime, pattern="dark"):
    config = tiny_config(
        model__num_layers=len(pattern.split(",")),
        model__attention__pattern=pattern,
        model__qkv_bias=True,
        model__lora_rank=RANK if regime == "lora" else 0,
        optimizer__train=regime,
        optimizer__weight_decay=0.5,
        optimizer__warmup_steps=0,
    )
    return experiment_of(config)


@functools.cache
def one_step(regime):
    """The state before a step, the compiled step, and what it returns: with the gradient, kept beside AdamW's state."""
    e = experiment(regime)
    optimizer = optax.chain(optax.trace(decay=0.0), e.optimizer)
    options = {"accumulation_steps": 1, "redraw_every": 0, "trained": e.trained}
    step = jax.jit(make_train_step(e.network, e.objective, optimizer, e.schedule, **options))
    start = fresh_state(e)
    start = start._replace(optimizer=optimizer.init(split_params(start.params, e.trained)[0]))
    compiled = step.lower(start, random_batch(0)).compile()
    return start, compiled, compiled(start, random_batch(0))


def names(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}


def changed(before, after):
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, old), new in pairs
        if np.asarray(old).tobytes() != np.asarray(new).tobytes()
    }


@pytest.mark.parametrize("regime", TRAINED)
def test_what_is_frozen_stays_bit_for_bit_and_takes_no_optimizer_state(regime):
    e = experiment(regime)
    start, step, (state, _) = one_step(regime)
    state, _ = step(state, random_batch(1))
    assert changed(start.params, state.params) == TRAINED[regime]
    adam = next(part for part in state.optimizer[1] if hasattr(part, "mu"))
    assert names(adam.mu) == names(adam.nu) == TRAINED[regime]
    moments = [leaf for leaf in jax.tree.leaves(e.abstract.optimizer) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * e.num_trained


@pytest.mark.parametrize("regime", TRAINED)
def test_gates_and_convolutions_which_no_pretrained_model_brings_are_always_trained(regime):
    config = tiny_config(model__attention__decay="gate", model__attention__conv_width=2, model__lora_rank=RANK)
    network = Network.of(model_spec(config, 257))
    trained = {"/".join(path) for path in trained_paths(network, regime)}
    kernels = ("forgetting/bias", "forgetting/gate/kernel", *(f"convolution/{name}/kernel" for name in "qkv"))
    assert trained >= {f"blocks_0/attention/{name}" for name in kernels}


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("regime", TRAINED)
def test_every_parameter_that_a_pretrained_model_does_not_have_is_trained(regime, kind):
    needed = {"window": 16, "local_window": 8, "horizon": 32, "decay": "gate"}
    options = {f"model__attention__{name}": needed[name] for name in MIXERS[kind].needs}
    common = {"model__qk_norm": True, "model__qkv_bias": True, "model__num_layers": 2, "model__lora_rank": RANK}
    common["model__causal"] = not issubclass(MIXERS[kind], EncoderMechanism)
    # Beside a dark layer, which has something of each regime.
    changes = common | options | {"model__attention__pattern": f"{kind},dark"}
    network = Network.of(model_spec(tiny_config(**changes), 257))
    pretrained = Network.of(model_spec(tiny_config(**common, model__attention__pattern="softmax,softmax"), 257))
    params, of_pretrained = (trained_paths(n, "all") for n in (network, pretrained))
    assert params - trained_paths(network, regime) <= of_pretrained


@pytest.mark.parametrize("regime", CUT_OUT)
def test_gradients_and_their_norm_are_those_of_the_whole_model_cut_out(regime):
    _, _, (whole, whole_metrics) = one_step("all")
    _, _, (state, metrics) = one_step(regime)
    wanted, _ = split_params(whole.optimizer[0].trace, experiment(regime).trained)
    for a, b in zip(jax.tree.leaves(state.optimizer[0].trace), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(wanted), rtol=1e-5)
    assert metrics["grad_norm"] < 0.9 * whole_metrics["grad_norm"]


def test_the_gradient_of_low_rank_updates_is_that_of_the_matrix_through_their_product():
    _, _, (whole, _) = one_step("all")
    start, _, (state, _) = one_step("lora")
    found, wanted = (s.optimizer[0].trace["blocks_0"]["attention"]["out"] for s in (state, whole))
    np.testing.assert_array_equal(found["lora_A"], 0)  # B = 0
    A = np.float64(start.params["blocks_0"]["attention"]["out"]["lora_A"][0])
    product = np.einsum("hdr,hde->re", A, np.float64(wanted["kernel"][0]))
    np.testing.assert_allclose(found["lora_B"][0], product, rtol=1e-4, atol=1e-6)
    assert np.abs(product).max() > 1e-3


def test_gradients_of_frozen_matrices_are_not_computed():
    counted = {regime: one_step(regime)[1].cost_analysis()["flops"] for regime in ("all", *CUT_OUT)}
    e, whole = experiment("geometry"), experiment("all")
    matrices = 257 * 32 + 4 * 32 * 16 + 3 * 32 * 32
    assert whole.step_flops - e.step_flops == 2 * e.tokens_per_step * matrices
    assert counted["geometry"] < counted["qkv_geometry"] < counted["all"]
    factors = RANK * 4 * (32 + 16)
    assert experiment("lora").step_flops - e.step_flops == 6 * e.tokens_per_step * factors
    saved = whole.step_flops - e.step_flops  # beside it AdamW's own
    assert counted["all"] - counted["geometry"] > saved


@pytest.mark.parametrize("regime", MIXED)
def test_a_regime_names_its_parameters_in_every_layer(regime):
    e = experiment(regime, PATTERN)
    trained, frozen = split_params(e.abstract.params, e.trained)
    assert names(trained) == MIXED[regime] and names(frozen) == names(e.abstract.params) - MIXED[regime]
    assert jax.tree.structure(join_params(trained, frozen)) == jax.tree.structure(e.abstract.params)
    assert f"trained        {e.num_trained:,} (optimizer.train = {regime!r})" in e.describe()
    assert e.num_trained == sum(leaf.size for leaf in jax.tree.leaves(trained)) < e.num_params
    saved = from_saved(to_saved(e.abstract), e.abstract)
    assert isinstance(saved, TrainState) and jax.tree.leaves(saved) == jax.tree.leaves(e.abstract)


def test_the_whole_model_is_the_default():
    e = experiment("all")
    assert tiny_config().optimizer.train == "all" and e.num_trained == e.num_params
    trained, frozen = split_params(e.abstract.params, e.trained)
    assert frozen == {} and jax.tree.structure(trained) == jax.tree.structure(e.abstract.params)


def test_the_learning_rate_that_metrics_show_is_that_of_what_is_trained():
    rates = {regime: float(one_step(regime)[2][1]["learning_rate"]) for regime in CUT_OUT}
    np.testing.assert_allclose(rates["geometry"], rates["qkv_geometry"] / 10, rtol=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "performer"])
def test_a_regime_that_trains_nothing_is_refused(kind):
    with pytest.raises(
        UserError, match=f"'geometry': a model of {kind} layers has no M and no learned projec"
    ) as raised:
        experiment("geometry", kind)
    assert "\n" not in str(raised.value) and "geometry" in REGIMES
    assert names(
        split_params(experiment("qkv_geometry", kind).abstract.params, experiment("qkv_geometry", kind).trained)[0]
    ) == qkv(1)


@pytest.mark.parametrize("regime", CUT_OUT)
def test_layers_that_are_no_attention_are_trained_in_every_regime(regime):
    network = experiment(regime, "dark,mamba2,gated_deltanet").network
    paths = {"/".join(path) for path in flatten_dict(network.map_params(lambda path, variable: True))}
    own = {path for path in paths if path.startswith(("blocks_1/attention/", "blocks_2/attention/"))}
    assert len(own) > 20
    trained = {"/".join(path) for path in trained_paths(network, regime)}
    assert trained == own | GEOMETRY | (qkv(1) if regime == "qkv_geometry" else set())
