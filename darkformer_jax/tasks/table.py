"""Tables for people to read."""

from collections.abc import Sequence


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line per row, of which the first is the head: words on the left, figures on the right of their columns."""
    words, *figures = (max(map(len, column)) for column in zip(*rows, strict=True))
    return ["   ".join([row[0].ljust(words), *map(str.rjust, row[1:], figures)]) for row in rows]
