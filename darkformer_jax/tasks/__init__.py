"""What is learned: batches, loss, figures, and what is best. One task a file, behind the protocol of tasks/task.py."""

from typing import Any

from darkformer_jax.tasks.classification import Classification
from darkformer_jax.tasks.language_model import LanguageModel
from darkformer_jax.tasks.regression import Regression
from darkformer_jax.tasks.task import Task

TASKS: dict[str, type[Task[Any]]] = {  # config.task.name -> what is learned
    "language_model": LanguageModel,
    "classification": Classification,
    "regression": Regression,
}
