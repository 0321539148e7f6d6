"""Runs the harness' tasks on a model: finds and loads them, overrides their options, and evaluates."""

import contextlib
import difflib
import json
import logging
import os
import random
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import datasets
import lm_eval.api.task
import numpy as np
from lm_eval import __version__
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict
from lm_eval.utils import handle_non_serializable, simple_parse_args_string

from darkformer_jax.data.progress import ProgressBar, no_progress, with_progress
from darkformer_jax.errors import UserError, one_line
from darkformer_jax.harness.generation import read_options
from darkformer_jax.harness.harness_model import HarnessModel
from darkformer_jax.tasks.table import table_lines

# Draws of the bootstrap that estimates the standard error of some metrics. The harness has 100,000, on all cores at
# once, for which it forks: a process with JAX in it may not. A thousand give the error to 2%.
_BOOTSTRAP_DRAWS = 1000
_NO_FORKS = "DISABLE_MULTIPROC"  # how the harness is told


class TaskOptions(NamedTuple):
    """How tasks are run; None = as they say themselves.

    Attributes:
      num_fewshot: solved examples before each question.
      limit: the first so many documents of each task.
      gen_kwargs: "name=value,..." over the tasks' generation_kwargs.
      apply_chat_template: whether questions are messages in the model's chat template.
      allow_unsafe_code: whether tasks may run the code that the model writes.
      seed: of the choice of solved examples.
    """

    num_fewshot: int | None = None
    limit: int | None = None
    gen_kwargs: str | None = None
    apply_chat_template: bool = False
    allow_unsafe_code: bool = False
    seed: int = 1234


def load_tasks(names: Sequence[str], include_path: str | None, options: TaskOptions) -> TaskDict:
    """The tasks, with their data, as `options` change them.

    Args:
      names: of tasks, groups and tags, patterns such as "arc_*", or paths of .yaml files.
      include_path: a directory with the .yaml files of more tasks, which go before the harness' own of the same name.

    Raises:
      UserError: there is no such task, it cannot be loaded (its file is wrong, its data are not there), or it does not
        fit the options.
    """
    random.seed(0)  # what tasks draw from; the numbers are those of the harness' own command
    np.random.seed(1234)  # noqa: NPY002
    with _quiet():
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        manager = _manager(names, include_path)
        found: list[str] = []
        for name in names:
            matches = [name] if name.endswith(".yaml") else manager.match_tasks([name])
            if not matches:
                raise UserError(_no_such_task(name, manager.all_tasks, include_path))
            found += [match for match in matches if match not in found]
        try:
            tasks = manager.load(found)
        except Exception as error:  # a task's file and its data may be wrong in any way
            reason = f"{type(error).__name__}: {one_line(error)[:300]}"
            raise UserError(f"--tasks={','.join(names)}: cannot be loaded: {reason}") from error
        _override(tasks, options)
        return tasks


def run_tasks(model: HarnessModel, tasks: TaskDict, options: TaskOptions, progress_bar: ProgressBar) -> dict[str, Any]:
    """The harness' results, as JSON has them: `results`, `groups`, `configs`, `versions`, `n-shot`, `n-samples`, ...

    tasks, options: `load_tasks` has made the tasks with these options.

    Raises UserError as `HarnessModel` does.
    """
    with _quiet(progress_bar), contextlib.redirect_stdout(sys.stderr):
        results = evaluate(
            lm=model,
            task_dict=tasks,
            limit=options.limit,
            bootstrap_iters=_BOOTSTRAP_DRAWS,
            log_samples=False,
            apply_chat_template=options.apply_chat_template,
            fewshot_as_multiturn=options.apply_chat_template,
            confirm_run_unsafe_code=options.allow_unsafe_code,
        )
    plain: dict[str, Any] = json.loads(json.dumps(results, default=handle_non_serializable))
    return {"lm_eval": __version__} | plain


def table(results: dict[str, Any]) -> str:
    """What the harness' own table says: a line for each metric of each task and group, groups before their tasks."""
    lines = [("task", "version", "filter", "n-shot", "metric", "", "value", "stderr")]
    for depth, name in _in_order(results.get("group_subtasks", {}), results["results"]):
        figures = results["results"][name] | results.get("groups", {}).get(name, {})
        version, shots = (str(results.get(of, {}).get(name, "")) for of in ("versions", "n-shot"))
        begin = ("  " * depth + str(figures.get("alias", name)).lstrip(" -"), version)
        for key, value in sorted(figures.items()):
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr"):
                better = {True: "higher", False: "lower"}.get(results["higher_is_better"].get(name, {}).get(metric), "")
                error = figures.get(f"{metric}_stderr,{kind}", "")
                lines.append((*begin, kind, shots, metric, better, _figure(value), _figure(error)))
    return "\n".join(line.rstrip() for line in table_lines(lines))


def _in_order(subtasks: dict[str, list[str]], names: Collection[str]) -> Iterator[tuple[int, str]]:
    """(depth, name) of groups, each followed by what is in it, then of what is in no group."""
    inside = {child for children in subtasks.values() for child in children}

    def walk(name: str, depth: int) -> Iterator[tuple[int, str]]:
        yield depth, name
        for child in sorted(subtasks.get(name, ())):
            yield from walk(child, depth + 1)

    roots = dict.fromkeys([*subtasks, *names])
    return ((depth, name) for root in roots if root not in inside for depth, name in walk(root, 0) if name in names)


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _manager(names: Sequence[str], include_path: str | None) -> TaskManager:
    """An index of tasks: of the own ones alone where they are all that is asked for, for the harness has 14,000."""
    if include_path is not None:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if all(name in own.all_subtasks or name.endswith(".yaml") for name in names):
            return own
    elif all(name.endswith(".yaml") for name in names):
        return TaskManager(include_defaults=False)
    return TaskManager(include_path=include_path)


def _no_such_task(name: str, known: Sequence[str], include_path: str | None) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    meant = f"; did you mean {' or '.join(close)}?" if close else ""
    where = f"in the harness or in {include_path}" if include_path else "in the harness; --include_path adds tasks"
    return f"--tasks={name}: there is no such task {where}{meant}"


def _override(tasks: TaskDict, options: TaskOptions) -> None:
    """Sets what `options` say over what the tasks do, as the harness' own command. Raises UserError if it cannot."""
    gen_kwargs = simple_parse_args_string(options.gen_kwargs) if options.gen_kwargs else {}
    writing = 0
    for name, task in tasks["tasks"].items():
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"--tasks: {name} shows images or sounds; this model reads text")
        if getattr(task, "UNSAFE_CODE", False) and not options.allow_unsafe_code:
            raise UserError(f"--tasks: {name} runs the code that the model writes; --confirm_run_unsafe_code allows it")
        if task.get_config("output_type") == "generate_until":
            writing += 1
            task.set_config("generation_kwargs", gen_kwargs, update=True)
            read_options(task.get_config("generation_kwargs"), name)  # which refuses some
        own = task.get_config("num_fewshot")
        if options.num_fewshot is not None and own == 0:
            if options.num_fewshot:
                print(
                    f"note: {name} says itself that it has no examples: --num_fewshot does not count", file=sys.stderr
                )
        elif options.num_fewshot is not None or own is None:
            task.set_config("num_fewshot", options.num_fewshot or 0)
        _require_examples(task, name)
        task.set_fewshot_seed(seed=options.seed)
    if gen_kwargs and not writing:
        raise UserError(f"--gen_kwargs={options.gen_kwargs}: none of the tasks generates text")


def _require_examples(task: Any, name: str) -> None:
    """Raises UserError if a task has fewer solved examples than go before a question: draws once to see it."""
    shots = task.get_config("num_fewshot")
    if not shots or not hasattr(task, "sampler"):
        return
    from_test = task.fewshot_cfg.split == task.config.test_split  # then a question is not an example of its own
    try:
        task.sampler.sample(n=shots, eval_doc=task.eval_docs[0] if from_test else None)
    except (AssertionError, ValueError) as error:
        raise UserError(f"--num_fewshot={shots}: {name} has too few solved examples: {one_line(error)}") from error


@contextlib.contextmanager
def _quiet(progress_bar: ProgressBar = no_progress) -> Iterator[None]:
    """Keeps warnings and the harness' notes off the terminal, and it from forking. Its bars become `progress_bar`."""
    logger = logging.getLogger("lm_eval")
    level, bar, forks = logger.level, lm_eval.api.task.tqdm, os.environ.get(_NO_FORKS)
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = lambda items, total: with_progress(items, "document", progress_bar, "documents")
    os.environ[_NO_FORKS] = "1"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar
        if forks is None:
            del os.environ[_NO_FORKS]
