"""Takes a run from its config to a finished workdir, for `train.py`."""

import contextlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections

from darkformer_jax.config.arguments import WARMUP, fit_warmup, keep_warmup, require_end_after_warmup
from darkformer_jax.config.base import LABELLED_SOURCE, LABELLED_TASKS
from darkformer_jax.config.fields import flat_fields
from darkformer_jax.config.usage import require_new_uses
from darkformer_jax.config.validation import validate
from darkformer_jax.data import find_data
from darkformer_jax.data.labelled import find_labelled_files
from darkformer_jax.distributed import processes
from darkformer_jax.errors import UserError
from darkformer_jax.runs.checkpoints import Checkpoints
from darkformer_jax.runs.inherit import inherit, other_causality, other_mechanism
from darkformer_jax.runs.metrics import MetricWriter
from darkformer_jax.runs.mirror import Mirror
from darkformer_jax.runs.origin import hand_on_origin
from darkformer_jax.runs.workdir import Workdir, WorkdirLock
from darkformer_jax.tasks import TASKS
from darkformer_jax.tasks.language_model import SAMPLES_FILE
from darkformer_jax.tasks.task import Task
from darkformer_jax.training.cores import divide_over_cores
from darkformer_jax.training.environment import HARDWARE, environment
from darkformer_jax.training.experiment import Experiment, mesh_of
from darkformer_jax.training.goodput import Stopwatch, describe, read_sessions
from darkformer_jax.training.log import NotFinite, RunProgress, TrainingLog
from darkformer_jax.training.loop import Loop, Outcome
from darkformer_jax.training.loss_curve import LossCurve, draw_loss_curve
from darkformer_jax.training.patience import Patience
from darkformer_jax.training.start import check_start, start
from darkformer_jax.training.trackers import Trackers, require_installed


def dry_run(
    config: ml_collections.ConfigDict,
    overridden: Sequence[str] = (),
    workdir: Workdir | None = None,
    over_cores: bool = False,
) -> None:
    """Prints the experiment's sizes and its data. Reads the tokenizer and a labelled task's files, but no other text.

    It refuses a workdir, `init_from` or mesh that `train` would refuse, and writes nothing. That there is no data is a
    line, no error: the machine that plans a run need not have it.

    Args:
      config: of the run.
      overridden: the fields that the command line sets; see `require_new_uses`.
      workdir: of the run, which resumes if it has begun there; None = a new run.
      over_cores: as in `train`.
    """
    config, notes = _resolve(config, workdir, overridden)
    if over_cores:
        divide_over_cores(config, workdir)
    if workdir is not None:
        workdir.check_config(config.to_dict())
    experiment = Experiment.of(config, TASKS[config.task.name].objective_of(config, workdir))
    check_start(config, workdir, experiment)
    if jax.process_index() == 0:
        for line in notes:
            print(line, file=sys.stderr)
        print(experiment.describe())
        if config.task.name not in LABELLED_TASKS:  # whose files are in the description
            print(f"{'data':14s} {_found_data(config)}")


def _found_data(config: ml_collections.ConfigDict) -> str:
    d = config.data
    try:
        if d.source == LABELLED_SOURCE:
            return f"labelled files, read without their labels: {len(find_labelled_files(d.files))}"
        return find_data(d.source, d.files)
    except UserError as error:
        return f"none: {error}"


def train(
    config: ml_collections.ConfigDict,
    workdir: Workdir,
    progress: RunProgress,
    overridden: Sequence[str] = (),
    over_cores: bool = False,
) -> None:
    """Trains to the last step, or until `eval.patience` ends the run, and reports.

    Args:
      config: of the run.
      workdir: of the run, which resumes if it has begun there.
      progress: shows how far it is.
      overridden: the fields that the command line sets; see `require_new_uses`, which a run that has begun is spared.
      over_cores: this process trains nothing else, so that JAX's CPU devices may be as many as suit this run.

    Raises:
      Stopped: a signal came; the finished step is saved.
      UserError: the config, the data, the workdir and the devices do not fit together; the loss or the gradient is not
        finite; the disk cannot be written. Earlier checkpoints stay.
    """
    # First, because the run depends on what the workdir has.
    processes.require_shared(workdir.shared, str(workdir))
    config, notes = _resolve(config, workdir, overridden)
    if over_cores:
        divide_over_cores(config, workdir)
    workdir.check_config(config.to_dict())
    require_installed(config.log.trackers)
    trackers = Trackers(config.log.trackers, progress.note)
    with workdir.lock() as lock, Mirror(workdir) as mirror, trackers:
        began, watch = time.perf_counter(), Stopwatch(workdir)
        _check_before_data(config, workdir)
        for line in notes:
            progress.note(line)
        which = f"{workdir}" if workdir.has_begun else f"{workdir} (new)"
        progress.note(f"workdir {which}; reading {config.data.source} {config.data.files}".rstrip())
        task = TASKS[config.task.name].load(config, workdir, progress.bar)
        # After this, all processes have read what process 0 is about to write.
        processes.require_same("data", task.fingerprints)
        workdir.check_data(task.fingerprints["data"])
        experiment = Experiment.of(config, task.objective)
        jax.block_until_ready(task.constants)  # a teacher is large: it is read only now that all else fits together
        progress.note(
            f"{task}; training {experiment.num_trained:,} of {experiment.num_params:,} parameters; "
            f"{len(jax.devices())} x {jax.devices()[0].device_kind}; {experiment.cost}"
        )
        if task.warnings:
            progress.note(f"warning: little data: {'; '.join(task.warnings)}")
        outcome = _train(experiment, task, workdir, lock, mirror, watch, trackers, progress)
        if jax.process_index() == 0:
            _report(experiment, task, workdir, outcome, trackers, time.perf_counter() - began)


def _check_before_data(config: ml_collections.ConfigDict, workdir: Workdir) -> None:
    """Refuses what does not fit before the data is read and a tokenizer trained, which may take long."""
    mesh_of(config)
    objective = TASKS[config.task.name].objective_before_data(config, workdir)
    check_start(config, workdir, Experiment.of(config, objective) if objective else None)


def _resolve(
    config: ml_collections.ConfigDict,
    workdir: Workdir | None,
    overridden: Sequence[str],
) -> tuple[ml_collections.ConfigDict, list[str]]:
    """The config with a value for every field, checked, and the same in all processes; what to say of it."""
    config = inherit(config, workdir).copy_and_resolve_references()
    is_new = workdir is None or not workdir.has_begun
    if workdir is None or is_new:
        said = [fit_warmup(config, overridden), other_causality(config), other_mechanism(config)]
    else:
        said = [keep_warmup(config, overridden, dict(flat_fields(workdir.read_config()))[WARMUP])]
        workdir.check_config(config.to_dict())  # before the next line, which another experiment's user must not be told
        require_end_after_warmup(config)
    validate(config, overridden if is_new else ())
    if is_new:  # the command that began a run, in an earlier version too, resumes it
        require_new_uses(config, overridden)
    processes.require_same("config", dict(flat_fields(config.to_dict())))
    return config, [f"note: {line}" for line in said if line]


def _train(
    experiment: Experiment,
    task: Task[Any],
    workdir: Workdir,
    lock: WorkdirLock,
    mirror: Mirror,
    watch: Stopwatch,
    trackers: Trackers,
    progress: RunProgress,
) -> Outcome:
    """Trains from where the run begins to its last step. It closes what it opened, however the run ends."""
    keep, every = experiment.config.checkpoint.keep, experiment.config.checkpoint.every
    checkpoints = Checkpoints(workdir, keep=keep, save_every=every, best=task.best)
    with contextlib.closing(watch), contextlib.closing(checkpoints), contextlib.closing(progress):
        step, state, carried = start(experiment, workdir, checkpoints, progress.note)
        _claim(experiment, task, workdir, lock)  # only now: a mistake in data or init_from must not claim the directory
        trackers.start(workdir, dict(flat_fields(experiment.config.to_dict())))
        mirror.upload()
        facts = _facts(experiment, task) if jax.process_index() == 0 else {}
        before = watch.begin(step, facts).get(HARDWARE, "")
        if step and before and before != facts[HARDWARE]:
            progress.note(
                f"note: the steps before ran on [{before}], these do on [{facts[HARDWARE]}]: they go on as those would"
                " have, but for rounding"
            )
        with contextlib.closing(MetricWriter(workdir, step if checkpoints.committed_steps() else None)) as writer:
            means, curve = carried.get("means", {}), LossCurve(workdir)
            log = TrainingLog(experiment, writer, progress, watch, mirror, curve, trackers, means)
            patience = Patience(experiment.config.eval.patience, task.best, carried.get("patience", {}))
            progress.note("compiling the training step; large models take minutes")
            try:
                return Loop(experiment, task, workdir, checkpoints, log, patience).train(step, state)
            except NotFinite as error:
                checkpoints.wait()
                raise UserError(
                    f"{error}; stopped before it was saved. The last checkpoint is step "
                    f"{max(checkpoints.committed_steps(), default='(none)')} in {workdir}; "
                    "a lower optimizer.learning_rate or a smaller optimizer.clip_norm may help"
                ) from error


def _claim(experiment: Experiment, task: Task[Any], workdir: Workdir, lock: WorkdirLock) -> None:
    """Claims the directory for this run, and writes the files that it has from the beginning."""
    workdir.write_config(experiment.config.to_dict())
    lock.take()
    workdir.write_data(task.fingerprints["data"], task.fingerprints["tokenizer"])
    if jax.process_index() == 0:
        task.save(workdir)
        if experiment.config.init_from:
            hand_on_origin(Workdir(experiment.config.init_from), workdir)


def _facts(experiment: Experiment, task: Task[Any]) -> dict[str, Any]:
    """What `report` shows of a run beside its figures."""
    sizes = {"parameters": experiment.num_params, "trained": experiment.num_trained, "data": str(task)}
    return sizes | environment()


def _report(
    experiment: Experiment, task: Task[Any], workdir: Workdir, outcome: Outcome, trackers: Trackers, seconds: float
) -> None:
    state, evaluation, stopped_early = outcome
    print(f"\n{workdir}: step {int(state.step)} after {seconds:.0f} s")
    if stopped_early:
        print(stopped_early)
    print(f"held out ({evaluation.size}): {evaluation}")
    if sessions := read_sessions(workdir):  # none if an earlier version finished the run
        print(describe(sessions))
    what_next = task.report(experiment.network, state.params, state.projections, workdir, evaluation)
    curve = draw_loss_curve(workdir)
    print(f"loss curve: {workdir}/{curve.name}")
    print(what_next)
    trackers.picture(curve)
    if experiment.config.sample.prompts and (workdir / SAMPLES_FILE).exists():
        trackers.text(workdir / SAMPLES_FILE)
