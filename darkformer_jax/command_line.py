"""What the verbs' command lines share."""

from typing import NoReturn

from absl.flags import argparse_flags


class Parser(argparse_flags.ArgumentParser):
    """Flags of a verb, `python -m darkformer_jax.<verb>`; a mistake in them is one line and exit status 2."""

    def error(self, message: str) -> NoReturn:
        """One line, as for every other mistake."""
        self.exit(2, f"error: {message} (--help lists the flags)\n")
