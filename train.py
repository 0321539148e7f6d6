"""Trains what a config describes; run again with the same --workdir, it resumes.

    python train.py                                                          the quickstart: a small model, real text
    python train.py --config=configs/lm_1b.py --workdir=runs/lm_1b           another experiment
    python train.py --config=configs/ablation.py:attention=performer,m=128   an ablation
    python train.py --config.optimizer.learning_rate=1e-3 --dry_run          override any field; print sizes and stop
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from darkformer_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", "configs/quickstart.py", "The experiment; see configs/base.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run (default: runs/<name of the config file>).")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print parameters, state size and tokens a step, without training.")


def main(argv: list[str]) -> None:
    """Hands the config over; a UserError is one line and exit status 2, a signal 128 + its number."""
    from darkformer_jax.training.run import dry_run, run  # after the flags: --help needs no jax
    from darkformer_jax.training.loop import Stopped

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every save
    try:
        if len(argv) > 1:
            raise UserError(f"{argv[1]!r} is no flag; --help lists them")
        if DRY_RUN.value:
            dry_run(CONFIG.value)
        else:
            run(CONFIG.value, WORKDIR.value or default_workdir())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_status)


def default_workdir() -> str:
    """runs/<name of the config file>."""
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    return "runs/" + path.partition(":")[0].rpartition("/")[2].removesuffix(".py")


if __name__ == "__main__":
    app.run(main)
