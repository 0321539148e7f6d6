"""Trains what a config describes; run again with the same --workdir, it resumes.

python train.py                                                          the quickstart: a small model, real text
python train.py --config=configs/lm_1b.py --workdir=runs/lm_1b           another experiment
python train.py --config=configs/ablation.py:attention=performer,m=128   an ablation
python train.py --config=configs/finetune.py:dark --config.init_from=runs/smollm2   a pretrained model, fine-tuned
python train.py --config.optimizer.learning_rate=1e-3 --dry_run          override any field; print sizes and stop
"""

import difflib
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from configs import base
from darkformer_jax.errors import UserError
from darkformer_jax.training.workdir import flat_fields

DEFAULT_CONFIG = str(Path(__file__).parent / "configs" / "quickstart.py")  # from any directory
FLAGS = flags.FLAGS


def parse_flags(argv: list[str]) -> list[str]:
    """Defines and parses the flags; a mistake is one line and exit status 2."""
    try:
        flags.DEFINE_string("workdir", None, "Directory of the run (default: runs/<name of the config file>).")
        flags.DEFINE_bool("dry_run", False, "Print parameters, state size and tokens a step, without training.")
        # In here because a field that does not exist is an exception of the definition already.
        config_flags.DEFINE_config_file("config", DEFAULT_CONFIG, "The experiment; configs/base.py has all fields.")
        rest = FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"{rest[1]!r} is no flag; --help lists them")
        FLAGS.config.to_dict()  # raises OSError where the file could not be loaded
        return rest
    except (UserError, flags.Error, OSError) as error:
        message = one_line(error)
    except SyntaxError as error:
        message = f"--config: {error.filename}: line {error.lineno} is not Python: {error.msg}"
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # how config_flags refuses an override
        message = unknown_field(argv) or one_line(error)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def one_line(error: Exception) -> str:
    """The message of an exception; of one that quotes a traceback, its beginning and its end."""
    message, traceback, quoted = str(error).partition("Traceback (most recent call last):")
    if traceback:
        message += quoted.strip().splitlines()[-1]
    return " ".join(message.split())


def unknown_field(argv: list[str]) -> str:
    """Which --config.<field> of the command line does not exist, and what may have been meant."""
    known = [name for name, _ in flat_fields(base.get_config().to_dict())]
    for argument in argv[1:]:
        name = argument.lstrip("-").partition("=")[0]
        field = name.removeprefix("config.")
        if name != field and field not in known:
            close = difflib.get_close_matches(field, known, n=1, cutoff=0.0)[0]
            return f"--config.{field}: there is no such field in the config; did you mean --config.{close}?"
    return ""


def default_workdir() -> str:
    """runs/<name of the config file>."""
    path = config_flags.get_config_filename(FLAGS["config"]) or DEFAULT_CONFIG
    return "runs/" + path.partition(":")[0].rpartition("/")[2].removesuffix(".py")


def main(argv: list[str]) -> None:
    """Hands the config over; a UserError is one line and exit status 2, a signal 128 + its number."""
    from darkformer_jax.training.loop import Stopped  # in here because --help needs no jax
    from darkformer_jax.training.run import dry_run, run

    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every save
    try:
        if FLAGS.dry_run:
            dry_run(FLAGS.config)
        else:
            run(FLAGS.config, FLAGS.workdir or default_workdir())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, where nothing more can be said about it
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_status)
    except KeyboardInterrupt:
        print("error: interrupted while no step was under way", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
