"""Spectra of whatever has an M, by whatever name, beside mixers that have no q, k and v."""

import numpy as np
import pytest
from flax import nnx

from darkformer_jax.mixers import MIXERS
from darkformer_jax.mixers.dark import Dark
from darkformer_jax.mixers.mixer import MixerKind
from darkformer_jax.reporting.findings import collect
from darkformer_jax.reporting.spectra import read_spectra
from tests.test_report import write_run
from tests.tiny_runs import tiny_config, write_workdir


class Echo(nnx.Module):
    def init_state(self, batch, max_length, dtype):
        return ()

    def __call__(self, x, segment_ids, positions, state=None):
        return x, state


class Echoing(MixerKind):
    """y = x: no attention."""

    role = "control"
    uses = frozenset()

    @classmethod
    def build(cls, spec, layer, *, rngs):
        return Echo()

    @classmethod
    def flops(cls, spec, length):
        return 0.0


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
    monkeypatch.setitem(MIXERS, "echo", Echoing)
    monkeypatch.setitem(MIXERS, "warped", Dark)


@pytest.mark.standard_promotion
def test_the_layers_with_an_m_have_spectra(tmp_path):
    changes = {"model__num_layers": 2, "model__attention__pattern": "echo,warped"}
    write_workdir(tmp_path, tiny_config(**changes, model__attention__geometry_init=0.5))
    spectra = read_spectra(str(tmp_path))
    assert spectra.layers == [1]
    np.testing.assert_allclose(spectra.eigenvalues, 0.25)


def test_a_page_asks_every_run_with_an_m_for_its_spectra(tmp_path):
    for kind in ("warped", "performer", "dark"):
        write_run(tmp_path / kind, 2.0, f"attention={kind}")
    asked = {line.partition(":")[0] for line in collect(f"{tmp_path}/*").missing_spectra}  # there are no checkpoints
    assert asked == {str(tmp_path / "warped"), str(tmp_path / "dark")}
