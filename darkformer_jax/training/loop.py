"""The training loop: restore, step, measure, save, and stop well whatever happens."""

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax

from darkformer_jax.cli.progress import Progress, device_memory_bytes, host_memory_bytes
from darkformer_jax.data import Data, heldout_batches, train_batches
from darkformer_jax.distributed import processes
from darkformer_jax.distributed.sharding import part_of_process
from darkformer_jax.errors import UserError
from darkformer_jax.model.flops import peak_flops
from darkformer_jax.runs.checkpoints import Checkpoints
from darkformer_jax.runs.metrics import METRICS_FILE, MetricWriter, read_metrics
from darkformer_jax.runs.mirror import Mirror
from darkformer_jax.runs.store import local_path
from darkformer_jax.runs.workdir import read_config
from darkformer_jax.training.distill import load_teacher
from darkformer_jax.training.evaluation import Evaluation, evaluate, make_eval_step, put_batch
from darkformer_jax.training.experiment import Experiment, tokens_per_byte
from darkformer_jax.training.goodput import Stopwatch
from darkformer_jax.training.init_from import initialize_from
from darkformer_jax.training.step import (
    Distillation,
    Metrics,
    TrainState,
    from_saved,
    to_saved,
)
from darkformer_jax.training.stragglers import HostClock, Hosts
from darkformer_jax.training.trace import TraceWindow


class Stopped(Exception):
    """The run was asked to stop by a signal, and has saved what it had."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"{signal.Signals(signum).name}: saved step {step}; the same command resumes there")
        self.exit_status = 128 + signum


class StopSignals:
    """While active, remembers the first SIGTERM or Ctrl-C; a second one ends the process at once.

    Of several processes, a signal to any one stops all after the same step.

    Args:
      step: the last one that is finished.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self.received: int | None = None
        self._announced = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        # jax agrees on the step after the last that a process has asked about: it must know where this run begins
        # before there can be a signal. Nobody has announced one that would be answered here.
        processes.stop_agreed(self._step)
        self._previous = {signum: signal.signal(signum, self._remember) for signum in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def to_stop(self, step: int) -> int | None:
        """The signal to stop for after `step`, if there is one. To be called at every step."""
        if not processes.is_distributed():
            return self.received
        if self.received is not None and not self._announced:
            self._announced = True
            processes.announce_stop(self.received)
        return processes.stop_agreed(step)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        # The system's own action for the next one: a Python handler would wait for a long evaluation or compile to end.
        for name in self._previous:
            signal.signal(name, signal.SIG_DFL)


class Run:
    """One training run in a workdir. `train` brings it to `num_steps`, from wherever it is."""

    def __init__(self, experiment: Experiment, data: Data, workdir: str, watch: Stopwatch, mirror: Mirror) -> None:
        config = experiment.config
        self.mirror = mirror
        self.watch = watch
        self.experiment, self.data, self.workdir = experiment, data, workdir
        self.checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep, save_every=config.checkpoint.every)
        weight = config.distill.weight
        self.teacher = load_teacher(config.distill.workdir, experiment, data.tokenizer.fingerprint) if weight else None
        self._eval_step = make_eval_step(experiment.network)
        self._train_step = experiment.train_step(Distillation(self.teacher.network, weight) if self.teacher else None)
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak_flops = None if peak is None else peak * len(jax.devices())

    def start(self, progress: Progress) -> tuple[int, TrainState]:
        """The step to go on from and its state: own workdir, then init_from, then scratch."""
        experiment, config = self.experiment, self.experiment.config
        if self.teacher:
            progress.note(f"the teacher is step {self.teacher.step} of {config.distill.workdir}")
        step = self.checkpoints.latest_good_step()
        if step is not None:
            wanted = jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                to_saved(experiment.abstract),
                to_saved(experiment.shardings),
            )
            _, saved = self.checkpoints.restore(wanted, step, verify=False)
            if step > config.num_steps:
                raise UserError(f"num_steps = {config.num_steps}, but {self.workdir} is at step {step} already")
            progress.note(f"resuming {self.workdir} from step {step}")
            return step, from_saved(saved, experiment.abstract)
        self._require_new()
        state = experiment.initial_state()
        if config.init_from:
            state, report = initialize_from(config.init_from, experiment, state)
            progress.note(report)
        return 0, state

    def _require_new(self) -> None:
        """Raises UserError where checkpoints must have been lost: starting again would overwrite what is left.

        A kill during the first save leaves no line of metrics that comes after the second save began, which had waited
        for the first.
        """
        if not (local_path(self.workdir) / METRICS_FILE).exists():
            return
        reached = max((line["step"] for line in read_metrics(self.workdir)), default=0)
        # config.json is still that of the start before, which may have saved less often.
        saved = read_config(self.workdir)["checkpoint"]["every"]
        intervals = (self.experiment.config.checkpoint.every, saved)
        if all(intervals) and reached > 2 * max(intervals):
            raise UserError(
                f"workdir {self.workdir} has metrics up to step {reached}, but no checkpoint in "
                f"{self.checkpoints.directory}; bring the checkpoints back or use a new workdir"
            )

    def train(self, step: int, state: TrainState, progress: Progress) -> tuple[TrainState, Evaluation]:
        """Trains from what `start` returned to the last step and evaluates.

        Raises:
          Stopped: a signal came; the finished step is saved.
          UserError: the loss or the gradient is not finite, or the disk cannot be written; earlier checkpoints stay.
        """
        config = self.experiment.config
        writer = MetricWriter(self.workdir, step if self.checkpoints.committed_steps() else None)
        log = _Log(self, writer, progress)
        trace = TraceWindow(self.workdir, config.profile.first_step, config.profile.steps)
        self.watch.begin(step)
        trace.begin(step, config.num_steps)
        evaluation: Evaluation | None = None
        teacher = self.teacher.arrays if self.teacher else None
        try:
            with StopSignals(step) as signals, jax.set_mesh(self.experiment.mesh):
                batches = self._batches(step)
                while step < config.num_steps:
                    trace.before(step + 1)
                    state, metrics = self._train_step(state, next(batches), teacher)
                    step += 1
                    trace.after(step, state)
                    log.finished(step, metrics)
                    evaluate_now = config.eval.every and step % config.eval.every == 0
                    signum = signals.to_stop(step)
                    last = step == config.num_steps
                    save_now = signum is not None or last or self.checkpoints.due(step)
                    if evaluate_now or save_now:
                        log.flush()
                    # Of the same batches at every step, so that the best checkpoint is the best at one thing.
                    regular = self.evaluate(state, config.eval.batches) if evaluate_now or last else None
                    evaluation = self.evaluate(state, 0) if last and config.eval.batches else regular
                    if evaluation:
                        log.evaluated(step, evaluation)
                    if save_now:
                        # Step N's loss is that of the weights before its update: those after it are what is saved.
                        self._require_finite(step, evaluation or self.evaluate(state, 1))
                        self.mirror.upload()  # lines up to a step are there before its checkpoint is
                        self.checkpoints.save(step, to_saved(state), regular.as_metrics() if regular else None)
                        self.watch.lap("saves", step)
                    if signum is not None:
                        self.checkpoints.wait()
                        raise Stopped(signum, step)
                evaluation = evaluation or self.evaluate(state, 0)
            if processes.is_distributed():
                progress.note(str(log.hosts))
            return state, evaluation
        finally:
            with contextlib.ExitStack() as ending:  # all of it, whatever of it fails; the last is done first
                ending.callback(self.watch.write, step)
                ending.callback(self.watch.lap, "saves", step)
                ending.callback(self.checkpoints.close)
                ending.callback(progress.close)
                ending.callback(writer.close)
                ending.callback(trace.close)

    def evaluate(self, state: TrainState, num_batches: int) -> Evaluation:
        """On `num_batches` batches from all over the held-out split; 0 = all of it."""
        config = self.experiment.config
        part = part_of_process(self.experiment.batch_sharding)
        batches = heldout_batches(
            self.data.heldout,
            batch_size=config.eval.batch_size,
            sequence_length=config.sequence_length,
            max_batches=num_batches,
            process_index=part.index,
            process_count=part.count,
        )
        ratio = tokens_per_byte(self.data.heldout)
        sharding = self.experiment.batch_sharding
        with jax.set_mesh(self.experiment.mesh):
            return evaluate(self._eval_step, state.params, state.projections, batches, sharding, ratio)

    def _require_finite(self, step: int, evaluation: Evaluation) -> None:
        if not math.isfinite(evaluation.loss):
            raise self.diverged(step, f"held-out loss is {evaluation.loss}")

    def diverged(self, step: int, what: str) -> UserError:
        """The error that ends a run whose numbers are no longer finite."""
        self.checkpoints.wait()
        return UserError(
            f"step {step}: {what}; stopped before it was saved. The last checkpoint is step "
            f"{max(self.checkpoints.committed_steps(), default='(none)')} in {self.workdir}; "
            "a lower optimizer.learning_rate or a smaller optimizer.clip_norm may help"
        )

    def _batches(self, start_step: int) -> Iterator[dict[str, jax.Array]]:
        config = self.experiment.config
        part = part_of_process(self.experiment.batch_sharding)
        batches = train_batches(
            self.data.train,
            seed=config.seed,
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            start_step=start_step,
            num_workers=config.data.num_workers,
            process_index=part.index,
            process_count=part.count,
        )
        for batch in batches:
            yield put_batch(batch, self.experiment.batch_sharding)


class _Log:
    """Reads the metrics of step N-1 after step N was dispatched, so that the device never waits for the host."""

    def __init__(self, run: Run, writer: MetricWriter, progress: Progress) -> None:
        self._run, self._writer, self._progress = run, writer, progress
        self._pending: tuple[int, Metrics] | None = None
        self._clock = time.perf_counter()
        self._steps = 0  # since the clock
        self._host, self.hosts = HostClock(), Hosts(0.0, 0.0, 0)
        self._first = True

    def finished(self, step: int, metrics: Metrics) -> None:
        """A step was dispatched."""
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Reads, checks and writes the metrics that are pending."""
        if self._pending is None:
            return
        step, device_metrics = self._pending
        self._pending = None
        began = time.perf_counter()
        metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
        self._host.waited(time.perf_counter() - began)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                self._writer.write(step, metrics)  # as null: without it, the file is that of a run that was stopped
                raise self._run.diverged(step, f"{name} is {metrics[name]}")
        self._steps += 1
        self._run.watch.lap("starting" if self._first else "steps", step)
        if self._first:
            self._host.restart()  # it has compiled
        self._first = False
        config = self._run.experiment.config
        elapsed = time.perf_counter() - self._clock
        speed = self._steps / elapsed
        tokens_per_second = speed * self._run.experiment.tokens_per_step
        peak = self._run._peak_flops
        mfu = None if peak is None else speed * self._run.experiment.step_flops / peak
        device_memory, host_memory = device_memory_bytes(), host_memory_bytes()
        self._progress.update(step, metrics["loss"], tokens_per_second, mfu, device_memory or host_memory)
        several = processes.is_distributed()
        if step % config.log.every == 0 or step == config.num_steps:
            self.hosts = self._host.read()
            timings = {
                "tokens_per_second": tokens_per_second,
                "step_seconds": 1 / speed,
                "host_seconds": self.hosts.own,
                **({"largest_host_seconds": self.hosts.largest, "slowest_host": self.hosts.slowest} if several else {}),
                "host_memory_bytes": host_memory,
                **({"mfu": mfu} if mfu is not None else {}),
                **({"device_memory_bytes": device_memory} if device_memory is not None else {}),
            }
            self._writer.write(step, metrics, time=timings)
            self._run.mirror.soon()
            self._clock, self._steps = time.perf_counter(), 0

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """Writes an evaluation; the time it took does not count as training."""
        self._writer.write(step, evaluation.as_metrics())
        self._progress.note(f"step {step}  held out: {evaluation}")
        self._run.watch.lap("evaluation", step)
        self._clock, self._steps = time.perf_counter(), 0
        self._host.restart()
