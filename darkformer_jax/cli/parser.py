"""What the verbs' command lines share."""

import argparse
import contextlib
import difflib
import signal
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from absl import logging
from absl.flags import argparse_flags

from darkformer_jax.cli.progress import end_bars
from darkformer_jax.config.fields import whole_number
from darkformer_jax.distributed.libtpu import quiet_libtpu
from darkformer_jax.distributed.platform import jax_does_not_start
from darkformer_jax.errors import UserError, one_line, printable

_INTERRUPTING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # USR1: Slurm, before the end


def command_of(verb: str) -> str:
    """The command that runs a verb, as the user began it."""
    own = f"darkformer {verb}"
    return own if sys.argv[0] == own else f"python -m darkformer_jax.{verb}"


def whole(text: str) -> int:
    """A flag's whole number, in digits or as 1e3 or 1_000: the `type` of an argument."""
    try:
        return whole_number(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from error


class Parser(argparse_flags.ArgumentParser):
    """Flags of a verb, `darkformer <verb>` or `python -m darkformer_jax.<verb>`; a mistake is one line and status 2."""

    def __init__(self, verb: str, description: str | None) -> None:
        super().__init__(
            prog=command_of(verb),
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._given: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, whose `parse_args` calls it. It keeps the arguments, to say which of them is unknown."""
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def print_help(self, file: Any = None) -> None:
        """As argparse's, which does not say where the help cannot be written."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        """Prints one line and exits with status 2, as for every other mistake.

        argparse misses a flag that is required before it minds one that is misspelt: then the line names both.
        """
        unknown = message.partition("unrecognized arguments: ")[2].partition("=")[0].split(" ")[0]
        if not unknown:
            flags = [text.partition("=")[0] for text in self._given if text.startswith("--") and text != "--"]
            unknown = next((flag for flag in flags if flag not in self._option_string_actions), "")
            message += f"; {unknown} is none of its flags" if unknown else ""
        close = difflib.get_close_matches(unknown, self._option_string_actions, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        self.exit(2, f"error: {message}{meant} (--help lists the flags)\n")


@contextlib.contextmanager
def one_line_errors(if_interrupted: str) -> Iterator[None]:
    """Ends the program with one line: status 2 on a UserError, `if_interrupted` and status 130 on Ctrl-C.

    SIGTERM, SIGUSR1 and a closed terminal count as Ctrl-C, so that half-written files are removed. Status 2 is also
    that of too little memory, because fewer or shorter rows need less.
    """
    logging.set_verbosity(logging.WARNING)
    quiet_libtpu()
    # A signal that is ignored, such as SIGHUP under nohup, stays ignored.
    heard = [number for number in _INTERRUPTING if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _interrupt) for number in heard}
    try:
        yield
    except UserError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, _Interrupted) else signal.SIGINT
        _fail(f"interrupted; {if_interrupted}", 128 + number)
    except OSError:  # `lost_output_is_no_crash` has the words for it
        end_bars()
        raise
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and (line := jax_does_not_start(error)):
            _fail(line, 2)
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _fail(f"out of memory; use fewer or shorter rows: {one_line(error)[:200]}", 2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_utf8(text: str) -> bool:
    """Whether the value of a flag is: Python keeps bytes that it cannot decode as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


class _Interrupted(KeyboardInterrupt):
    """A signal that asks the program to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _interrupt(number: int, _: object) -> NoReturn:
    raise _Interrupted(number)


def _fail(message: str, status: int) -> NoReturn:
    end_bars()
    begin = "\n" if sys.stderr.isatty() else ""  # below a progress bar or half a text
    print(f"{begin}error: {printable(message)}", file=sys.stderr)
    sys.exit(status)
