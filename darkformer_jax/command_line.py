"""What the verbs' command lines share."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

from absl import logging
from absl.flags import argparse_flags

from darkformer_jax.errors import UserError


class Parser(argparse_flags.ArgumentParser):
    """Flags of a verb, `python -m darkformer_jax.<verb>`; a mistake in them is one line and exit status 2."""

    def __init__(self, verb: str, description: str | None) -> None:
        super().__init__(
            prog=f"python -m darkformer_jax.{verb}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """One line, as for every other mistake."""
        self.exit(2, f"error: {message} (--help lists the flags)\n")


@contextlib.contextmanager
def one_line_errors(if_interrupted: str) -> Iterator[None]:
    """Ends the program on a UserError with one line and exit status 2, on Ctrl-C with `if_interrupted` and 130.

    SIGTERM is taken as an exception, too, so that what is half written is removed.
    """
    logging.set_verbosity(logging.WARNING)
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\nerror: interrupted; {if_interrupted}", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)
