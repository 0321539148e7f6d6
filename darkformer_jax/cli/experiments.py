"""Where experiments are: a config file of the user's, or one of those that come with the package."""

import difflib
import sys
from pathlib import Path

from darkformer_jax.cli.first_line import first_line
from darkformer_jax.data.files import local_path
from darkformer_jax.errors import UserError

PACKAGE = Path(__file__).parents[1]
FOLDER = "configs"


def experiments_root() -> Path:
    """The directory that holds configs/: in the package where it was installed, else the clone."""
    installed = PACKAGE / "experiments"
    return installed if installed.is_dir() else PACKAGE.parent


def experiments() -> dict[str, str]:
    """The experiments that come with the package, as "configs/<name>.py", and what each says it is."""
    files = sorted((experiments_root() / FOLDER).glob("*.py"))
    return {f"{FOLDER}/{path.name}": first_line(path) for path in files if path.name != "__init__.py"}


def find_experiment(config: str) -> str:
    """`config`, "<file>" or "<file>:<arguments>", with the file as it is found: here, or else in the package.

    Raises:
      UserError: there is no such file.
    """
    file, colon, arguments = config.partition(":")
    root = experiments_root()
    if str(root) not in sys.path:
        sys.path.append(str(root))  # experiments import others as `configs.<name>`
    file = local_path(file)
    for path in (Path(file), root / file):
        if path.is_file():
            return f"{path}{colon}{arguments}"
    close = difflib.get_close_matches(file, experiments(), n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    raise UserError(f"--config={file}: there is no such file; {meant}the package has {', '.join(experiments())}")
