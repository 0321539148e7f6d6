"""What a wheel holds: all that the library needs where there is no clone."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import darkformer_jax
from darkformer_jax.__main__ import verbs
from darkformer_jax.cli.experiments import experiments, find_experiment
from darkformer_jax.errors import UserError

ROOT = Path(__file__).parents[1]
PACKAGE = "darkformer_jax"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy, because a build leaves files beside setup.py."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in (PACKAGE, "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", f"--wheel-dir={folder}"]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", *options, str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A directory with what the wheel holds, to be put before everything else on the path."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_has_every_file_of_the_package(site):
    files = {path.relative_to(ROOT) for path in (ROOT / PACKAGE).rglob("*") if path.is_file()}
    files = {path for path in files if "__pycache__" not in path.parts}
    missing = {path for path in files if not (site / path).is_file()}
    assert not missing and {Path(PACKAGE, "py.typed"), Path(PACKAGE, "reporting/page.md.jinja")} < files


def test_an_installed_package_brings_the_command_and_the_experiments(site, tmp_path):
    (scripts,) = site.glob("*.dist-info/entry_points.txt")
    assert "darkformer = darkformer_jax.__main__:main" in scripts.read_text()

    def darkformer(*arguments):
        program = f"import sys; sys.path.insert(0, {str(site)!r}); from darkformer_jax.__main__ import main; main()"
        command = [sys.executable, "-P", "-c", program, *arguments]
        environment = {"PATH": "", "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)

    (metadata,) = site.glob("*.dist-info/METADATA")
    version = re.search(r"^Version: (.+)$", metadata.read_text(), re.MULTILINE)[1]
    said = darkformer("--version")
    assert said.returncode == 0 and said.stdout.startswith(f"darkformer_jax {version}, jax "), said.stderr
    shown = darkformer("train", "--help")
    (fields,) = re.findall(r"^fields: (.+) has them all", shown.stdout, re.MULTILINE)
    assert fields == f"{site}/darkformer_jax/config/base.py" and Path(fields).is_file()
    for verb in ("train", "generate"):
        said = darkformer(verb, "--help")
        assert said.returncode == 0 and f"usage: darkformer {verb}" in said.stdout, said.stderr
    planned = darkformer("train", "--config=configs/paper.py:pretrain,steps=70", "--dry_run")  # it imports two others
    assert planned.returncode == 0 and "steps          70\n" in planned.stdout, planned.stderr


def test_every_module_at_the_root_is_a_verb_that_says_what_it_does():
    assert "train" in verbs() and all(verbs().values())
    assert "errors" not in verbs()


def test_an_experiment_is_looked_for_here_and_then_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_experiment("configs/ablation.py:m=8") == f"{ROOT}/configs/ablation.py:m=8"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/ablation.py").touch()
    assert find_experiment("configs/ablation.py:m=8") == "configs/ablation.py:m=8"
    with pytest.raises(UserError, match=r"--config=configs/lm1b.py: there is no such file; did you mean configs/lm_1b"):
        find_experiment("configs/lm1b.py")


def test_every_experiment_says_what_it_is():
    assert len(experiments()) >= 7 and all(experiments().values())


def test_the_package_says_its_version():
    assert darkformer_jax.__version__ == importlib.metadata.version("darkformer_jax")
