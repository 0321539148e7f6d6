"""Early stopping: ends a run once evaluations have not been better for a while."""

from collections.abc import Mapping
from typing import Any


class Patience:
    """Counts the evaluations since the best one. All of them are on the same held-out batches.

    Every process counts the same figures, and a resumed run goes on with the count that was saved, so all decide the
    same. A figure that is not a number is no better than any.

    Args:
      allowed: evaluations in a row that may be no better before the run ends; 0 = any number.
      metric: the figure that is compared; smaller is better.
      carried: what `carried` returned where the run was saved; empty = no evaluations so far.

    Attributes:
      best_step: the step of the best evaluation; None before there is one.
      since: evaluations after it.
    """

    def __init__(self, allowed: int, metric: str, carried: Mapping[str, Any]) -> None:
        self._allowed, self._metric = allowed, metric
        self._best: float | None = carried.get("best")
        self.best_step: int | None = carried.get("best_step")
        self.since: int = carried.get("since", 0)

    def evaluated(self, step: int, figures: Mapping[str, float]) -> bool:
        """Counts the evaluation after `step`; returns whether the step is to be saved, because it is the best."""
        value = figures[self._metric]
        if value < (float("inf") if self._best is None else self._best):
            self._best, self.best_step, self.since = value, step, 0
            return self._allowed > 0
        self.since += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether the run ends here."""
        return 0 < self._allowed <= self.since

    def carried(self) -> dict[str, Any]:
        """The count, as JSON values, for a run that resumes here."""
        return {"best": self._best, "best_step": self.best_step, "since": self.since}
