"""What is learned: batches, loss, figures, and what is best. One task a file, behind the protocol of tasks/task.py."""

from typing import Any

from darkformer_jax.config.fields import flat_fields
from darkformer_jax.errors import UserError
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.classification import Classification
from darkformer_jax.tasks.language_model import LanguageModel
from darkformer_jax.tasks.regression import Regression
from darkformer_jax.tasks.task import Task

TASKS: dict[str, type[Task[Any]]] = {  # config.task.name -> what is learned
    "language_model": LanguageModel,
    "classification": Classification,
    "regression": Regression,
}


def task_of(workdir: Workdir) -> type[Task[Any]]:
    """What the model of a workdir has learned. Raises UserError where config.json is not a run's, or of a newer one."""
    name = dict(flat_fields(workdir.read_config())).get("task.name")
    if name not in TASKS:
        raise UserError(f"{workdir}: its task {name!r} is not known; allowed: {', '.join(TASKS)}")
    return TASKS[name]
