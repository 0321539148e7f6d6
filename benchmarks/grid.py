"""Many runs of train.py, each in a workdir of its own: which are done, and training the others."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import ml_collections
import tqdm

from darkformer_jax.errors import UserError

ROOT = Path(__file__).parents[1]


def is_done(workdir: Path, wanted: ml_collections.ConfigDict) -> bool:
    """Whether the run reached its last step, and measured and saved its weights.

    Raises UserError if the workdir has other files, another number of steps or other learning rates than `wanted`.
    """
    try:
        saved = json.loads((workdir / "config.json").read_text())
    except FileNotFoundError:
        return False
    sections = ((wanted, saved), *((wanted[name], saved[name]) for name in ("optimizer", "data")))
    for asked, found in sections:
        for name in ("num_steps", "learning_rate", "geometry_learning_rate", "files"):
            if name in asked and asked[name] != found[name]:
                raise UserError(f"{workdir} has {name} = {found[name]}, not {asked[name]}: choose another --out")
    try:
        row = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    except (FileNotFoundError, IndexError, ValueError):  # not begun, or cut short in the middle of a line
        return False
    last = saved["num_steps"]
    return row["step"] == last and "heldout_loss" in row and (workdir / "checkpoints" / str(last)).is_dir()


def train(workdir: Path, config: str, *flags: str) -> bool:
    """Runs train.py with its output in <workdir>.log. Returns whether it reached its end."""
    return run_logged(workdir, str(ROOT / "train.py"), f"--workdir={workdir}", f"--config={config}", *flags)


def run_logged(workdir: Path, *arguments: str) -> bool:
    """Runs python with its output at the end of <workdir>.log. Returns whether it ended with status 0."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with workdir.with_name(f"{workdir.name}.log").open("a") as log:
        return not subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        ).returncode


def complete(workdirs: Iterable[Path], run: Callable[[Path], bool]) -> None:
    """Runs each with a bar. Raises SystemExit at the end, which names those that did not reach theirs."""
    failed = []
    with tqdm.tqdm(list(workdirs), unit="run") as bar:
        for workdir in bar:
            bar.set_description(workdir.name)
            if not run(workdir):
                failed.append(workdir.name)
    if failed:
        raise SystemExit(f"did not reach their end (diverged?), see their .log: {', '.join(failed)}")
