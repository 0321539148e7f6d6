"""Several processes that train as one: how they find each other, agree, and end together.

With one process, nothing here does anything. With several, `jax.distributed` gives each process the devices of all, a
key-value store and barriers. This module adds what jax lacks. An error in one process ends the others with the same
line, instead of leaving them in a collective that never completes. A signal to one process stops all at the same step.
Values that must be the same everywhere are compared before they can do harm.

jax's coordinator notices a process that dies silently (kill -9, a lost host) after `HEARTBEAT_SECONDS`. jax then ends
the others itself, with status 134 and a stack trace that names no line of ours.
"""

import contextlib
import json
import multiprocessing
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
from jax.experimental import multihost_utils

from darkformer_jax.distributed.rendezvous import Missing, named, rendezvous
from darkformer_jax.errors import UserError, one_line, printable

HEARTBEAT_SECONDS = 20
_CONNECT_SECONDS = 60  # after the rendezvous, when all are there
_START_SECONDS = 300.0  # for a barrier before which processes do little
WORK_SECONDS = 6 * 3600.0  # for a barrier before which they may read, write or hash a lot; a death is noticed sooner
_SEES_FILE_SECONDS = 5.0  # NFS shows a new file late
_LAST_WORDS_SECONDS = 3.0  # for the others to read why a process ended
_POLL_SECONDS = 0.5
_TOKEN = ".shared-"

_FAILURE, _SIGNAL = "darkformer/failure", "darkformer/signal"
# The key that jax's preemption manager waits for in every process. jax sets it in a SIGTERM handler, which swallows a
# second signal and does not handle Ctrl-C.
_PREEMPTION_NOTICE = "RECEIVED_PREEMPTION_NOTICE"
_LONG_AGO = "2000-01-01T00:00:00+00:00"  # the time of the preemption: in the past by every host's clock

# jax's environments that are read from variables or a TPU VM's metadata. Not Kubernetes: there jax asks the cluster's
# API, for which pods seldom have permission; launch/gke.sh passes flags instead.
_ENVIRONMENTS = ("slurm", "ompi", "gcetpu", "gketpu")


class Cluster(NamedTuple):
    """The address of process 0, the number of processes, and the index of this one."""

    coordinator: str  # host:port
    num_processes: int
    process_id: int
    local_device_ids: Sequence[int] | None = None  # None = all of this machine


def cluster_of_flags(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Cluster | None:
    """The cluster that the three flags name; None if none is given. Raises UserError if they do not fit together."""
    given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError(f"{' and '.join(missing)} missing: {', '.join(given)} go together")
    host, _, port = coordinator.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator={coordinator}: the form is HOST:PORT, with a port from 1 to {2**16 - 1}")
    if num_processes < 1:
        raise UserError(f"--num_processes={num_processes}: must be at least 1")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id}: with --num_processes={num_processes}, 0 to {num_processes - 1}")
    return Cluster(coordinator, num_processes, process_id)


def cluster_of_environment(timeout: float) -> Cluster | None:
    """The cluster that the environment of Slurm, Open MPI or a TPU VM names; None outside of them."""
    from jax._src.clusters import ClusterEnv  # jax.distributed.initialize asks it as well, but after the rendezvous

    for environment in ClusterEnv._cluster_types:
        # On one worker of a TPU slice, JAX_PLATFORMS=cpu means a run without the TPU and without the other workers.
        without_tpu = environment.name.endswith("tpu") and jax.config.values["jax_platforms"] == "cpu"
        if environment.name in _ENVIRONMENTS and not without_tpu and environment.is_env_present():
            try:
                found: Any = ClusterEnv.auto_detect_unset_distributed_params(
                    None, None, None, None, environment.name, int(timeout)
                )
            except (RuntimeError, OSError, ValueError, LookupError) as error:
                raise UserError(
                    f"{environment.name}: the other processes cannot be found: {one_line(error)}"
                ) from error
            return Cluster(*found)
    return None


def join(cluster: Cluster | None, timeout: float = 300) -> None:
    """Connects this process with the others and prints `process i of n`. Call it before anything looks at devices.

    Args:
      cluster: None = there are no others.
      timeout: seconds to wait for all processes.

    Raises:
      Missing: in every process that came, if others did not come or the coordinator cannot be reached.
      UserError: in every process that came, if two of them do not fit together.
    """
    if cluster is None:
        return
    print(f"process {cluster.process_id} of {cluster.num_processes}", file=sys.stderr, flush=True)
    if cluster.num_processes == 1:
        return
    host, _, port = cluster.coordinator.rpartition(":")
    rendezvous(host.strip("[]"), int(port), cluster.num_processes, cluster.process_id, timeout)
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.num_processes,
        cluster.process_id,
        local_device_ids=cluster.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=_CONNECT_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    # jax's handler would swallow SIGTERM. Until the run can save (StopSignals), SIGTERM ends this process as usual.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _watch.start()


def is_distributed() -> bool:
    """Whether there are other processes."""
    return jax.distributed.is_initialized()


def process_index() -> int:
    """The index of this process. Unlike `jax.process_index`, it does not look at devices."""
    return _state().process_id


def barrier(name: str, timeout: float = WORK_SECONDS) -> None:
    """Returns when all processes have come to it. Raises Missing, which names those that did not come in time."""
    if not is_distributed():
        return
    client, prefix = _state().client, f"darkformer/at/{name}"
    mine = f"{prefix}/{process_index()}"
    client.key_value_set(mine, "", allow_overwrite=True)
    try:
        client.wait_at_barrier(prefix, int(timeout * 1000))
    except jax.errors.JaxRuntimeError as error:
        came = {int(key.rpartition("/")[2]) for key, _ in client.key_value_dir_get(prefix)}
        missing = [number for number in range(_state().num_processes) if number not in came]
        what = f"{named(missing)} did not come" if missing else one_line(error)
        raise Missing(f"waited {timeout:.0f} s for all processes at {name!r}: {what}") from error
    client.key_value_delete(mine)


def require_same(what: str, fields: Mapping[str, Any]) -> None:
    """Compares JSON values with those of process 0, and returns when all processes have done so.

    Raises UserError in a process whose values differ; it shows the fields and both values. `fail` then ends the others.
    """
    if not is_distributed():
        return
    client, key = _state().client, f"darkformer/same/{what}"
    mine = {name: json.dumps(value, sort_keys=True) for name, value in fields.items()}
    if process_index() == 0:
        client.key_value_set(key, json.dumps(mine))
    else:
        theirs = json.loads(_wait_for(key, f"process 0 did not publish its {what}", WORK_SECONDS))
        differing = [
            f"{name}: {mine.get(name, '(absent)')} here, {theirs.get(name, '(absent)')} in process 0"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        ]
        if differing:
            more = f" (and {len(differing) - 4} more)" if len(differing) > 4 else ""
            raise UserError(f"the {what} must be the same in all processes; " + "; ".join(differing[:4]) + more)
    barrier(what)


def tell(what: str, value: float) -> dict[int, float]:
    """Publishes a number, and returns the latest number of each process, this one included. It does not wait."""
    if not is_distributed():
        return {0: value}
    client, prefix = _state().client, f"darkformer/told/{what}/"
    client.key_value_set(f"{prefix}{process_index()}", json.dumps(value), allow_overwrite=True)
    return {int(key.rpartition("/")[2]): json.loads(told) for key, told in client.key_value_dir_get(prefix)}


def require_shared(directory: Any, name: str) -> None:
    """Raises UserError in every process if one of them does not see what process 0 writes to a directory.

    Process 0 writes a file with a random name there. Then it removes the file and the directories that it made for it.

    Args:
      directory: an absolute Path, or a path in a bucket that has pathlib's methods.
      name: the directory's name in messages.
    """
    if not is_distributed():
        return
    client, key = _state().client, "darkformer/token"
    made: list[Path] = []
    if process_index() == 0:
        token = _TOKEN + secrets.token_hex(8)
        try:
            if isinstance(directory, Path):  # a bucket has no directories
                made = [path for path in (directory, *directory.parents) if not path.exists()]
                directory.mkdir(parents=True, exist_ok=True)
            (directory / token).touch()
        except OSError as error:
            _remove(directory / token, made)
            raise UserError(f"{name} cannot be written: {error.strerror or error}") from error
        client.key_value_set(key, token)
        sees = True
    else:
        token = _wait_for(key, f"process 0 did not write to {name}", _START_SECONDS)
        sees = _comes_to_be(directory / token)
    client.key_value_set(f"darkformer/sees/{process_index()}", "yes" if sees else "no")
    try:
        barrier("the workdir", _START_SECONDS)
    finally:
        if process_index() == 0:
            _remove(directory / token, made)
    blind = sorted(int(k.rpartition("/")[2]) for k, v in client.key_value_dir_get("darkformer/sees") if v == "no")
    if blind:
        raise UserError(
            f"{name} is not the same directory for all processes: {named(blind)} cannot see what process 0 writes "
            "there; it must be on a file system that all share"
        )


def is_token(name: str) -> bool:
    """Whether a file of this name was left by a process that was killed in `require_shared`."""
    return name.startswith(_TOKEN)


def _wait_for(key: str, otherwise: str, seconds: float) -> str:
    try:
        value: str = _state().client.blocking_key_value_get(key, int(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise Missing(f"{otherwise} within {seconds:.0f} s: {one_line(error)}") from error
    return value


def announce_stop(signum: int) -> None:
    """Tells all processes that this one received a signal. Each then stops when `stop_agreed` says so."""
    for key, value in ((_SIGNAL, str(signum)), (_PREEMPTION_NOTICE, _LONG_AGO)):
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
            _state().client.key_value_set(key, value)


def stop_agreed(step: int) -> int | None:
    """The signal to stop for after `step`, the same in all processes; None = continue. Call it at every step."""
    if not is_distributed() or not multihost_utils.reached_preemption_sync_point(step):
        return None
    return int(_wait_for(_SIGNAL, "no process published the signal to stop for", _START_SECONDS))


def leave() -> None:
    """Waits for the others before this process ends with success. Until then, an error of theirs ends it, too."""
    if is_distributed():
        barrier("the end")
        _watch.stop()


def fail(message: str, status: int) -> NoReturn:
    """Prints `error: <message>` and ends this process, and all others in the same way."""
    if not is_distributed():
        print(f"error: {printable(message)}", file=sys.stderr)
        sys.exit(status)
    end_at_once(message, status)


def end_at_once(message: str, status: int) -> NoReturn:
    """`fail` from any thread: it does not wait for what the others of this process do."""
    if is_distributed():
        _watch.only_one_ends.acquire()  # never released: a second caller waits here for the end
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first, or the coordinator is gone
            words = json.dumps({"message": f"process {process_index()}: {message}", "status": status})
            _state().client.key_value_set(_FAILURE, words)
    _end(message, status)


def _end(message: str, status: int) -> NoReturn:
    """Exits at once. The interpreter's exit would wait for threads, and jax's for the other processes."""
    try:
        with contextlib.suppress(OSError, ValueError):  # the disk of the log may be full
            # On a line of its own: a progress bar may be under way in another thread.
            print(f"\nerror: {printable(message)}", file=sys.stderr, flush=True)
            sys.stdout.flush()
        for child in multiprocessing.active_children():  # grain's workers
            child.kill()
        if is_distributed():
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                _state().client.wait_at_barrier("darkformer/failed", int(_LAST_WORDS_SECONDS * 1000))
            if process_index() == 0:
                time.sleep(_POLL_SECONDS)  # the coordinator ends with it, and jax those that lose it, with status 134
    finally:
        os._exit(status)


class _Watch:
    """A thread that asks every half second whether another process has failed."""

    def __init__(self) -> None:
        self.only_one_ends = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="other_processes", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        # Before the interpreter exits: a thread that is inside jax at that time would abort the process.
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(_POLL_SECONDS):
            try:
                failure = json.loads(_state().client.key_value_try_get(_FAILURE))
            except jax.errors.JaxRuntimeError:  # none has; or the coordinator is gone, and jax ends this process
                continue
            if self.only_one_ends.acquire(blocking=False):
                _end(failure["message"], failure["status"])
            return


_watch = _Watch()


def _state() -> Any:
    from jax._src import distributed  # store and barriers have no public name; Orbax takes them from here, too

    return distributed.global_state


def _comes_to_be(path: Any) -> bool:
    deadline = time.monotonic() + _SEES_FILE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        with contextlib.suppress(OSError):
            os.listdir(path.parent.parent)  # makes NFS look again for a directory that was not there
        time.sleep(0.1)
    return True


def _remove(token: Any, directories: Sequence[Path]) -> None:
    with contextlib.suppress(OSError):
        token.unlink(missing_ok=True)
        for directory in directories:
            directory.rmdir()
