"""What a run reports while it trains: metrics.jsonl, the progress line, and the account of its time."""

import math
import time
from collections.abc import Mapping
from typing import Any, Protocol

import jax

from darkformer_jax.distributed import processes
from darkformer_jax.model.flops import peak_flops
from darkformer_jax.runs.metrics import MetricWriter
from darkformer_jax.runs.mirror import Mirror
from darkformer_jax.tasks.task import Evaluation
from darkformer_jax.training.experiment import Experiment
from darkformer_jax.training.goodput import Stopwatch
from darkformer_jax.training.loss_curve import LossCurve
from darkformer_jax.training.means import RunningMeans
from darkformer_jax.training.memory import device_memory_bytes, host_memory_bytes
from darkformer_jax.training.step import OF_THE_UPDATE, Metrics
from darkformer_jax.training.stragglers import HostTimer
from darkformer_jax.training.trackers import Trackers


class RunProgress(Protocol):
    """Shows people the progress of a run."""

    def update(
        self, step: int, loss: float, tokens_per_second: float | None, mfu: float | None, memory_bytes: int
    ) -> None:
        """Shows a finished step.

        loss: the mean since the last line of metrics.jsonl. mfu: model FLOP/s over the devices' peak, from 0 to 1. None
        = not known.
        """
        ...

    def note(self, text: str) -> None:
        """Prints a line that stays."""
        ...

    def bar(self, total: float | None, unit: str, label: str = "") -> Any:
        """A tqdm bar for work before the first step; see `data.progress.ProgressBar`."""
        ...

    def close(self) -> None:
        """Ends the display, after the last update."""
        ...


class NotFinite(Exception):
    """A loss or a gradient of a run is not finite."""


class TrainingLog:
    """Reads the metrics of step N-1 after step N was dispatched, so that the device never waits for the host.

    A line of metrics.jsonl has means over the steps since the last line (`RunningMeans`), but the gradient norm, the
    learning rate and the size of the batch of its own step.

    Args:
      experiment: what is trained.
      writer: writes metrics.jsonl.
      progress: what people see.
      watch: the session's stopwatch; it gets a lap for every step, evaluation and save.
      mirror: uploads the lines from time to time.
      curve: is renewed after every evaluation.
      trackers: get what the writer gets.
      carried: what `carried` returned when the step that the run resumes from was saved. Earlier versions saved
        nothing; then the first line has the means since that step.
    """

    def __init__(
        self,
        experiment: Experiment,
        writer: MetricWriter,
        progress: RunProgress,
        watch: Stopwatch,
        mirror: Mirror,
        curve: LossCurve,
        trackers: Trackers,
        carried: Mapping[str, Any],
    ) -> None:
        self._writer, self._progress, self._watch, self._mirror = writer, progress, watch, mirror
        self._curve, self._trackers = curve, trackers
        self._num_steps, self._every = experiment.config.num_steps, experiment.config.log.every
        self._tokens_per_step, self._step_flops = experiment.tokens_per_step, experiment.step_flops
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak_flops = None if peak is None else peak * len(jax.devices())
        self._means = RunningMeans(experiment.objective.weight_name, OF_THE_UPDATE, carried)
        self._pending: tuple[int, Metrics] | None = None
        self._host = HostTimer()
        self._first = True
        self._restart()

    def finished(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step that was dispatched, and flushes those of the step before."""
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Reads, checks and writes the pending metrics.

        Raises NotFinite if the loss or the gradient is not finite.
        """
        if self._pending is None:
            return
        step, device_metrics = self._pending
        self._pending = None
        began = time.perf_counter()
        metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
        self._host.waited(time.perf_counter() - began)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                self._write(step, metrics)  # the number as null, which tells this run from a stopped one
                raise NotFinite(f"step {step}: {name} is {metrics[name]}")
        self._watch.lap("starting" if self._first else "steps", step)
        if self._first:  # this step was the compilation: no speed
            self._host.restart()
            self._restart()
        else:
            self._steps += 1
        self._first = False
        self._show(step, self._means.add(metrics))

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """Writes an evaluation; the time it took does not count as training."""
        self._write(step, evaluation.as_metrics())
        self._progress.note(f"step {step}  held out: {evaluation}")
        self._curve.renew()
        self._watch.lap("evaluation", step)
        self._restart()
        self._host.restart()

    def upload(self) -> None:
        """Uploads the lines so far, and waits. Other machines must see them before their step's checkpoint."""
        self._mirror.upload()

    def carried(self) -> dict[str, Any]:
        """The steps that are in no line yet, as JSON values, to be saved with the step. Call it after `flush`."""
        return self._means.carried()

    def saved(self, step: int) -> None:
        """Notes that a checkpoint was handed over to be written."""
        self._watch.lap("saves", step)

    def _show(self, step: int, metrics: dict[str, float]) -> None:
        speed = self._steps / (time.perf_counter() - self._clock) if self._steps else None  # steps per second
        tokens_per_second = None if speed is None else speed * self._tokens_per_step
        mfu = None if speed is None or self._peak_flops is None else speed * self._step_flops / self._peak_flops
        device_memory, host_memory = device_memory_bytes(), host_memory_bytes()
        self._progress.update(step, metrics["loss"], tokens_per_second, mfu, device_memory or host_memory)
        if step % self._every and step != self._num_steps:
            return
        times = self._host.read()
        several = processes.is_distributed()
        timings = {
            **({"tokens_per_second": tokens_per_second, "step_seconds": 1 / speed} if speed is not None else {}),
            "host_seconds": times.own,
            **({"largest_host_seconds": times.largest, "slowest_host": times.straggler} if several else {}),
            "host_memory_bytes": host_memory,
            **({"mfu": mfu} if mfu is not None else {}),
            **({"device_memory_bytes": device_memory} if device_memory is not None else {}),
        }
        self._write(step, metrics, timings)
        self._means.restart()
        if several and step == self._num_steps:
            self._progress.note(str(times))
        self._mirror.soon()
        self._restart()

    def _write(self, step: int, values: dict[str, float], timings: Mapping[str, Any] | None = None) -> None:
        self._writer.write(step, values, time=timings)
        self._trackers.scalars(step, values, timings)

    def _restart(self) -> None:
        self._clock, self._steps = time.perf_counter(), 0
