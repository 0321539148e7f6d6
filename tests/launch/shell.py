"""Starts the scripts of launch/ as a user would, out of reach of a real gcloud, kubectl or sbatch."""

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
NASTY = [  # flags that a careless shell would change
    '--config.data.files=it\'s "a" $HOME $(b) `c` \\ *.txt & ü',
    "--config.sample.prompt=two\nlines",
    "--config.log.note=",
]


@functools.cache
def bare_path() -> str:
    """A PATH with nothing but what a dry run needs."""
    directory = Path(tempfile.mkdtemp(prefix="launch-tests-"))
    atexit.register(shutil.rmtree, directory)
    for program in ("bash", "cat", "dirname"):
        (directory / program).symlink_to(shutil.which(program) or program)
    return str(directory)


def launch(
    script: str, *arguments: str, root: Path = ROOT, stand_ins: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs launch/<script> of the clone `root`; with `stand_ins`, a directory of programs, the usual ones behind it."""
    path = f"{stand_ins}:/usr/local/bin:/usr/bin:/bin" if stand_ins else bare_path()
    return subprocess.run(
        ["bash", str(root / "launch" / script), *arguments],
        env={"PATH": path, "HOME": "/nonexistent", "LC_ALL": os.environ.get("LC_ALL", "C.UTF-8")} | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def dry_run(script: str, *arguments: str) -> str:
    """What --dry-run prints; the flags of train.py, if any, stand behind "--" in `arguments`."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    done = launch(script, *arguments[:at], "--dry-run", *arguments[at:])
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def refusal(script: str, *arguments: str) -> str:
    """The one line with which it refuses `arguments`."""
    done = launch(script, *arguments)
    assert (done.returncode, done.stdout) == (2, ""), arguments
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def write_program(path: Path, text: str) -> None:
    """An executable bash script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
