"""The command line of verbs that take a config: --config, its overrides, and flags of their own."""

import argparse
import difflib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from darkformer_jax.cli.experiments import experiments, find_experiment
from darkformer_jax.cli.parser import command_of
from darkformer_jax.config import base
from darkformer_jax.config.arguments import fields_of_arguments, fit_warmup
from darkformer_jax.config.base import fields
from darkformer_jax.config.fields import whole_number
from darkformer_jax.config.names import meant
from darkformer_jax.config.validation import from_json
from darkformer_jax.errors import Transient, UserError, one_line

FLAGS = flags.FLAGS
_WORKDIR = ("output_dir", "output", "out", "out_dir", "outdir", "save_dir", "log_dir", "logdir", "run_dir")
_RESUME = ("resume", "resume_from", "resume_from_checkpoint", "restore")
_HELP = ("?", "h", "help", "helpshort", "helpfull", "helpxml")


def parse_experiment_flags(
    argv: list[str], verb: str, description: str | None, default_config: str, define: Callable[[], None]
) -> list[str]:
    """Defines and parses --config and what `define` defines; a mistake is one line and exit status 2.

    --help prints the description, the flags and the experiments, and ends the program with status 0.
    """
    others = set(FLAGS)
    define()
    if any(argument.lstrip("-") in _HELP for argument in argv[1:] if argument.startswith("-")):
        print(_help(verb, description, default_config, sorted(set(FLAGS) - others)))
        sys.exit(0)
    try:
        argv = _with_config_found(argv[:1] + FLAGS.read_flags_from_files(argv[1:], force_gnu=False))
        _refuse_forgotten_values(argv)
        _refuse_sections(argv)
        argv = _with_numbers_read(argv)
        # Inside the try, because the definition already raises for a field that does not exist.
        saved = _saved_config(argv) if "workdir" in FLAGS else None
        if saved is None:
            config_flags.DEFINE_config_file("config", default_config, "The experiment.", sys_argv=argv)
        else:
            config_flags.DEFINE_config_dict("config", saved, "The config of the run.", sys_argv=argv)
        rest = FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"{rest[1]!r} is no flag; --help lists them")
        FLAGS.config.to_dict()  # raises OSError where the file could not be loaded
        if "workdir" not in FLAGS:  # a run's is fitted once it is known whether it has begun
            _fit_warmup(FLAGS.config)
        return rest
    except flags.UnrecognizedFlagError as error:
        message = _unknown_flag(error.flagname, sorted(set(FLAGS) - others))
    except Transient as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except (UserError, flags.Error, OSError) as error:
        message = _needless_arguments(argv, error) or _quoted_end(error)
    except ImportError as error:
        message = f"--config: {one_line(error)}"
    except SyntaxError as error:
        message = f"--config: {error.filename}: line {error.lineno} is not Python: {error.msg}"
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # how config_flags refuses an override
        message = _unknown_fields(argv) or _quoted_end(error)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _fit_warmup(config: ml_collections.ConfigDict) -> None:
    """Shortens the experiment's warm-up if the command line asks for a run that is no longer, and says so."""
    if said := fit_warmup(config, config_flags.get_override_values(FLAGS["config"])):
        print(f"note: {said}", file=sys.stderr)


def fields_file() -> str:
    """Where the fields are declared: a path from here if it is below, else a whole one."""
    path = Path(base.__file__)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _help(verb: str, description: str | None, default_config: str, names: list[str]) -> str:
    """The text of --help, in the form that the other verbs' has."""
    width = max(map(len, experiments()))
    known = "\n".join(f"  {name:{width}}  {line}" for name, line in experiments().items())
    parser = argparse.ArgumentParser(
        prog=command_of(verb),
        description=description,
        epilog=f"experiments:\n{known}\n\nfields: {fields_file()} has them all, with meaning and range.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE[:ARGUMENTS]", help=f"the experiment (default: {default_config})")
    parser.add_argument("--config.<field>", metavar="VALUE", help="overrides a field: --config.model.qk_norm=True")
    for name in names:
        flag = FLAGS[name]
        default = "" if flag.default in (None, False) else f" (default: {flag.default})"
        kind: dict[str, Any] = {"action": "store_true"} if flag.boolean else {"metavar": name.upper()}
        parser.add_argument(f"--{name}", help=f"{flag.help.rstrip('.')}{default}", **kind)
    return parser.format_help()


def _with_config_found(argv: list[str]) -> list[str]:
    """`argv` with the file of --config as `find_experiment` finds it. Raises UserError if it finds none."""
    found = list(argv)
    for place, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            if equals:
                found[place] = f"{name}={find_experiment(value)}"
            elif place + 1 < len(argv):
                found[place + 1] = find_experiment(argv[place + 1])
    return found


def _with_numbers_read(argv: list[str]) -> list[str]:
    """`argv` with whole numbers in digits, as config_flags reads them. Raises UserError for all wrong values."""
    read, wrong = list(argv), []
    for place, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        name = flag.lstrip("-").removeprefix("config.")
        kind = type(fields()[name].default) if name in fields() and "config." in flag else str
        is_apart = not equals and kind is not bool  # --config.num_steps 100
        if kind not in (int, float, bool) or not (equals or (is_apart and place + 1 < len(argv))):
            continue
        value = argv[place + 1] if is_apart else value
        try:
            parsed = fields()[name].parse(value)
        except ValueError as error:
            wrong.append(f"--config.{name}={value}: {error}")
            continue
        if kind is int:
            read[place + is_apart] = str(parsed) if is_apart else f"{flag}={parsed}"
    if wrong:
        raise UserError("; ".join(wrong))
    return read


class WholeNumber(flags.IntegerParser):
    """A flag's whole number, in digits or as 1e3 or 1_000."""

    def convert(self, argument: Any) -> int:
        """The number. Raises ValueError for other texts, in words."""
        try:
            return whole_number(str(argument))
        except ValueError as error:
            raise ValueError("must be a whole number") from error


def define_whole_number(name: str, default: int | None, about: str, **bounds: int) -> None:
    """Defines a flag. bounds: lower_bound, upper_bound."""
    flags.DEFINE(WholeNumber(**bounds), name, default, about, serializer=flags.ArgumentSerializer())


def config_file() -> str | None:
    """The file of --config, or the default one, with its arguments; None = the config is that of the workdir."""
    name = config_flags.get_config_filename(FLAGS["config"])
    return name if isinstance(name, str) else None


def _saved_config(argv: list[str]) -> ml_collections.ConfigDict | None:
    """The config of the run in --workdir if it has begun and there is no --config, else None.

    Raises UserError if its config.json cannot be read.
    """
    given = {}
    for argument, following in itertools.pairwise([*argv[1:], ""]):
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config", "--workdir", "-workdir"):
            given[flag.lstrip("-")] = value if equals else following
    if "config" in given or not given.get("workdir"):
        return None
    from darkformer_jax.runs.workdir import Workdir  # in here for a quick --help

    workdir = Workdir(given["workdir"])
    return from_json(workdir.read_config()) if workdir.has_trained else None


def overridden_fields() -> list[str]:
    """The dotted names of the fields that the command line sets, by their names or after the config's colon."""
    arguments = (config_file() or "").partition(":")[2]
    return [*fields_of_arguments(arguments), *config_flags.get_override_values(FLAGS["config"])]


def _quoted_end(error: Exception) -> str:
    """The message of an exception in one line; a traceback that it quotes is cut to its last line."""
    message, traceback, quoted = str(error).partition("Traceback (most recent call last):")
    end = quoted.strip().splitlines()[-1] if traceback else ""
    return one_line(UserError(message + end))


def _refuse_forgotten_values(argv: list[str]) -> None:
    """Raises UserError for a text's flag that is followed by another flag, which absl would take as its value."""
    for argument, following in itertools.pairwise(argv[1:]):
        name = argument.lstrip("-")
        own = name in FLAGS and isinstance(FLAGS[name].value, str | None) and not FLAGS[name].boolean
        field = fields().get(name.removeprefix("config.")) if name.startswith("config.") else None
        is_text = own or (field is not None and isinstance(field.default, str | tuple))  # a tuple: of texts
        if argument.startswith("-") and is_text and following.startswith("--"):
            raise UserError(
                f"{argument} {following}: {argument} has no value; to give this one, write {argument}={following}"
            )


def _refuse_sections(argv: list[str]) -> None:
    """Raises UserError for the first --config.<section>, which config_flags would accept in place of all its fields."""
    for name in _overrides(argv):
        inside = [field for field in fields() if field.startswith(f"{name}.")]
        if inside:
            raise UserError(
                f"--config.{name}: {name} is a section; set its fields one by one, such as --config.{inside[0]}"
            )


def _unknown_fields(argv: list[str]) -> str:
    """The message for every --config.<field> that does not exist, with what may have been meant; "" if all do."""
    unknown = [name for name in dict.fromkeys(_overrides(argv)) if name not in fields()]
    hints = [meant(name) or f"{fields_file()} has all fields" for name in unknown]
    return "; ".join(
        f"--config.{name}: there is no such field in the config; {hint}"
        for name, hint in zip(unknown, hints, strict=True)
    )


def _unknown_flag(name: str, own: list[str]) -> str:
    """The message for a flag that is neither a verb's own nor --config.<field>. own: the verb's flags."""
    close = difflib.get_close_matches(name.replace("-", "_"), own, n=1, cutoff=0.75)
    hint = f"did you mean --{close[0]}?" if close else meant(name)
    if "workdir" in own and name in _WORKDIR:
        hint = "did you mean --workdir?"
    if "workdir" in own and name in _RESUME:
        hint = "a run resumes by itself: give its --workdir"
    return f"--{name}: there is no such flag; {hint or '--help lists them'}"


def _needless_arguments(argv: list[str], error: Exception) -> str:
    """The message if an experiment without arguments got some, else ""."""
    if "get_config() takes 0 positional arguments" not in str(error):
        return ""
    given = next((argument for argument in argv if argument.lstrip("-").startswith("config=")), "--config")
    return f"{given.partition(':')[0]} takes no arguments after a colon; --config.<field>=<value> sets one"


def _overrides(argv: list[str]) -> list[str]:
    """What follows `--config.` in the arguments and in the files that --flagfile names, without the values."""
    arguments = FLAGS.read_flags_from_files(argv[1:], force_gnu=False)
    names = [argument.lstrip("-").partition("=")[0] for argument in arguments if argument.startswith("-")]
    return [name.removeprefix("config.") for name in names if name.startswith("config.")]
