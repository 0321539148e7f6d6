"""Trains, converts and evaluates DARKFormers: transformers whose linear attention has a learned geometry.

    darkformer <verb> --help
    darkformer train --config=configs/lm_1b.py --workdir=runs/lm_1b
    darkformer --version

`python -m darkformer_jax.<verb>` is the same.
"""

import difflib
import importlib
import pkgutil
import sys
from pathlib import Path

from absl import app

from darkformer_jax.cli.first_line import first_line
from darkformer_jax.cli.huge_pages import start_with_huge_pages
from darkformer_jax.cli.output import lost_output_is_no_crash

FOLDER = Path(__file__).parent
NO_VERBS = ("__main__", "errors")
LONG_VERBS = ("calibrate", "evaluate", "linearise", "train")  # worth a second start with huge pages


def verbs() -> dict[str, str]:
    """Each verb, a module beside this one, and the first line of its docstring."""
    names = (module.name for module in pkgutil.iter_modules([str(FOLDER)]) if not module.ispkg)
    return {name: first_line(FOLDER / f"{name}.py") for name in names if name not in NO_VERBS}


@lost_output_is_no_crash()
def main() -> None:
    """Runs the verb that the first argument names. Exit status: the verb's; 2 if there is no such verb."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("--help", "-h", "help"):
        width = max(map(len, verbs()))
        print(__doc__, "verbs:", *(f"  {name:{width}}  {line}" for name, line in verbs().items()), sep="\n")
        return
    if verb in ("--version", "-V", "version"):
        from darkformer_jax.training.environment import versions

        print(versions())
        return
    if verb not in verbs():
        close = difflib.get_close_matches(verb, verbs(), n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        print(f"error: {verb!r} is no verb; {meant}allowed: {', '.join(verbs())}", file=sys.stderr)
        sys.exit(2)
    if verb in LONG_VERBS:
        start_with_huge_pages()
    sys.argv[:2] = [f"darkformer {verb}"]
    module = importlib.import_module(f"darkformer_jax.{verb}")
    app.run(module.main, flags_parser=module.parse_flags)


if __name__ == "__main__":
    main()
