from pathlib import Path
from typing import Any

import pytest

from darkformer_jax.data.files import whole_directory, write_atomically
from darkformer_jax.errors import UserError


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_tilde_in_the_name_of_a_new_directory_is_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with whole_directory("~/runs/new") as directory:
        (directory / "config.json").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.json")] == ["runs/new/config.json"]
    with (
        pytest.raises(UserError, match="~nobody-is-called-so/x: there is no such home directory"),
        whole_directory("~nobody-is-called-so/x"),
    ):
        raise AssertionError
