"""Tasks: batches, loss, figures and best checkpoint. One file per task, behind the protocol of tasks/task.py."""

from typing import Any

from darkformer_jax.config.fields import flat_fields
from darkformer_jax.errors import UserError
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.classification import Classification
from darkformer_jax.tasks.language_model import LanguageModel
from darkformer_jax.tasks.regression import Regression
from darkformer_jax.tasks.task import Task

TASKS: dict[str, type[Task[Any]]] = {  # by config.task.name
    "language_model": LanguageModel,
    "classification": Classification,
    "regression": Regression,
}


def task_of(workdir: Workdir) -> type[Task[Any]]:
    """The task of a workdir's model. Raises UserError if its config.json is not a run's, or a newer version's."""
    name = dict(flat_fields(workdir.read_config())).get("task.name")
    if name not in TASKS:
        raise UserError(f"{workdir}: its task {name!r} is not known; allowed: {', '.join(TASKS)}")
    return TASKS[name]
