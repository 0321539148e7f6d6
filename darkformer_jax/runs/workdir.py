"""The run's directory: config.json is written once, compared on every later start, and nothing foreign is overwritten.

It holds config.json, data.json, checkpoints/, metrics.jsonl, tensorboard/, samples.txt, the plots and .lock.
"""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Mapping
from typing import IO, Any

import jax
from absl import logging

from darkformer_jax.config.fields import flat_fields
from darkformer_jax.data.files import write_atomically
from darkformer_jax.distributed.processes import is_token
from darkformer_jax.errors import Transient, UserError
from darkformer_jax.runs.store import local_path

CONFIG_FILE = "config.json"
DATA_FILE = "data.json"
LOCK_FILE = ".lock"

# What a resumed run may change: how long it runs, what it prints and keeps, and how the same batch is laid out on the
# devices. Everything else would continue another experiment under the old one's name.
CHANGEABLE = (
    "num_steps",
    "accumulation_steps",
    "checkpoint",
    "eval",
    "log",
    "sample",
    "profile",
    "mesh",
    "data.num_workers",
)

# Fields that runs begun before them do not have, and the values that mean what those runs did. A new field goes here.
_LATER_FIELDS: dict[str, Any] = {
    "distill": {"weight": 0.0, "workdir": ""},
    "mesh": {"context": 1},
    "model": {
        "attention": {
            "far_gain": False,
            "learn_projections": False,
            "local_window": 0,
            "query_scale": 0.0,
            "softcap": 0.0,
            "window_kernel": "dark",
        },
        "lora_rank": 0,
        "norm_plus_one": False,
        "post_norms": False,
        "qkv_bias": False,
        "rope_attention_factor": 0.0,
        "rope_beta_fast": 32.0,
        "rope_beta_slow": 1.0,
        "rope_factor": 1.0,
        "rope_high_freq_factor": 4.0,
        "rope_local_theta": 0.0,
        "rope_low_freq_factor": 1.0,
        "rope_original_length": 8192,
        "rope_scaling": "none",
    },
    "optimizer": {"train": "all"},
    "profile": {"first_step": 0, "steps": 3},
}


def write_config(workdir: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Claims `workdir` for the experiment `config`, or checks that it already belongs to it.

    An absent or empty directory is created and gets config.json. Where config.json exists, only the fields in
    `CHANGEABLE` may differ; config.json then takes the new values. On a pod process 0 does this.

    Args:
      workdir: a local or mounted directory, or gs://bucket/name.
      config: the resolved config as nested dicts of JSON values (tuples count as lists).

    Raises:
      UserError: `workdir` holds another experiment (each changed field is printed as `field: old -> new`), or files but
        no config.json, or cannot be written.
    """
    if jax.process_index() != 0:  # they called check_config; by now there may be files of process 0's
        return
    check_config(workdir, config)
    directory = local_path(workdir)
    path = directory / CONFIG_FILE
    new = _as_read_back(config)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        content = (json.dumps(new, indent=2, sort_keys=True) + "\n").encode()
        if not path.exists() or path.read_bytes() != content:
            write_atomically(path, content)
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be written: {error.strerror or error}") from error


def check_config(workdir: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Raises what `write_config` would raise for a directory that is not this experiment's, and writes nothing."""
    directory = local_path(workdir)
    try:
        if (directory / CONFIG_FILE).exists():
            _refuse_changes(workdir, read_config(workdir), _as_read_back(config))
        else:
            _refuse_foreign_files(workdir)
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be read: {error.strerror or error}") from error


def read_config(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """The config.json of a run, as nested dicts; fields that came after the run began mean what it did without them.

    Raises:
      UserError: there is none, it is not JSON, or a model's of Hugging Face.
    """
    path = f"{os.fspath(workdir)}/{CONFIG_FILE}"  # of a workdir in a bucket, not where its copy is
    try:
        config = json.loads((local_path(workdir) / CONFIG_FILE).read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; is this the workdir of a run?") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a {type(config).__name__}, not a config")
    if "model_type" in config:
        raise UserError(
            f"{path} is a Hugging Face model's; bring it into a workdir first: python -m darkformer_jax.convert "
            f"--source={os.fspath(workdir)} --workdir=<a new directory>"
        )
    return _with(_LATER_FIELDS, config)


def _with(later: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    for name, value in later.items():
        if not isinstance(value, Mapping):
            config.setdefault(name, value)
        elif isinstance(section := config.setdefault(name, {}), dict):
            _with(value, section)
    return config


def check_data(workdir: str | os.PathLike[str], fingerprint: str) -> None:
    """Raises UserError where a run of `workdir` trained on other tokens than those of `fingerprint`."""
    path = local_path(workdir) / DATA_FILE
    if not path.exists():
        return
    try:
        saved = json.loads(path.read_bytes())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if saved != fingerprint:
        raise UserError(
            f"workdir {workdir} was trained on other data (fingerprint {saved[:12]}, now {fingerprint[:12]}): files "
            "changed, or this is another Python's library; use a new workdir or bring the data back"
        )


def write_data(workdir: str | os.PathLike[str], fingerprint: str) -> None:
    """Notes what `check_data` compares. On a pod process 0 writes."""
    if jax.process_index() == 0 and not (local_path(workdir) / DATA_FILE).exists():
        write_atomically(local_path(workdir) / DATA_FILE, (json.dumps({"fingerprint": fingerprint}) + "\n").encode())


class WorkdirLock(contextlib.AbstractContextManager["WorkdirLock"]):
    """Keeps a second run out of a workdir. The lock is the kernel's: it ends with the process, however that ends.

    Entering takes it where the workdir has begun (has a config.json); a new run calls `take` when it has written that.
    On a pod, process 0 holds it. A workdir in a bucket cannot be locked: what is locked then is its local copy.
    """

    def __init__(self, workdir: str | os.PathLike[str]) -> None:
        self._directory = local_path(workdir)
        self._file: IO[str] | None = None

    def __enter__(self) -> "WorkdirLock":
        if (self._directory / CONFIG_FILE).exists():
            self.take()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def take(self) -> None:
        """Does nothing where it is held already. Raises UserError: another run has it, or it cannot be written."""
        if self._file is not None or jax.process_index() != 0:
            return
        file: IO[str] | None = None
        try:
            file = open(self._directory / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
            self._lock(file)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            self._file, file = file, None
        except OSError as error:
            raise UserError(f"workdir {self._directory} cannot be written: {error.strerror or error}") from error
        finally:
            if file is not None:
                file.close()

    def _lock(self, file: IO[str]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read() or "another process"
            raise Transient(
                f"workdir {self._directory} is in use by another run ({holder}); wait for it or use another workdir"
            ) from error
        except OSError as error:  # some network file systems have no locks
            logging.warning("workdir %s cannot be locked: %s; start one run at a time", self._directory, error.strerror)


def _as_read_back(config: Mapping[str, Any]) -> dict[str, Any]:
    as_json: dict[str, Any] = json.loads(json.dumps(config))
    return as_json


def _refuse_changes(workdir: str | os.PathLike[str], old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    before, after = dict(flat_fields(old)), dict(flat_fields(new))
    changes = [
        f"{field}: {_shown(before, field)} -> {_shown(after, field)}"
        for field in sorted(before.keys() | after.keys())
        if not _changeable(field) and _shown(before, field) != _shown(after, field)
    ]
    if changes:
        raise UserError(
            f"workdir {workdir} belongs to another experiment; use a new workdir or undo: " + "; ".join(changes)
        )


def _refuse_foreign_files(workdir: str | os.PathLike[str]) -> None:
    directory = local_path(workdir)
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UserError(f"workdir {workdir} is a file, not a directory")
    # A run killed while it wrote its first config.json, or compared its processes, leaves our own files behind.
    try:
        names = [entry.name for entry in directory.iterdir()]
    except FileNotFoundError:  # `require_shared` has just removed it, and NFS shows it a while longer
        return
    foreign = sorted(name for name in names if name != CONFIG_FILE + ".tmp" and not is_token(name))
    if foreign:
        raise UserError(
            f"workdir {workdir} is not empty and has no {CONFIG_FILE} (it holds {foreign[0]}"
            f"{f' and {len(foreign) - 1} more' if len(foreign) > 1 else ''}); use a new or empty directory"
        )


def _shown(fields: Mapping[str, Any], field: str) -> str:
    return json.dumps(fields[field]) if field in fields else "(absent)"


def _changeable(field: str) -> bool:
    return any(field == allowed or field.startswith(allowed + ".") for allowed in CHANGEABLE)
