"""The command line of programs that take a config: --config, its overrides, and flags of their own."""

import difflib
import os
import sys
from collections.abc import Callable

from absl import flags
from ml_collections import config_flags

from darkformer_jax.config.arguments import fields_of_arguments
from darkformer_jax.config.base import fields
from darkformer_jax.errors import UserError, one_line

FLAGS = flags.FLAGS
_HELP = ("?", "help", "helpshort", "helpfull", "helpxml")


def parse_experiment_flags(argv: list[str], default_config: str, define: Callable[[], None]) -> list[str]:
    """Defines and parses --config and what `define` defines; a mistake is one line and exit status 2.

    --help ends the program with status 0.
    """
    try:
        argv = list(map(_with_home, argv))
        define()
        _refuse_sections(argv)
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


def _with_home(argument: str) -> str:
    """The argument, with `~` expanded if it is --config=~/x.py: a shell expands it only at the beginning of a word."""
    flag, _, path = argument.partition("=")
    return f"{flag}={os.path.expanduser(path)}" if flag.lstrip("-") == "config" and path.startswith("~") else argument


def _parse(argv: list[str]) -> list[str]:
    """What absl leaves of `argv`. absl itself ends the program with status 1 after it has printed the help."""
    try:
        return FLAGS(argv)
    except SystemExit:
        if any(argument.startswith("-") and argument.lstrip("-") in _HELP for argument in argv[1:]):
            sys.exit(0)
        raise


def overridden_fields() -> list[str]:
    """The dotted names of the fields that the command line sets, by their names or after the config's colon."""
    arguments = (config_flags.get_config_filename(FLAGS["config"]) or "").partition(":")[2]
    return [*fields_of_arguments(arguments), *config_flags.get_override_values(FLAGS["config"])]


def _quoted_end(error: Exception) -> str:
    """The message of an exception in one line; a traceback that it quotes is cut to its last line."""
    message, traceback, quoted = str(error).partition("Traceback (most recent call last):")
    end = quoted.strip().splitlines()[-1] if traceback else ""
    return one_line(UserError(message + end))


def _refuse_sections(argv: list[str]) -> None:
    """Raises UserError for the first --config.<section>, which config_flags would accept in place of all its fields."""
    for name in _overrides(argv):
        inside = [field for field in fields() if field.startswith(f"{name}.")]
        if inside:
            raise UserError(
                f"--config.{name}: {name} is a section; set its fields one by one, such as --config.{inside[0]}"
            )


def _unknown_field(argv: list[str]) -> str:
    """The message for the first --config.<field> that does not exist, with the closest one that does; "" if all do."""
    for name in _overrides(argv):
        if name not in fields():
            close = difflib.get_close_matches(name, fields(), n=1, cutoff=0.0)[0]
            return f"--config.{name}: there is no such field in the config; did you mean --config.{close}?"
    return ""


def _overrides(argv: list[str]) -> list[str]:
    """What follows `--config.` in the arguments and in the files that --flagfile names, without the values."""
    arguments = FLAGS.read_flags_from_files(argv[1:], force_gnu=False)
    names = [argument.lstrip("-").partition("=")[0] for argument in arguments if argument.startswith("-")]
    return [name.removeprefix("config.") for name in names if name.startswith("config.")]
