"""Weights & Biases as a tracker."""

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from darkformer_jax.data.files import write_atomically
from darkformer_jax.runs.workdir import Workdir

ID_FILE = "wandb.id"

_PROJECT = "darkformer_jax"  # unless WANDB_PROJECT says otherwise
_SECONDS = 20.0  # for the start, and for what is left at the end; the rest is on the disk, for `wandb sync`


class WandbTracker:
    """A run of wandb, called like the workdir; see `training.trackers.Tracker`.

    wandb reads its own environment: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE, WANDB_API_KEY and others.
    """

    package: ClassVar[str] = "wandb"

    def __init__(self, run: Any) -> None:
        self._run = run

    @classmethod
    def open(cls, workdir: Workdir, config: Mapping[str, Any]) -> "WandbTracker":
        """Begins or continues the run. Raises if there is no login, for wandb would wait for somebody to type a key."""
        import wandb

        offline = os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled")
        if not offline and not wandb.login(prompt=False):
            raise RuntimeError("there is no login; run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline")
        path = workdir / ID_FILE
        if not path.exists():
            write_atomically(path, f"{uuid.uuid4().hex[:12]}\n".encode())
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _PROJECT,
            name=workdir.shared.name,
            id=path.read_text().strip(),
            resume="allow",
            # The console is the progress line's.
            settings=wandb.Settings(console="off", silent=True, init_timeout=_SECONDS, finish_timeout=_SECONDS),
        )
        run.config.update(dict(config), allow_val_change=True)  # a resumed run may have more steps, say
        # wandb drops what it calls a step if a later one came before, and a resumed run repeats some.
        run.define_metric("*", step_metric="step")
        return cls(run)

    @property
    def where(self) -> str:
        """The run's page, or its directory if it is offline."""
        if self._run.url:
            return str(self._run.url)
        return f"offline; `wandb sync {Path(self._run.dir).parent}` uploads it"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A row of the run's history."""
        self._run.log({"step": step, **values})

    def picture(self, path: Path) -> None:
        """A picture among the run's media, by the file's name."""
        import wandb

        self._run.log({path.stem: wandb.Image(str(path))})

    def text(self, path: Path) -> None:
        """A table of one cell, by the file's name."""
        import wandb

        self._run.log({path.stem: wandb.Table(columns=[path.stem], data=[[path.read_text()]])})

    def close(self, finished: bool) -> None:
        """Ends the run: finished, or failed until it resumes."""
        self._run.finish(exit_code=0 if finished else 1)
