import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darkformer_jax.data.tokenizers import BytesTokenizer
from darkformer_jax.errors import UserError
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.tokenizer import check_same_tokenizer
from darkformer_jax.training.init_from import initialize_from
from tests.tiny_runs import experiment_of, run, tiny_config, write_text, write_workdir


@functools.cache
def experiment(pattern, seed=0, **changes):
    fields = {"model__num_layers": 4, "model__attention__pattern": pattern, "seed": seed} | changes
    return experiment_of(tiny_config(**fields))


@functools.cache
def some_state(pattern, seed):
    """A state of random numbers: nothing to compile."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), experiment(pattern).abstract)


def fresh(pattern):
    return some_state(pattern, 1)


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """A run of four exact layers, and its parameters."""
    workdir = tmp_path_factory.mktemp("exact")
    return str(workdir), write_workdir(workdir, experiment("softmax").config, some_state("softmax", 0), step=7).params


def layers_of(params):
    """[layer][name] -> array, whatever the pattern."""
    blocks = sorted(name for name in params if name.startswith("blocks_"))
    layers = {}
    for place, block in enumerate(blocks):
        for path, stack in jax.tree_util.tree_leaves_with_path(params[block]):
            for row, array in enumerate(np.asarray(stack)):
                layers.setdefault(place + len(blocks) * row, {})[jax.tree_util.keystr(path)] = array
    return layers


@pytest.mark.parametrize(
    ("pattern", "new"),
    [
        ("dark", "; new: attention/mechanism/M of layers 0-3"),
        ("softmax,dark", "; new: attention/mechanism/M of layers 1, 3"),
        ("softmax,softmax,performer,lfk", "; new: attention/mechanism/projections of layers 3"),
        ("softmax,dark,softmax", "; new: attention/mechanism/M of layers 1"),
        ("softmax", ""),
    ],
)
def test_an_exact_model_continues_with_every_weight_that_both_have(exact, pattern, new):
    workdir, trained = exact
    before = fresh(pattern)
    state, report = initialize_from(Workdir(workdir), experiment(pattern, 1), before)
    assert report.startswith("initialised ") and f"step 7 of {workdir}" in report
    assert report.endswith(new) if new else "new" not in report
    assert "not used" not in report
    assert jax.tree.structure(state) == jax.tree.structure(before)
    for name in ("embedding",):
        np.testing.assert_array_equal(state.params[name], trained[name])
        assert not np.array_equal(before.params[name], trained[name])
    source, target, untouched = map(layers_of, (trained, state.params, before.params))
    assert target.keys() == {0, 1, 2, 3}
    for layer, arrays in target.items():
        for name, array in arrays.items():
            wanted = source[layer].get(name, untouched[layer][name])
            np.testing.assert_array_equal(array, wanted, err_msg=f"layer {layer} {name}")
    assert not np.array_equal(source[0]["['mlp']['up']['kernel']"], source[1]["['mlp']['up']['kernel']"])
    # Moments, step and projections are those of a new run.
    jax.tree.map(np.testing.assert_array_equal, state._replace(params={}), before._replace(params={}))


def test_projections_come_along_with_the_geometry_fitted_to_them(tmp_path):
    source = some_state("dark", 0)
    write_workdir(tmp_path, experiment("dark").config, source, step=3)
    state, report = initialize_from(Workdir(tmp_path), experiment("softmax,dark", 1), fresh("softmax,dark"))
    old, new = (x.projections for x in (source, state))
    mechanism = ("attention", "mechanism", "projections")
    for row, layer in enumerate((1, 3)):
        kept = functools.reduce(dict.__getitem__, ("blocks_1", *mechanism), new)[row]
        np.testing.assert_array_equal(kept, functools.reduce(dict.__getitem__, ("blocks_0", *mechanism), old)[layer])
    assert "and 2 of 2 arrays of projections" in report
    redrawn = experiment("dark", 1, model__attention__redraw_every=5)
    state, report = initialize_from(Workdir(tmp_path), redrawn, fresh("dark"))
    jax.tree.map(np.testing.assert_array_equal, state.projections, fresh("dark").projections)
    assert "arrays of projections" not in report


def test_what_the_new_mechanism_has_no_use_for_is_named(tmp_path):
    trained = write_workdir(tmp_path, experiment("softmax,dark").config, some_state("softmax,dark", 0)).params
    state, report = initialize_from(Workdir(tmp_path), experiment("softmax", 1), fresh("softmax"))
    assert report.endswith("; not used: attention/mechanism/M of layers 1, 3")
    for layer, arrays in layers_of(state.params).items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, layers_of(trained)[layer][name])


@pytest.mark.parametrize(("old", "new"), [("softmax,dark,softmax", "dark"), ("dark", "softmax,dark,softmax")])
def test_weights_in_bfloat16_become_float32_masters(tmp_path, old, new):
    state = some_state(old, 0)
    stored = state._replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.params))
    write_workdir(tmp_path, experiment(old).config, stored)
    started, _ = initialize_from(Workdir(tmp_path), experiment(new, 1), fresh(new))
    assert {leaf.dtype for leaf in jax.tree.leaves(started.params)} == {jnp.dtype(jnp.float32)}
    source, target = layers_of(stored.params), layers_of(started.params)
    for layer, arrays in target.items():
        for name in arrays.keys() & source[layer].keys():
            np.testing.assert_array_equal(arrays[name], source[layer][name].astype(np.float32))
    np.testing.assert_array_equal(started.params["embedding"], stored.params["embedding"].astype(np.float32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__mlp_dim": 48}, r"layer 0/mlp/down/kernel has shape \(32, 32\), this model's has \(48, 32\)"),
        ({"model__num_layers": 2}, "it has 4 layers, this model has 2"),
        ({"model__vocab_size": 300}, r"embedding has shape \(257, 32\), this model's has \(300, 32\)"),
    ],
)
def test_another_shape_is_refused(exact, changes, message):
    other = experiment("softmax", **changes)
    with pytest.raises(UserError, match=f"init_from = .*: {message}"):
        initialize_from(Workdir(exact[0]), other, other.abstract)


def test_a_directory_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"init_from = {tmp_path}: there is no checkpoint in {tmp_path}/checkpoints"):
        initialize_from(Workdir(tmp_path), experiment("softmax"), experiment("softmax").abstract)


def test_another_tokenizer_is_refused(exact):
    check_same_tokenizer(Workdir(exact[0]), BytesTokenizer.fingerprint, "init_from")
    with pytest.raises(UserError, match=r"init_from = .*: its tokenizer \(fingerprint .*\) is not the data's \(000000"):
        check_same_tokenizer(Workdir(exact[0]), "0" * 64, "init_from")


def test_a_mistake_does_not_claim_the_new_directory(exact, tmp_path):
    config = experiment("softmax", model__mlp_dim=48).config.copy_and_resolve_references()
    config.data.files = write_text(tmp_path / "a.txt")
    config.init_from = exact[0]
    with pytest.raises(UserError, match="has shape"):
        run(config, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
