"""Combines what `Objective.measure` returned for several batches."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from darkformer_jax.tasks.task import Sums

Measured = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]  # sums, and values of rows


def on_host(sums: Sums, rows: Mapping[str, jax.Array]) -> Measured:
    """(sums in float64, values of rows) of one batch, on the host. Waits for the device that computes them."""
    return (
        {name: np.asarray(value, np.float64) for name, value in sums.items()},
        {name: np.asarray(value) for name, value in rows.items()},
    )


def total(parts: Sequence[Measured]) -> Measured:
    """(the sums added, the values of rows concatenated) of at least one batch."""
    first_sums, first_rows = parts[0]
    sums = {name: sum((part[0][name] for part in parts), np.zeros_like(first_sums[name])) for name in first_sums}
    return sums, {name: np.concatenate([part[1][name] for part in parts]) for name in first_rows}
