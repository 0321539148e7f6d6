"""docs/architecture.md names files and functions: they are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text()
PLACES = sorted(set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)(?::(\w+))?`", PAGE)))


def names_in(path):
    tree = ast.parse(path.read_text())
    definitions = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, definitions)}


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_what_the_map_names_is_there(file, name):
    places = [path for path in (ROOT / "darkformer_jax" / file, ROOT / file) if path.is_file()]
    assert places, f"{file} is neither in the package nor at the root"
    assert not name or name in names_in(places[0]), f"{file} has no {name}"


def test_the_map_names_many_places():
    assert len(PLACES) > 40


def test_the_table_of_floors_has_every_folder():
    folders = {path.name for path in (ROOT / "darkformer_jax").iterdir() if (path / "__init__.py").is_file()}
    table = PAGE.partition("## Layers of the package")[2].partition("## Symbols")[0]
    assert folders == set(re.findall(r"^\| \d \| `([a-z_]+)/`", table, re.MULTILINE))
