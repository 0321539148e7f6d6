"""transformers and darkformer_jax agree on every family, in both directions."""

import jax
import numpy as np
import pytest

from darkformer_jax.model.sampling import Sampler
from darkformer_jax.pretrained.export import export_workdir
from darkformer_jax.runs.load import load_model
from darkformer_jax.runs.workdir import Workdir
from tests.pretrained.tiny_models import (
    INPUT,
    MODELS,
    load_theirs,
    make_model,
    our_logits,
    their_logits,
    torch,
    write_source,
)
from tests.pretrained.tiny_sources import import_source
from tests.tiny_runs import tiny_config, write_workdir

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=sorted(MODELS))
def pair(request, tmp_path_factory):
    """A transformers model, our import of it, and the directory of everything."""
    directory = tmp_path_factory.mktemp(request.param)
    theirs = make_model(request.param)
    return theirs, import_source(write_source(directory / "source", theirs), directory / "workdir"), directory


def test_logits_agree(pair):
    theirs, ours, _ = pair
    wanted = their_logits(theirs)
    assert np.abs(wanted).max() > 0.5
    np.testing.assert_allclose(our_logits(ours), wanted, atol=TOLERANCE, rtol=0)


def test_greedy_generation_agrees_token_for_token(pair):
    theirs, ours, _ = pair
    prompt, new = INPUT[:1, :9], 12
    ids = torch.tensor(prompt).long()
    generated = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    sampler = Sampler(ours.network, ours.params, ours.projections, temperature=0)
    continued = [int(token[0]) for token in sampler.stream(prompt.tolist(), new)]
    assert continued == generated[0, 9:].tolist()


def test_the_export_is_bit_identical_and_loads_without_complaint(pair):
    theirs, ours, directory = pair
    export_workdir(Workdir(directory / "workdir"), str(directory / "export"))
    loaded, report = load_theirs(directory / "export")
    assert not any(report.values()), report
    assert type(loaded) is type(theirs)
    before, after = theirs.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]), name
    np.testing.assert_allclose(their_logits(loaded), our_logits(ours), atol=TOLERANCE, rtol=0)


@pytest.mark.standard_promotion  # the state of a checkpoint is made with its optimizer
def test_the_export_of_a_dark_model_as_exact_loads_as_the_same_transformer_with_exact_attention(tmp_path):
    sizes = {"model__num_layers": 2, "model__attention__kind": "softmax", "model__qk_norm": True}
    write_workdir(tmp_path / "exact", tiny_config(**sizes))
    write_workdir(tmp_path / "dark", tiny_config(**(sizes | {"model__attention__kind": "dark"})))
    export_workdir(Workdir(tmp_path / "dark"), str(tmp_path / "export"), as_exact=True)
    loaded, report = load_theirs(tmp_path / "export")
    assert not any(report.values()), report
    exact, dark = load_model(Workdir(tmp_path / "exact")), load_model(Workdir(tmp_path / "dark"))
    same = exact._replace(params=jax.tree.map(lambda _, leaf: leaf, exact.params, _without_mechanisms(dark.params)))
    np.testing.assert_allclose(their_logits(loaded), our_logits(same), atol=TOLERANCE, rtol=0)
    assert np.abs(our_logits(dark) - our_logits(same)).max() > 100 * TOLERANCE


def _without_mechanisms(params):
    if not isinstance(params, dict):
        return params
    return {name: _without_mechanisms(value) for name, value in params.items() if name != "mechanism"}
