"""docs/architecture.md names files and functions: they are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text()
PLACES = sorted(set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)(?::([\w.]+))?`", PAGE)))


def names_in(path):
    tree = ast.parse(path.read_text())
    definitions = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, definitions)}


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_what_the_map_names_is_there(file, name):
    places = [path for path in (ROOT / "darkformer_jax" / file, ROOT / file) if path.is_file()]
    assert places, f"{file} is neither in the package nor at the root"
    missing = set(filter(None, name.split("."))) - names_in(places[0])
    assert not missing, f"{file} has no {missing}"


def imports_of(path):
    """The modules that a file imports by name, and the packages that it imports names from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def test_no_module_of_the_library_imports_the_packages_root():
    """The root imports `ops/`, and `lint-imports` puts the root on no floor."""
    files = sorted((ROOT / "darkformer_jax").rglob("*.py"))
    assert len(files) > 100
    for path in files:
        if path.parent.name == "remote_code":  # a package of its own, in the directory of an export
            continue
        roots = [name for name in imports_of(path) if name == "darkformer_jax" or name.startswith(".")]
        assert not roots, f"{path} imports {roots}"


def test_the_map_names_many_places():
    assert len(PLACES) > 40


def test_the_table_of_floors_has_every_folder():
    folders = {path.name for path in (ROOT / "darkformer_jax").iterdir() if (path / "__init__.py").is_file()}
    table = PAGE.partition("## Floors")[2].partition("## Symbols")[0]
    assert folders == set(re.findall(r"^\| \d \| `([a-z_]+)/`", table, re.MULTILINE))
