"""The one exception that means "the user can fix this": verbs print it as a single line and exit with status 2."""


class UserError(Exception):
    """A mistake in a config, a file or a flag. The message names the thing, its value and what is allowed."""


class Transient(UserError):
    """A failure that may pass, such as a workdir in use: the same command may work later. train.py exits with 1."""


def one_line(error: BaseException) -> str:
    """A library's words, for the end of a message of ours."""
    return " ".join(str(error).split())


def printable(text: str) -> str:
    """`text` for a terminal: control characters, which names and labels of files may hold, become their escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
