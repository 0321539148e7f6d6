"""Combines what `Objective.measure` returns for several batches."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np

from darkformer_jax.tasks.task import Sums

Measured = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]  # sums, and values of rows


def measure_all(step: Callable[[dict], tuple[Sums, dict[str, jax.Array]]], batches: Iterable[dict]) -> Measured:
    """(sums in float64, values of all rows concatenated) over `batches`, of which there must be at least one.

    step: batch -> what `Objective.measure` returns, jitted. Each batch is dispatched before the results of the previous
      one are read.
    """
    parts: list[Measured] = []
    pending = None
    for batch in batches:
        measured = step(batch)
        if pending is not None:  # the previous batch, so that the device never waits for the host
            parts.append(_on_host(*pending))
        pending = measured
    if pending is None:
        raise ValueError("there are no batches to measure")
    parts.append(_on_host(*pending))
    return _total(parts)


def _on_host(sums: Sums, rows: Mapping[str, jax.Array]) -> Measured:
    """(sums in float64, values of rows) of one batch, on the host. Waits for the device that computes them."""
    return (
        {name: np.asarray(value, np.float64) for name, value in sums.items()},
        {name: np.asarray(value) for name, value in rows.items()},
    )


def _total(parts: Sequence[Measured]) -> Measured:
    """(the sums added, the values of rows concatenated) of at least one batch."""
    first_sums, first_rows = parts[0]
    sums = {name: sum((part[0][name] for part in parts), np.zeros_like(first_sums[name])) for name in first_sums}
    return sums, {name: np.concatenate([part[1][name] for part in parts]) for name in first_rows}
