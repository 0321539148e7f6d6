"""What a wheel holds: all that the library needs where there is no clone."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "darkformer_jax"


def test_the_wheel_has_every_file_of_the_package(tmp_path):
    source = tmp_path / "source"
    # Of a copy, because a build leaves files beside setup.py.
    shutil.copytree(ROOT / PACKAGE, source / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", f"--wheel-dir={tmp_path}"]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", *options, str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith(f"{PACKAGE}/")}
    files = {path.relative_to(source).as_posix() for path in (source / PACKAGE).rglob("*") if path.is_file()}
    assert files <= packed, files - packed
    assert {f"{PACKAGE}/py.typed", f"{PACKAGE}/reporting/page.md.jinja"} < packed
