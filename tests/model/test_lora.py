import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from darkformer_jax.convert import open_source, plan_import, run_import
from darkformer_jax.errors import UserError
from darkformer_jax.model.lora import is_lora, merge_lora
from darkformer_jax.model.network import logical_axes
from darkformer_jax.pretrained.export import export_workdir
from darkformer_jax.runs.load import load_model
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.training.init_from import initialize_from
from tests.tiny_runs import experiment_of, random_batch, tiny_config, write_workdir

pytestmark = pytest.mark.standard_promotion  # states are made with their optimizer

RANK = 3


@functools.cache
def experiment(rank, pattern="dark"):
    regime = "lora" if rank else "all"
    sizes = {"model__num_layers": 2, "model__num_kv_heads": 1, "model__attention__pattern": pattern}
    return experiment_of(tiny_config(model__lora_rank=rank, optimizer__train=regime, **sizes))


@functools.cache
def some_state(rank, pattern="dark", seed=0):
    """Random numbers; of the size that weights have."""
    rng = np.random.default_rng(seed)
    abstract = experiment(rank, pattern).abstract
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.2, leaf.dtype), abstract)


def logits(rank, pattern, params, projections):
    batch = jax.tree.map(jnp.asarray, random_batch(0))

    @jax.jit
    def forward(params):
        model = experiment(rank, pattern).network.bind(params, projections)
        return model(batch["inputs"], batch["segment_ids"], batch["positions"])[0]

    return np.asarray(forward(params))


def by_hand(params):
    """W + A B of every projection in float64, by its place and name."""
    found = {}
    for block, arrays in params.items():
        for name, part in arrays["attention"].items() if block.startswith("blocks_") else ():
            if name in ("q", "k", "v", "out"):
                kernel, A, B = (np.float64(part[key]) for key in ("kernel", "lora_A", "lora_B"))
                product = "lhdr,lre->lhde" if name == "out" else "ler,lrhd->lehd"
                found[block, name] = kernel + np.einsum(product, A, B)
    return found


def assert_merged(params, source):
    wanted = by_hand(source)
    assert len(wanted) % 4 == 0 and wanted
    for (block, name), kernel in wanted.items():
        assert set(params[block]["attention"][name]) == {"kernel"}
        np.testing.assert_allclose(params[block]["attention"][name]["kernel"], kernel, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("pattern", "atol"), [("softmax", 1e-5), ("dark", 1e-4)])  # features' exponentials: rounding
def test_with_b_zero_the_model_is_the_one_without_and_merged_it_is_the_one_with(pattern, atol):
    plain, low = (jax.jit(experiment(rank, pattern).network.init)(jax.random.key(1)) for rank in (0, RANK))
    jax.tree.map(np.testing.assert_array_equal, merge_lora(low[0]), plain[0])  # and the draws are the same
    before = logits(RANK, pattern, *low)
    np.testing.assert_array_equal(before, logits(0, pattern, *plain))
    drawn = iter(jax.random.split(jax.random.key(2), 20))

    def with_update(path, leaf):
        return 0.1 * jax.random.normal(next(drawn), leaf.shape) if path[-1].key == "lora_B" else leaf

    params = jax.tree_util.tree_map_with_path(with_update, low[0])
    after = logits(RANK, pattern, params, low[1])
    assert np.abs(after - before).max() > 0.01
    merged = logits(0, pattern, merge_lora(params), plain[1])
    np.testing.assert_allclose(merged, after, atol=atol)
    assert np.linalg.norm(merged - after) < 1e-5 * np.linalg.norm(after)
    A = np.asarray(low[0]["blocks_0"]["attention"]["out"]["lora_A"])
    assert A.shape == (2, 2, 8, RANK) and 0.7 < A.std() * 4 < 1.3 and not np.array_equal(A[0], A[1])


def test_merging_is_w_plus_a_b_in_the_dtype_of_w():
    params = some_state(RANK).params
    assert_merged(merge_lora(params), params)
    merged = merge_lora(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.structure(merged) == jax.tree.structure(experiment(0).abstract.params)


def test_factors_are_split_over_the_mesh_like_their_matrix():
    axes = experiment(RANK).network.map_params(lambda _, variable: logical_axes(variable))["blocks_0"]["attention"]
    assert axes["q"]["lora_A"] == (None, "embed", None) and axes["q"]["lora_B"] == (None, None, "heads", None)
    assert axes["v"]["lora_B"] == (None, None, "kv_heads", None)
    assert axes["out"]["lora_A"] == (None, "heads", None, None) and axes["out"]["lora_B"] == (None, None, "embed")
    moments = experiment(RANK).shardings.optimizer[1].mu["blocks_0"]["attention"]["q"]["lora_A"]
    assert isinstance(moments.spec, P)


@pytest.mark.parametrize("pattern", ["dark", "softmax,dark"])
def test_a_run_with_updates_starts_from_one_without_and_the_other_way_round(tmp_path, pattern):
    write_workdir(tmp_path / "plain", experiment(0).config, some_state(0))
    state, report = initialize_from(
        Workdir(tmp_path / "plain"), experiment(RANK, pattern), some_state(RANK, pattern, 1)
    )
    assert "; new: attention/k/lora_A of layers 0-1" in report and "attention/out/lora_B of layers 0-1" in report
    for path, leaf in jax.tree_util.tree_leaves_with_path(some_state(RANK, pattern, 1).params):
        if is_lora([key.key for key in path]):
            np.testing.assert_array_equal(functools.reduce(lambda x, key: x[key.key], path, state.params), leaf)
    updated = some_state(RANK)
    write_workdir(tmp_path / "lora", experiment(RANK).config, updated)
    same, report = initialize_from(Workdir(tmp_path / "lora"), experiment(RANK), some_state(RANK, seed=1))
    jax.tree.map(np.testing.assert_array_equal, same.params, updated.params)
    assert "merged" not in report
    merged, report = initialize_from(Workdir(tmp_path / "lora"), experiment(0, pattern), some_state(0, pattern, 1))
    assert ", its low-rank updates merged" in report and "not used: attention/q" not in report
    layers = by_hand(updated.params)
    stacks = pattern.count(",") + 1
    for layer in range(2):
        for name in ("q", "k", "v", "out"):
            kernel = merged.params[f"blocks_{layer % stacks}"]["attention"][name]["kernel"][layer // stacks]
            np.testing.assert_allclose(kernel, layers["blocks_0", name][layer], rtol=1e-5, atol=1e-6)


def test_another_rank_is_refused(tmp_path):
    write_workdir(tmp_path, experiment(RANK).config, some_state(RANK))
    with pytest.raises(UserError, match=r"layer 0/attention/k/lora_A has shape \(32, 3\), this model's has \(32, 2\)"):
        initialize_from(Workdir(tmp_path), experiment(2), experiment(2).abstract)


def test_verbs_and_exports_see_the_merged_model(tmp_path):
    state = some_state(RANK)
    write_workdir(tmp_path / "run", experiment(RANK).config, state)
    model = load_model(Workdir(tmp_path / "run"))
    assert (model.config.model.lora_rank, model.config.optimizer.train, model.network.spec.pattern[0].lora_rank) == (
        0,
        "all",
        0,
    )
    assert_merged(model.params, state.params)
    assert "trust_remote_code" in export_workdir(Workdir(tmp_path / "run"), str(tmp_path / "out"))
    plan = plan_import(open_source(str(tmp_path / "out")), tiny_config())
    run_import(plan, str(tmp_path / "copy"))
    again = load_model(Workdir(tmp_path / "copy"))
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    jax.tree.map(np.testing.assert_array_equal, again.projections, model.projections)
