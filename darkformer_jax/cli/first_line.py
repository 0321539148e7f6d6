"""What a Python file says it is, without importing it."""

import ast
from pathlib import Path


def first_line(path: Path) -> str:
    """The first line of a file's docstring; "" if it has none."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
