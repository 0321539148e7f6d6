"""What calibration and training made of each layer: errors of attention, and the spectra of Sigma = M^T M."""

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from darkformer_jax.calibration import REPORT_FILE
from darkformer_jax.data.files import read_json_object
from darkformer_jax.errors import UserError
from darkformer_jax.reporting.settings import ancestors
from darkformer_jax.runs.load import load_model


class Calibration(NamedTuple):
    """A workdir's calibration.json."""

    workdir: str
    mechanism: str
    num_features: int
    window: int
    layers: list[int]
    errors: dict[str, np.ndarray]  # stage (window_only, before, after, ...) -> relative error [layers, heads]


class Spectra(NamedTuple):
    """Eigenvalues of Sigma by layer, the largest first."""

    workdir: str
    step: int
    initial: float  # of every eigenvalue where M starts as geometry_init * I
    layers: list[int]
    eigenvalues: np.ndarray  # [layers, kv heads, head_dim] float64


def find_calibrations(workdirs: Iterable[str]) -> list[Calibration]:
    """Of the workdirs and of those they began from, each once. Raises UserError for one that cannot be read."""
    found: dict[str, Calibration] = {}
    for workdir in workdirs:
        for ancestor in ancestors(workdir):
            real = os.path.realpath(ancestor)
            path = os.path.join(ancestor, REPORT_FILE)
            if real not in found and os.path.isfile(path):
                found[real] = _calibration(ancestor, path)
    return list(found.values())


def _calibration(workdir: str, path: str) -> Calibration:
    report = read_json_object(path)
    try:
        rows = report["layers"]
        stages = [name for name, value in rows[0].items() if isinstance(value, list)]
        errors = {name: np.array([row[name] for row in rows], np.float64) for name in stages}
        layers = [int(row["layer"]) for row in rows]
        named = (str(report["mechanism"]), int(report["num_features"]), int(report["window"]))
        if not errors or any(x.ndim != 2 or not np.isfinite(x).all() for x in errors.values()):
            raise ValueError("errors are no finite numbers by layer and head")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a report of calibrate: {error!r}") from error
    return Calibration(workdir, *named, layers, errors)


def read_spectra(workdir: str) -> Spectra:
    """Of the newest checkpoint's M. Raises UserError where there is no good checkpoint or no layer has an M."""
    model = load_model(workdir)
    network = model.network.bind(model.params, model.projections)
    layers: list[int] = []
    eigenvalues: list[Any] = []
    for index in range(model.network.spec.num_layers):
        attention: Any = network.layer(index).attention
        M = getattr(attention.mechanism, "M", None)
        if M is not None:
            singular = np.linalg.svd(np.asarray(M[...], np.float64), compute_uv=False)  # [kv heads, d], descending
            layers.append(index)
            eigenvalues.append(singular**2)
    if not layers:
        raise UserError(f"{workdir}: no layer has an M")
    initial = float(model.config.model.attention.geometry_init) ** 2
    return Spectra(workdir, model.step, initial, layers, np.stack(eigenvalues))
