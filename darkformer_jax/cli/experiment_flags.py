"""The command line of programs that take a config: --config, its overrides, and flags of their own."""

import difflib
import sys
from collections.abc import Callable

from absl import flags
from ml_collections import config_flags

from darkformer_jax.config import base
from darkformer_jax.config.fields import flat_fields
from darkformer_jax.errors import UserError, one_line

FLAGS = flags.FLAGS
_HELP = ("?", "help", "helpshort", "helpfull", "helpxml")


def parse_experiment_flags(argv: list[str], default_config: str, define: Callable[[], None]) -> list[str]:
    """Defines and parses --config and what `define` defines; a mistake is one line and exit status 2.

    --help ends the program with status 0.
    """
    try:
        define()
        # Inside the try, because the definition already raises for a field that does not exist.
        config_flags.DEFINE_config_file("config", default_config, "The experiment; config/base.py lists all fields.")
        rest = _parse(argv)
        if len(rest) > 1:
            raise UserError(f"{rest[1]!r} is no flag; --help lists them")
        FLAGS.config.to_dict()  # raises OSError where the file could not be loaded
        return rest
    except (UserError, flags.Error, OSError) as error:
        message = _quoted_end(error)
    except ImportError as error:
        message = f"--config: {one_line(error)}"
    except SyntaxError as error:
        message = f"--config: {error.filename}: line {error.lineno} is not Python: {error.msg}"
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # how config_flags refuses an override
        message = _unknown_field(argv) or _quoted_end(error)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _parse(argv: list[str]) -> list[str]:
    """What absl leaves of `argv`. absl itself ends the program with status 1 after it has printed the help."""
    try:
        return FLAGS(argv)
    except SystemExit:
        if any(argument.startswith("-") and argument.lstrip("-") in _HELP for argument in argv[1:]):
            sys.exit(0)
        raise


def overridden_fields() -> list[str]:
    """The dotted names of the fields that the command line sets."""
    return list(config_flags.get_override_values(FLAGS["config"]))


def _quoted_end(error: Exception) -> str:
    """The message of an exception in one line; a traceback that it quotes is cut to its last line."""
    message, traceback, quoted = str(error).partition("Traceback (most recent call last):")
    end = quoted.strip().splitlines()[-1] if traceback else ""
    return one_line(UserError(message + end))


def _unknown_field(argv: list[str]) -> str:
    """The message for the first --config.<field> that does not exist, with the closest one that does; "" if all do."""
    known = [name for name, _ in flat_fields(base.get_config().to_dict())]
    for argument in argv[1:]:
        name = argument.lstrip("-").partition("=")[0]
        field = name.removeprefix("config.")
        if name != field and field not in known:
            close = difflib.get_close_matches(field, known, n=1, cutoff=0.0)[0]
            return f"--config.{field}: there is no such field in the config; did you mean --config.{close}?"
    return ""
