"""Where a run begins: at its own newest checkpoint, with the weights of another run, or from scratch."""

from collections.abc import Callable
from typing import Any

import ml_collections

from darkformer_jax.errors import UserError
from darkformer_jax.runs.checkpoints import Checkpoints
from darkformer_jax.runs.load import language_model_network
from darkformer_jax.runs.metrics import METRICS_FILE, read_metrics
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.training.experiment import Experiment
from darkformer_jax.training.init_from import check_init_from, initialize_from
from darkformer_jax.training.step import TrainState, from_saved, to_saved


def check_start(config: ml_collections.ConfigDict, workdir: Workdir | None, experiment: Experiment | None) -> None:
    """Raises UserError for what `start` would refuse, as far as it is known before the data is read.

    Args:
      config: of the run.
      workdir: of the run; None = it has none.
      experiment: None = its sizes are not known before the data.
    """
    if config.distill.workdir:
        language_model_network(Workdir(config.distill.workdir))
    if workdir is not None:
        checkpoints = Checkpoints(workdir)
        try:
            steps = checkpoints.committed_steps()
            if steps and steps[-1] > config.num_steps:  # the newest may be damaged
                _require_steps_left(config, workdir, checkpoints.latest_good_step())
        finally:
            checkpoints.close()
        if steps:
            return
    if config.init_from:
        check_init_from(Workdir(config.init_from), experiment)


def start(
    experiment: Experiment, workdir: Workdir, checkpoints: Checkpoints, note: Callable[[str], None]
) -> tuple[int, TrainState, dict[str, Any]]:
    """(the step to continue from, the state after it, what `Checkpoints.carried` says of it).

    `note` gets a line that says where they come from.

    Raises UserError: the checkpoints are damaged, lost, another model's or later than num_steps, or init_from does not
    fit.
    """
    # Restore order: the own workdir, then init_from, then scratch.
    step = checkpoints.latest_good_step()
    if step is not None:
        _, saved = checkpoints.restore(to_saved(experiment.sharded_state), step, verify=False)
        _require_steps_left(experiment.config, workdir, step)
        note(f"resuming {workdir} from step {step}")
        return step, from_saved(saved, experiment.abstract), checkpoints.carried(step)
    _require_new(experiment.config.checkpoint.every, workdir, checkpoints)
    state = experiment.initial_state()
    source = experiment.config.init_from
    if source:
        state, report = initialize_from(Workdir(source), experiment, state)
        note(report)
    return 0, state, {}


def _require_steps_left(config: ml_collections.ConfigDict, workdir: Workdir, step: int | None) -> None:
    if step is not None and step > config.num_steps:
        raise UserError(f"num_steps = {config.num_steps}, but {workdir} is at step {step} already")


def _require_new(save_every: int, workdir: Workdir, checkpoints: Checkpoints) -> None:
    """Raises UserError if checkpoints must have been lost: starting again would overwrite what is left.

    The second save waits for the first. So a kill during the first save leaves no line of metrics from after the second
    save began.
    """
    if not (workdir / METRICS_FILE).exists():
        return
    reached = max((line["step"] for line in read_metrics(workdir)), default=0)
    # config.json is still that of the previous start, which may have saved less often.
    intervals = (save_every, workdir.read_config()["checkpoint"]["every"])
    if all(intervals) and reached > 2 * max(intervals):
        raise UserError(
            f"workdir {workdir} has metrics up to step {reached}, but no checkpoint in {checkpoints.directory}; "
            "bring the checkpoints back or use a new workdir"
        )
