"""Means of what steps measure, from one line of metrics.jsonl to the next."""

from collections.abc import Collection, Mapping
from typing import Any


class RunningMeans:
    """Averages the metrics of the steps since the last `restart`, each step by what its batch holds.

    The mean loss of steps with n1, n2, ... real tokens is the mean over all n1 + n2 + ... tokens. The sums are float64,
    so one step's mean is its own value, exactly.

    Args:
      weight: the metric that says how much a batch holds, such as "tokens".
      not_averaged: further metrics that are no means over a batch.
      carried: what `carried` returned where the run was saved; empty = no steps so far.
    """

    def __init__(self, weight: str, not_averaged: Collection[str], carried: Mapping[str, Any]) -> None:
        self._weight_name, self._not_averaged = weight, {weight, *not_averaged}
        self._weight: float = carried.get("weight", 0.0)
        self._sums: dict[str, float] = dict(carried.get("sums", {}))

    def add(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Adds a step's metrics; returns them with the means so far in place of the step's own means."""
        weight = metrics[self._weight_name]
        self._weight += weight
        averaged = [name for name in metrics if name not in self._not_averaged]
        for name in averaged:
            self._sums[name] = self._sums.get(name, 0.0) + weight * metrics[name]
        # Without weight, all batches were padding, whose sums are 0.
        return {**metrics, **{name: self._sums[name] / (self._weight or 1.0) for name in averaged}}

    def restart(self) -> None:
        """Forgets the steps so far."""
        self._weight, self._sums = 0.0, {}

    def carried(self) -> dict[str, Any]:
        """The steps so far, as JSON values, for a run that resumes here."""
        return {"weight": self._weight, "sums": dict(self._sums)}
