"""The spectra of Sigma = M^T M, which show how training changed each layer's geometry."""

from typing import Any, NamedTuple

import numpy as np

from darkformer_jax.errors import UserError
from darkformer_jax.runs.load import load_model
from darkformer_jax.runs.workdir import Workdir


class Spectra(NamedTuple):
    """The eigenvalues of Sigma in each layer that has an M, in descending order."""

    workdir: str
    step: int
    initial: float  # every eigenvalue of M = geometry_init * I
    layers: list[int]
    eigenvalues: np.ndarray  # [layers, kv heads, head_dim] float64

    @property
    def means(self) -> np.ndarray:
        """The geometric means over heads [layers, head_dim]."""
        return np.exp(np.log(np.maximum(self.eigenvalues, np.finfo(np.float32).tiny)).mean(axis=1))

    @property
    def largest(self) -> list[float]:
        """The largest eigenvalue of each layer."""
        return self.eigenvalues.max(axis=(1, 2)).tolist()

    @property
    def smallest(self) -> list[float]:
        """The smallest eigenvalue of each layer."""
        return self.eigenvalues.min(axis=(1, 2)).tolist()


def read_spectra(workdir: str) -> Spectra:
    """Reads the newest checkpoint. Raises UserError if none is good or no layer has an M."""
    model = load_model(Workdir(workdir))
    network = model.network.bind(model.params, model.projections)
    blocks: list[Any] = [network.layer(index) for index in range(model.network.spec.num_layers)]
    # Not every mixer has a mechanism, and not every mechanism an M.
    mechanisms: list[Any] = [getattr(block.attention, "mechanism", None) for block in blocks]
    geometries = {i: np.asarray(one.M[...], np.float64) for i, one in enumerate(mechanisms) if hasattr(one, "M")}
    if not geometries:
        raise UserError(f"{workdir}: no layer has an M")
    singular = np.linalg.svd(np.stack(list(geometries.values())), compute_uv=False)  # descending
    initial = float(model.config.model.attention.geometry_init) ** 2
    return Spectra(workdir, model.step, initial, list(geometries), singular**2)
