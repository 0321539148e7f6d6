"""MLflow as a tracker."""

import itertools
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from darkformer_jax.data.files import write_atomically
from darkformer_jax.runs.workdir import Workdir

ID_FILE = "mlflow.id"

_EXPERIMENT = "darkformer_jax"  # unless MLFLOW_EXPERIMENT_NAME says otherwise
_PARAMETERS_PER_CALL = 100  # MLflow takes no more
# What would be printed over the progress line: the making of a database, and every retry.
_QUIET = {"alembic": logging.WARNING, "mlflow": logging.WARNING, "urllib3.connectionpool": logging.ERROR}


class MlflowTracker:
    """A run of MLflow, called like the workdir; see `training.trackers.Tracker`.

    MLflow reads its own environment: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, MLFLOW_TRACKING_TOKEN and others.
    """

    package: ClassVar[str] = "mlflow"

    def __init__(self, client: Any, run_id: str, where: str) -> None:
        self._client, self._run_id, self._where = client, run_id, where

    @classmethod
    def open(cls, workdir: Workdir, config: Mapping[str, Any]) -> "MlflowTracker":
        """Begins or continues the run."""
        import mlflow

        for logger, level in _QUIET.items():
            logging.getLogger(logger).setLevel(level)
        client = mlflow.MlflowClient()
        path = workdir / ID_FILE
        if path.exists():
            run_id = path.read_text().strip()
            client.update_run(run_id, status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _EXPERIMENT
            experiment = client.get_experiment_by_name(name)
            experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
            run_id = client.create_run(experiment_id, run_name=workdir.shared.name).info.run_id
            write_atomically(path, f"{run_id}\n".encode())
        tracker = cls(client, run_id, f"run {run_id} in {mlflow.get_tracking_uri()}")
        tracker._parameters({name: str(value) for name, value in config.items()})
        return tracker

    @property
    def where(self) -> str:
        """The run's id, and the address of the store."""
        return self._where

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A value of each metric."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run_id, [Metric(name, float(value), now, step) for name, value in values.items()])

    def picture(self, path: Path) -> None:
        """An artifact."""
        self._client.log_artifact(self._run_id, str(path))

    def text(self, path: Path) -> None:
        """An artifact."""
        self._client.log_artifact(self._run_id, str(path))

    def close(self, finished: bool) -> None:
        """Ends the run: finished, or killed until it resumes."""
        self._client.set_terminated(self._run_id, "FINISHED" if finished else "KILLED")

    def _parameters(self, new: Mapping[str, str]) -> None:
        """Parameters cannot change in MLflow: what a resumed run has changed becomes a tag `resumed.<field>`."""
        from mlflow.entities import Param, RunTag

        old = self._client.get_run(self._run_id).data.params
        missing = iter([Param(name, value) for name, value in new.items() if name not in old])
        while params := list(itertools.islice(missing, _PARAMETERS_PER_CALL)):
            self._client.log_batch(self._run_id, params=params)
        changed = [
            RunTag(f"resumed.{name}", value) for name, value in new.items() if name in old and old[name] != value
        ]
        if changed:
            self._client.log_batch(self._run_id, tags=changed)
