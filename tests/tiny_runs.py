"""Models, text and commands small enough that a test can train."""

import atexit
import functools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import pytest

from darkformer_jax.cli.progress import Progress
from darkformer_jax.config import base
from darkformer_jax.config.pattern import ATTENTION, parse_pattern
from darkformer_jax.data.tokenizers import BytesTokenizer
from darkformer_jax.mixers import MIXERS
from darkformer_jax.model import token_loss
from darkformer_jax.runs.checkpoints import Checkpoints
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.next_token import NextToken
from darkformer_jax.training.experiment import Experiment
from darkformer_jax.training.run import train
from darkformer_jax.training.step import TrainState, make_state_init, to_saved

ROOT = Path(__file__).parents[1]

TINY: dict[str, Any] = {
    "num_steps": 8,
    "batch_size": 4,
    "sequence_length": 32,
    "model.num_layers": 1,
    "model.embed_dim": 32,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.head_dim": 8,
    "model.mlp_dim": 32,
    "model.dtype": "float32",
    "model.attention.kind": "dark",
    "model.attention.num_features": 8,
    "model.attention.projections": "iid",  # QR takes seconds to compile
    "model.attention.chunk_size": 16,
    "data.source": "text",
    "optimizer.warmup_steps": 2,
    "eval.batch_size": 4,
    "log.every": 1,
    "sample.prompts": (),
}


def tiny_config(**changes: Any) -> ml_collections.ConfigDict:
    """`base.get_config()` made tiny; `model__num_layers=2` sets model.num_layers."""
    config = base.get_config()
    config.update_from_flattened_dict(_tiny_fields(changes))
    return config


def tiny_flags(**changes: Any) -> list[str]:
    """The same as flags of train.py."""
    return [f"--config.{name}={value}" for name, value in _tiny_fields(changes).items()]


def _tiny_fields(changes: Mapping[str, Any]) -> dict[str, Any]:
    """TINY without what no layer uses, and the changes."""
    own = {name.replace("__", "."): value for name, value in changes.items()}
    fields = TINY | own
    layers = parse_pattern(fields.get("model.attention.pattern"), fields["model.attention.kind"])
    used = {"kind", "pattern"}.union(*(MIXERS[layer.kind].uses for layer in layers))
    unused = {name for name in TINY if name.startswith(ATTENTION) and name.removeprefix(ATTENTION) not in used}
    return {name: value for name, value in fields.items() if name not in unused - own.keys()}


def write_text(path: Path, num_bytes: int = 6000) -> str:
    """A file of words in lines, always the same; returns its path."""
    words = random.Random(0).choices(("the", "value", "def", "return", "import", "in", "x", "y", "None"), k=num_bytes)
    lines = [" ".join(words[i : i + 8]) for i in range(0, len(words), 8)]
    path.write_text("\n".join(lines)[:num_bytes])
    return str(path)


def experiment_of(config: ml_collections.ConfigDict, vocab_size: int = 257) -> Experiment:
    """The experiment of a language model, by default of bytes."""
    return Experiment.of(config, NextToken.of(config, vocab_size))


def run(config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]) -> None:
    """What `train.py` does."""
    train(config, Workdir(workdir), Progress(config.num_steps, config.log.every))


def fresh_state(experiment: Experiment) -> TrainState:
    """The state before the first step."""
    init = make_state_init(experiment.network, experiment.optimizer, experiment.config.seed, experiment.trained)
    return jax.jit(init)()


def write_workdir(
    workdir: Path, config: ml_collections.ConfigDict, state: TrainState | None = None, step: int = 3
) -> TrainState:
    """A workdir with a checkpoint of `state` (None: the untrained model); returns the state."""
    state = fresh_state(experiment_of(config)) if state is None else state
    Workdir(workdir).write_config(config.to_dict())
    BytesTokenizer().save(str(workdir))
    checkpoints = Checkpoints(Workdir(workdir))
    checkpoints.save(step, to_saved(state))
    checkpoints.close()
    return state


def random_batch(seed: int, rows: int = 4, length: int = 32, vocab: int = 257) -> dict[str, np.ndarray]:
    """Rows of two documents and padding, with very unequal numbers of tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, length + 1)).astype(np.int32)
    real = np.arange(length) < np.linspace(3, length, rows).astype(int)[:, None]
    segments = np.where(np.arange(length) < 2, 1, 2) * real
    positions = np.where(np.arange(length) < 2, np.arange(length), np.arange(length) - 2) * real
    return {
        "inputs": np.where(real, tokens[:, :-1], 0),
        "targets": np.where(real, tokens[:, 1:], 0),
        "segment_ids": segments.astype(np.int32),
        "positions": positions.astype(np.int32),
        "weights": real.astype(np.float32),
    }


def make_chunks(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Lets programs that are traced from now on make the logits of so many tokens at a time."""
    monkeypatch.setattr(token_loss, "_TOKENS", tokens)
    monkeypatch.setattr(token_loss, "_LOGITS", 1)


def metrics_without_time(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, the clock's part removed."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def saved_arrays(workdir: Path, step: int | None = None) -> dict[str, bytes]:
    """The bytes of every array of a checkpoint (the newest), by name."""
    checkpoints = Checkpoints(Workdir(workdir))
    step = checkpoints.latest_good_step() if step is None else step
    assert step is not None
    _, state = checkpoints.restore(checkpoints.saved_shapes(step), step)
    checkpoints.close()
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def free_port() -> int:
    """Of this machine, a moment ago."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


class Finished(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


# Imports once, which takes longer than what most commands do, and forks for each. It starts no jax backend, so it has
# no threads that a fork would lose.
_DRIVER = """
import gc, json, os, runpy, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the test that starts this process may ignore it
sys.modules["torch"] = None  # only tests have it; tensorboardX would import it, and each command free it again
import darkformer_jax.evaluate, darkformer_jax.generate, darkformer_jax.prepare_data, darkformer_jax.training.run
import jax

def become(script, argv, cwd, streams, environment, jax_config):
    for stream, path in enumerate(streams):
        os.dup2(os.open(path, os.O_RDWR), stream)
    os.chdir(cwd)
    os.environ.update(environment)
    for name, value in jax_config.items():
        jax.config.update(name, value)
    sys.argv = [script, *argv]
    if script.endswith(".py"):
        runpy.run_path(script, run_name="__main__")
    else:
        sys.modules.pop(script, None)
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    sys.exit()

gc.freeze()  # else each command, as it exits, frees what was imported: a second
for request in map(json.loads, sys.stdin):
    if "script" in request:
        answer = os.fork() or become(**request)
    else:
        pid, status = os.waitpid(request["pid"], request["options"])
        answer = os.waitstatus_to_exitcode(status) if pid else None
    print(json.dumps(answer), flush=True)
"""


@functools.cache
def _driver() -> subprocess.Popen[str]:
    """The process that forks; it ends with this one."""
    driver = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _DRIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    atexit.register(driver.communicate)
    return driver


def _ask(**request: Any) -> Any:
    driver = _driver()
    assert driver.stdin and driver.stdout
    driver.stdin.write(json.dumps(request) + "\n")
    driver.stdin.flush()
    return json.loads(driver.stdout.readline())


class Command:
    """`python <script or -m module> <arguments>` in a process of its own.

    Args:
      script: a path that ends in .py, or the name of one of the verbs' modules.
      argv: the arguments.
      streams: a directory for what it prints; other commands must not use it.
      cwd: where it runs.
      environment, jax_config: changes to those of this process; when it begins, jax has read its own variables.
    """

    def __init__(
        self,
        script: str,
        argv: Sequence[str],
        streams: Path,
        cwd: Path = ROOT,
        environment: Mapping[str, str] | None = None,
        jax_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.out, self.err = streams / "out", streams / "err"
        self.out.touch()
        self.err.touch()
        self.pid: int = _ask(
            script=script,
            argv=list(argv),
            cwd=str(cwd),
            streams=[os.devnull, str(self.out), str(self.err)],
            environment=dict(environment or {}),
            jax_config=dict(jax_config or {}),
        )
        self._status: int | None = None

    def poll(self) -> int | None:
        """Its exit status, minus the signal that ended it; None while it runs."""
        if self._status is None:
            self._status = _ask(pid=self.pid, options=os.WNOHANG)
        return self._status

    def wait(self) -> Finished:
        """Returns when it has ended."""
        if self._status is None:
            self._status = _ask(pid=self.pid, options=0)
        return Finished(self._status, self.out.read_text(), self.err.read_text())

    def wait_or_kill(self, seconds: float) -> Finished:
        """`wait`, but a command that still runs after so long is killed: its status is -9."""
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()


# A process killed while it writes to the cache of compiled programs would leave a broken entry to all others.
READS_COMPILED = {"jax_persistent_cache_min_compile_time_secs": 1e9, "jax_compilation_cache_max_size": -1}
COMPILES = {"jax_enable_compilation_cache": False}


class Training(Command):
    """`python train.py --workdir=<workdir> <flags>` in a process of its own, and what it says."""

    def __init__(
        self,
        workdir: Path,
        flags: Sequence[str],
        jax_config: Mapping[str, Any] | None = None,
        cwd: Path = ROOT,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.workdir = workdir
        streams = Path(tempfile.mkdtemp(dir=workdir.parent))
        arguments = [f"--workdir={workdir}", *flags]
        super().__init__(str(ROOT / "train.py"), arguments, streams, cwd, environment, jax_config)

    @property
    def said(self) -> list[str]:
        """The lines so far."""
        return self.err.read_text().splitlines()

    def resumed_from(self) -> list[int]:
        """The step of `resuming <workdir> from step 7`, if it says so."""
        return [int(line.split()[-1]) for line in self.said if line.startswith("resuming ")]

    def step(self) -> int:
        """The last one of the progress lines; 0 before the first."""
        return max(map(int, re.findall("^step ([0-9]+)/", self.err.read_text(), re.MULTILINE)), default=0)

    def until(self, step: int) -> None:
        """Returns when the progress lines have come to `step`."""
        while self.step() < step:
            self.assert_runs()
            time.sleep(0.01)

    def until_saving(self) -> None:
        """Returns when a checkpoint is being written, and is not complete."""
        directory = self.workdir / "checkpoints"
        while not (directory.exists() and any("orbax-checkpoint-tmp" in name for name in os.listdir(directory))):
            self.assert_runs()
            time.sleep(0.001)

    def assert_runs(self) -> None:
        assert self.poll() is None, self.wait().err

    def assert_ends_well(self) -> None:
        ended = self.wait()
        assert ended.status == 0, ended.err

    def stop(self, signum: int) -> int:
        """Its exit status after the signal."""
        os.kill(self.pid, signum)
        return self.wait().status


class Processes:
    """`python train.py` in `count` processes of one run.

    Args:
      workdirs: one for all, or one each.
      flags: of all; `each` has those of some processes alone.
      start: which of them to start; None = all.
      cwds: where each runs; None = all in the repository's root.
    """

    def __init__(
        self,
        count: int,
        workdirs: Path | Sequence[Path],
        flags: Sequence[str],
        each: Mapping[int, Sequence[str]] | None = None,
        start: Sequence[int] | None = None,
        cwds: Sequence[Path] | None = None,
        jax_config: Mapping[str, Any] | None = None,
    ) -> None:
        together = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}", *flags]
        self.all = [
            Training(
                workdirs if isinstance(workdirs, Path) else workdirs[number],
                [*together, f"--process_id={number}", *(each or {}).get(number, ())],
                jax_config,
                cwds[number] if cwds else ROOT,
            )
            for number in (range(count) if start is None else start)
        ]

    def wait(self) -> list[Finished]:
        """Returns when all have ended."""
        return [process.wait() for process in self.all]


def on_eight_devices(program: Path, streams: Path) -> Command:
    """`python program` where jax sees eight CPU devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    return Command(str(program), [], streams, environment={"XLA_FLAGS": flags}, jax_config={"jax_platforms": "cpu"})


def run_commands(commands: Sequence[tuple[str, Sequence[str]]], cwd: Path = ROOT) -> list[Finished]:
    """Runs (script or module, arguments) one after another, each in a process of its own."""
    finished = []
    for script, argv in commands:
        with tempfile.TemporaryDirectory() as streams:
            finished.append(Command(script, argv, Path(streams), cwd).wait())
    return finished
