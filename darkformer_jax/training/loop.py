"""The training loop: step, measure, evaluate, save, and stop cleanly whatever happens."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from darkformer_jax.distributed import processes
from darkformer_jax.runs.checkpoints import Checkpoints
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.task import Batch, Evaluation, Task
from darkformer_jax.training.evaluation import make_eval_step, measure, put_batch
from darkformer_jax.training.experiment import Experiment
from darkformer_jax.training.log import NotFinite, TrainingLog
from darkformer_jax.training.patience import Patience
from darkformer_jax.training.step import TrainState, to_saved
from darkformer_jax.training.stopping import Stopped, StopSignals
from darkformer_jax.training.trace import TraceWindow


class Outcome(NamedTuple):
    """The result of a run.

    Attributes:
      state: after the last step.
      evaluation: of that state, on all held-out data.
      stopped_early: why the last step came before `num_steps`, in words; "" = it did not.
    """

    state: TrainState
    evaluation: Evaluation
    stopped_early: str


class Loop:
    """Trains a run from any step to `num_steps`, or until `eval.patience` ends it.

    Args:
      experiment: what is trained, and how.
      task: what is learned, with its data.
      workdir: the run's.
      checkpoints: the workdir's.
      log: gets every step, evaluation and save.
      patience: gets every evaluation after a step.
    """

    def __init__(
        self,
        experiment: Experiment,
        task: Task[Any],
        workdir: Workdir,
        checkpoints: Checkpoints,
        log: TrainingLog,
        patience: Patience,
    ) -> None:
        self._experiment, self._task, self._workdir = experiment, task, workdir
        self._checkpoints, self._log, self._patience = checkpoints, log, patience
        self._train_step = experiment.train_step()
        self._eval_step = make_eval_step(experiment.network, experiment.objective, experiment.mesh)

    def train(self, step: int, state: TrainState) -> Outcome:
        """Trains from `state`, the state after `step`, and evaluates on all held-out data.

        Raises:
          Stopped: a signal came; the finished step is saved.
          NotFinite: a step's loss or gradient, or the held-out loss of weights to be saved, is not finite.
          UserError: the disk cannot be written.
        """
        config, evaluation = self._experiment.config, None
        trace = TraceWindow(self._workdir, config.profile.first_step, config.profile.steps)
        trace.begin(step, config.num_steps)
        with contextlib.closing(trace), StopSignals(step) as signals, jax.set_mesh(self._experiment.mesh):
            if step == 0 and config.init_from and config.eval.every:  # what the weights are worth before training
                self._log.evaluated(0, self._evaluate(state, config.eval.batches))
            batches = self._batches(step)
            while not self._is_last(step):
                trace.before(step + 1)
                batch = next(batches)
                with signals.step():
                    state, metrics = self._train_step(state, batch, self._task.constants)
                    step += 1
                    trace.after(step, state)
                    self._log.finished(step, metrics)  # which reads those of the step before
                    signum = signals.to_stop(step)
                    evaluate, save = self._due(step)
                    save = save or signum is not None
                    if evaluate or save:
                        self._log.flush()
                evaluation = self._evaluate_and_save(step, state, evaluate, save)
                if signum is not None:
                    self._checkpoints.wait()
                    raise Stopped(signum, step)
            self._checkpoints.wait()  # while a signal is still heard: the last save must not be cut off
            if signals.received is not None and not processes.is_distributed():  # others would go on to the report
                raise Stopped(signals.received, step)
            return Outcome(state, evaluation or self._evaluate(state, 0), self._stopped_early(step))

    def _is_last(self, step: int) -> bool:
        return step == self._experiment.config.num_steps or self._patience.exhausted

    def _stopped_early(self, step: int) -> str:
        if not self._patience.exhausted or step == self._experiment.config.num_steps:
            return ""
        best = self._patience.best_step
        kept = f"kept (--step={best})" if best in self._checkpoints.committed_steps() else "not saved"
        return (
            f"stopped after step {step}: {self._task.best} no better for {self._patience.since} evaluations; best step "
            f"{best}, {kept}; a larger eval.patience trains on"
        )

    def _due(self, step: int) -> tuple[bool, bool]:
        """Whether an evaluation follows the step, and whether a save does."""
        every, last = self._experiment.config.eval.every, step == self._experiment.config.num_steps
        return last or (bool(every) and step % every == 0), last or self._checkpoints.due(step)

    def _evaluate_and_save(self, step: int, state: TrainState, evaluate: bool, save: bool) -> Evaluation | None:
        """Returns the evaluation, if there is one; after the last step, it is on all held-out data."""
        config = self._experiment.config
        # On the same batches at every step, so that the best checkpoint is the best by one measure.
        regular = self._evaluate(state, config.eval.batches) if evaluate else None
        is_best = regular is not None and self._patience.evaluated(step, regular.as_metrics())
        last = self._is_last(step)
        evaluation = self._evaluate(state, 0) if last and config.eval.batches else regular
        if evaluation:
            self._log.evaluated(step, evaluation)
        if save or is_best or last:
            # Step N's loss is that of the weights before its update, but the weights after it are saved.
            loss = (evaluation or self._evaluate(state, 1)).loss
            if not math.isfinite(loss):
                raise NotFinite(f"step {step}: held-out loss is {loss}")
            self._log.upload()
            metrics = regular.as_metrics() if regular else None
            carried = {"means": self._log.carried(), "patience": self._patience.carried()}
            self._checkpoints.save(step, to_saved(state), metrics, carried)
            self._log.saved(step)
        return evaluation

    def _evaluate(self, state: TrainState, num_batches: int) -> Evaluation:
        """The evaluation on `num_batches` batches, spread over the held-out data; 0 = all of it."""
        batches = self._task.heldout_batches(num_batches, self._experiment.part)
        sharding = self._experiment.batch_sharding
        evaluation: Evaluation = self._task.evaluation(
            *measure(self._eval_step, state.params, state.projections, batches, sharding)
        )
        return evaluation

    def _batches(self, start_step: int) -> Iterator[Batch]:
        for batch in self._task.train_batches(start_step, self._experiment.part):
            yield put_batch(batch, self._experiment.batch_sharding)
