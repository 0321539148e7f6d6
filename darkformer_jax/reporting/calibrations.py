"""Reads the errors of attention by layer and head that `calibrate` writes into a workdir."""

import itertools
import os
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from darkformer_jax.calibration import CALIBRATION_FILE
from darkformer_jax.data.files import read_json_object
from darkformer_jax.errors import UserError
from darkformer_jax.reporting.settings import ancestors


class Calibration(NamedTuple):
    """The content of a workdir's calibration.json."""

    workdir: str
    mechanism: str
    num_features: int
    window: int
    layers: list[int]
    errors: dict[str, np.ndarray]  # stage (window_only, before, after, ...) -> relative error [layers, heads]

    @property
    def mean_errors(self) -> dict[str, float]:
        """stage -> mean relative error over layers and heads."""
        return {stage: float(values.mean()) for stage, values in self.errors.items()}


def find_calibrations(workdirs: Iterable[str]) -> list[Calibration]:
    """The calibrations of the workdirs and of their ancestors, each once. Raises UserError if one cannot be read."""
    found: dict[str, Calibration] = {}
    for ancestor in itertools.chain.from_iterable(map(ancestors, workdirs)):
        path = os.path.join(ancestor, CALIBRATION_FILE)
        if os.path.isfile(path) and os.path.realpath(ancestor) not in found:
            found[os.path.realpath(ancestor)] = _read_calibration(ancestor, path)
    return list(found.values())


def _read_calibration(workdir: str, path: str) -> Calibration:
    content = read_json_object(path)
    try:
        rows = content["layers"]
        stages = [name for name, value in rows[0].items() if isinstance(value, list)]
        errors = {name: np.array([row[name] for row in rows], np.float64) for name in stages}
        layers = [int(row["layer"]) for row in rows]
        named = (str(content["mechanism"]), int(content["num_features"]), int(content["window"]))
        if not errors or any(x.ndim != 2 or not np.isfinite(x).all() for x in errors.values()):
            raise ValueError("the errors are not finite numbers by layer and head")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not what calibrate writes: {error!r}") from error
    return Calibration(workdir, *named, layers, errors)
