"""The directory of a run: its config.json is compared on every later start, and nothing foreign is overwritten.

It holds config.json, data.json, checkpoints/, metrics.jsonl, tensorboard/, samples.txt, the plots,
the ids of trackers' runs and .lock.
"""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import jax
from absl import logging

from darkformer_jax.config.base import fields
from darkformer_jax.config.fields import flat_fields
from darkformer_jax.config.migrations import migrate, with_version
from darkformer_jax.config.usage import unused_fields
from darkformer_jax.config.validation import from_json
from darkformer_jax.data.files import local_path, read_json_object, write_atomically
from darkformer_jax.data.tokenizers import has_tokenizer
from darkformer_jax.distributed.processes import is_token
from darkformer_jax.errors import Transient, UserError
from darkformer_jax.runs.store import is_remote, local_copy, remote_path

CONFIG_FILE = "config.json"
DATA_FILE = "data.json"
_TOKENIZER = "tokenizer"  # its field
CHECKPOINTS = "checkpoints"
LOCK_FILE = ".lock"

# What a resumed run may change: how long it runs, what it prints and keeps, and how the same batch is laid out on the
# devices. Any other change would continue another experiment under the old one's name.
CHANGEABLE = (
    "num_steps",
    "accumulation_steps",
    "checkpoint",
    "eval",
    "log",
    "sample",
    "profile",
    "mesh",
    "model.attention.backend",
    "data.num_workers",
)


class Workdir(os.PathLike[str]):
    """The directory of one run. `str` and `os.fspath` give its name; workdirs with the same name are equal.

    The small files of a workdir in a bucket are read and written in a local copy, `local`. A `Mirror` uploads its
    changes. Checkpoints go straight to the bucket.

    Args:
      name: a local or mounted directory, in which `~` is expanded, or gs://bucket/name.

    Raises:
      UserError: another URL, a name that a bucket cannot have, or an unknown user's home directory.
    """

    def __init__(self, name: str | os.PathLike[str]) -> None:
        given = os.fspath(name)
        if not given:
            raise UserError("workdir '': give the name of a directory")
        self.is_remote = is_remote(given)
        self._name = (given if self.is_remote else local_path(given)).rstrip("/") or "/"

    def __str__(self) -> str:
        return self._name

    def __fspath__(self) -> str:
        return self._name

    def __repr__(self) -> str:
        return f"Workdir({self._name!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Workdir) and self._name == other._name

    def __hash__(self) -> int:
        return hash(self._name)

    def __truediv__(self, name: str) -> Path:
        return self.local / name

    @property
    def local(self) -> Path:
        """Where this process reads and writes small files: the workdir itself, or the local copy of a remote one.

        The copy is made when it is first asked for. Raises UserError if the bucket cannot be read.
        """
        return local_copy(self._name) if self.is_remote else Path(self._name)

    @property
    def shared(self) -> Any:
        """The directory that all processes see: an absolute Path, or etils' path in the bucket, with the same methods.

        Raises UserError if the packages for buckets are not installed.
        """
        return remote_path(self._name) if self.is_remote else Path(self._name).absolute()

    @property
    def checkpoints(self) -> Any:
        """The directory of the checkpoints, a path like `shared`."""
        return self.shared / CHECKPOINTS

    @property
    def has_begun(self) -> bool:
        """Whether a run has written its config.json."""
        return (self / CONFIG_FILE).is_file()

    @property
    def has_trained(self) -> bool:
        """Whether the config.json is that of a training, not only of a model that was converted or calibrated."""
        return self.has_begun and (self / DATA_FILE).is_file()

    @property
    def tokenizer_dir(self) -> str | None:
        """The directory to load the tokenizer from; None = there is none yet."""
        return str(self.local) if has_tokenizer(str(self.local)) else None

    def lock(self) -> "WorkdirLock":
        """A lock to use as a context manager: see `WorkdirLock`."""
        return WorkdirLock(self)

    def read_config(self) -> dict[str, Any]:
        """The config.json of a run, as nested dicts. Fields that are newer than the run get values that describe it.

        Raises:
          UserError: there is none, it is not JSON, or it belongs to a Hugging Face model.
        """
        path = f"{self}/{CONFIG_FILE}"  # names the bucket, not the local copy
        try:
            config = json.loads((self / CONFIG_FILE).read_bytes())
        except OSError as error:
            reason = error.strerror or error
            hint = "is this the workdir of a run? (darkformer convert makes one of a pretrained model)"
            raise UserError(f"{path} cannot be read: {reason}; {hint}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(config, dict):
            raise UserError(f"{path} holds a {type(config).__name__}, not a config")
        if "model_type" in config:
            raise UserError(
                f"{path} is a Hugging Face model's; import it into a workdir first: python -m darkformer_jax.convert "
                f"--source={self} --workdir=<a new directory>"
            )
        return migrate(config, path)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Claims the directory for the experiment `config`, or checks that it already belongs to it.

        An absent or empty directory is created and gets config.json. Where config.json exists, only the fields in
        `CHANGEABLE` may differ; config.json then takes the new values. On a pod, process 0 does this.

        Args:
          config: the resolved config as nested dicts of JSON values (tuples count as lists).

        Raises:
          UserError: the directory holds another experiment (each changed field is printed as `field: old -> new`), has
            files but no config.json, or cannot be written.
        """
        if jax.process_index() != 0:  # it called check_config; by now process 0 may have written files
            return
        self.check_config(config)
        path = self / CONFIG_FILE
        content = (json.dumps(with_version(_as_read_back(config)), indent=2, sort_keys=True) + "\n").encode()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_bytes() != content:
                write_atomically(path, content)
        except OSError as error:
            raise UserError(f"workdir {self} cannot be written: {error.strerror or error}") from error

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Raises what `write_config` would raise for a directory that is not this experiment's, and writes nothing."""
        try:
            if (self / CONFIG_FILE).exists():
                self._refuse_changes(self.read_config(), _as_read_back(config))
            else:
                self._refuse_foreign_files()
        except OSError as error:
            raise UserError(f"workdir {self} cannot be read: {error.strerror or error}") from error

    def check_data(self, fingerprint: str) -> None:
        """Raises UserError if the run was trained on tokens with another fingerprint."""
        path = self / DATA_FILE
        if not path.exists():
            return
        try:
            saved = json.loads(path.read_bytes())["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if saved != fingerprint:
            raise UserError(
                f"workdir {self} was trained on other data (fingerprint {saved[:12]}, now {fingerprint[:12]}): files "
                "changed, or another Python's library is read; use a new workdir or bring the data back"
            )

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raises UserError if the run was trained with a tokenizer of another fingerprint: ids would mean other tokens.

        A workdir that training did not write, or an earlier version of it, does not tell.
        """
        path = self / DATA_FILE
        saved = read_json_object(str(path)).get(_TOKENIZER) if path.exists() else None
        if saved is not None and saved != fingerprint:
            raise UserError(
                f"{self}: its tokenizer (fingerprint {fingerprint[:12]}) is not the one that its model was trained "
                f"with ({str(saved)[:12]}); bring the files of the tokenizer back"
            )

    def write_data(self, fingerprint: str, tokenizer: str) -> None:
        """Writes the fingerprints that `check_data` and `check_tokenizer` compare. On a pod, process 0 writes."""
        if jax.process_index() == 0 and not (self / DATA_FILE).exists():
            content = json.dumps({"fingerprint": fingerprint, _TOKENIZER: tokenizer}) + "\n"
            write_atomically(self / DATA_FILE, content.encode())

    def _refuse_changes(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        before, after = dict(flat_fields(old)), dict(flat_fields(new))
        unused = _unused(old) & _unused(new)  # an experiment may set more or fewer of them than it once did
        changes = [
            f"{field}: {_shown(before, field)} -> {_shown(after, field)}"
            for field in sorted((before.keys() | after.keys()) - unused)
            if not _changeable(field) and _shown(before, field) != _shown(after, field)
        ]
        if changes:
            raise UserError(
                f"workdir {self} belongs to another experiment; use a new workdir or undo: " + "; ".join(changes)
            )

    def _refuse_foreign_files(self) -> None:
        if not self.local.exists():
            return
        if not self.local.is_dir():
            raise UserError(f"workdir {self} is a file, not a directory")
        # A run killed while it wrote its first config.json, or compared its processes, leaves our own files behind.
        try:
            names = [entry.name for entry in self.local.iterdir()]
        except FileNotFoundError:  # `require_shared` has just removed it, and NFS shows it a while longer
            return
        foreign = sorted(name for name in names if name != CONFIG_FILE + ".tmp" and not is_token(name))
        if foreign:
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise UserError(
                f"workdir {self} is not empty and has no {CONFIG_FILE} (it holds {foreign[0]}{more}); "
                "use a new or empty directory"
            )


class WorkdirLock(contextlib.AbstractContextManager["WorkdirLock"]):
    """Keeps a second run out of a workdir. The lock is the kernel's: it ends with the process, however that ends.

    Entering takes the lock if the workdir has a config.json; a new run calls `take` once it has written one. On a pod,
    process 0 holds the lock. A bucket cannot be locked, so only its local copy is.
    """

    def __init__(self, workdir: Workdir) -> None:
        self._workdir = workdir
        self._file: IO[str] | None = None

    def __enter__(self) -> "WorkdirLock":
        if self._workdir.has_begun:
            self.take()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def take(self) -> None:
        """Takes the lock if it is not held yet. Raises UserError if another run has it or it cannot be written."""
        if self._file is not None or jax.process_index() != 0:
            return
        file: IO[str] | None = None
        try:
            file = open(self._workdir / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
            self._lock(file)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            self._file, file = file, None
        except OSError as error:
            raise UserError(f"workdir {self._workdir} cannot be written: {error.strerror or error}") from error
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
                f"workdir {self._workdir} is in use by another run ({holder}); wait for it or use another workdir"
            ) from error
        except OSError as error:  # some network file systems have no locks
            logging.warning("workdir %s cannot be locked: %s; start one run at a time", self._workdir, error.strerror)


def _as_read_back(config: Mapping[str, Any]) -> dict[str, Any]:
    as_json: dict[str, Any] = json.loads(json.dumps(config))
    return as_json


def _unused(config: Mapping[str, Any]) -> set[str]:
    """Fields that no layer of a config uses; none of them where the config lacks a field."""
    complete = fields().keys() <= dict(flat_fields(config)).keys()
    return unused_fields(from_json(config)) if complete else set()


def _shown(fields: Mapping[str, Any], field: str) -> str:
    return json.dumps(fields[field]) if field in fields else "(absent)"


def _changeable(field: str) -> bool:
    return any(field == allowed or field.startswith(allowed + ".") for allowed in CHANGEABLE)
