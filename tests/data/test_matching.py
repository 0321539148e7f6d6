import os

import pytest

from darkformer_jax.data import matching
from darkformer_jax.data.sources import find_news_files, find_text_files
from darkformer_jax.errors import UserError
from darkformer_jax.reporting.reported_runs import find_workdirs


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The current directory of every test, which is also its user's home."""
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def write(*names):
    for name in names:
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        with open(name, "w") as file:
            file.write(name)


@pytest.mark.parametrize("files", ["plain", "plain/**/*.txt", "plain/**", "**/plain/**/*.txt", "plain,*/a.txt"])
def test_files_behind_links_are_found_once_however_they_are_asked_for(files, here):
    write("plain/a.txt", "plain/sub/b.txt", "elsewhere/deep/c.txt")
    for link, target in (
        ("plain/elsewhere", "../elsewhere"),
        ("plain/again", "sub"),
        ("plain/alias.txt", "a.txt"),
        ("plain/sub/up", ".."),
        ("elsewhere/deep/round", here / "plain"),
    ):
        os.symlink(target, link)
    assert find_text_files(files) == ["plain/a.txt", "plain/elsewhere/deep/c.txt", "plain/sub/b.txt"]


def test_two_loops_of_links_take_no_time_that_grows_with_each_turn():
    write("plain/a.txt")
    for name in "bcdefgh":
        os.symlink(".", f"plain/{name}")
    os.symlink("itself", "plain/itself")
    assert find_text_files("plain") == find_text_files("plain/**/*.txt") == ["plain/a.txt"]
    assert [path for path, _ in matching.directories_below("plain")] == ["plain"]


def test_a_release_may_lie_behind_links():
    write("disk/training/news.en-00001-of-00100", "disk/heldout-x/news.en-00000-of-00100")
    os.symlink("disk", "release")
    os.mkdir("data")
    os.symlink("../disk/training", "data/training")
    assert find_news_files("release") == ["release/training/news.en-00001-of-00100"]
    assert find_news_files("data") == ["data/training/news.en-00001-of-00100"]


@pytest.mark.parametrize("files", ["plain", "plain/**/*.txt", "plain/*/*.txt", "plain/*/b.txt", "plain/locked/*.txt"])
def test_a_folder_that_cannot_be_read_is_named(files, monkeypatch):
    write("plain/a.txt", "plain/open/b.txt", "plain/locked/b.txt")

    def locked(function):  # permissions do not bind root
        def call(path=".", **options):
            if "locked" in str(path) and (function is not os.lstat or not str(path).endswith("locked")):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, **options)

        return call

    for name in ("scandir", "listdir", "lstat"):
        monkeypatch.setattr(os, name, locked(getattr(os, name)))
    with pytest.raises(UserError, match="cannot read plain/locked.*: Permission denied"):
        find_text_files(files)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ("a[1].txt", ["a[1].txt"]),
        ("a[0-9].txt", ["a1.txt"]),
        ("a[[]1].txt", ["a[1].txt"]),
        ("b, c.txt", ["b, c.txt"]),
        ("b, c.txt, a[1].txt,a1.txt", ["a1.txt", "a[1].txt", "b, c.txt"]),
        ("a1.txt,b, c.txt,b?", ["a1.txt", "b, c.txt", "b?/*.txt"]),
        ("d[2]/*.txt", ["d[2]/e.txt"]),
        ("d[2]", ["d[2]/e.txt"]),
        ("b?/*.txt", ["b?/*.txt"]),
        ("?[[]?].txt,,", ["a[1].txt"]),
        ("./*1.txt,a1.txt,.//a1.txt", ["a1.txt"]),
        ("./b*/*.txt,a1.txt", ["a1.txt", "./b?/*.txt"]),
        ("link/../x.txt", ["link/../x.txt"]),
        (".hidden/*.txt", [".hidden/e.txt"]),
        ("*/e.txt", ["d[2]/e.txt"]),
        ("b,*.txt", ["b, c.txt"]),
        ("a1.txt,b,*.txt", ["a1.txt", "b, c.txt"]),
        ("b,*.txt,a1.txt", ["a1.txt", "b, c.txt"]),
        ("a?.txt,b,*.txt,a[1].txt", ["a1.txt", "a[1].txt", "b, c.txt"]),
        ("~/b,*.txt", ["{home}/b, c.txt"]),
        ("~/a1.txt", ["{home}/a1.txt"]),
        ("~/d[2]/*.txt, ~/b, c.txt", ["{home}/b, c.txt", "{home}/d[2]/e.txt"]),
    ],
)
def test_a_name_that_exists_comes_before_a_list_and_a_glob(files, found, here):
    write("a[1].txt", "a1.txt", "b, c.txt", "d[2]/e.txt", "b?/*.txt", ".hidden/e.txt")
    write("other/x.txt", "other/target/y.txt", "x.txt")
    os.symlink("other/target", "link")
    assert find_text_files(files) == [path.format(home=here) for path in found]


def test_runs_are_found_by_the_same_rules(here):
    write("runs/m[1], x/config.json", "runs/m1/config.json", "runs/notes.txt")
    assert find_workdirs("runs/m[1], x,runs/m1") == ["runs/m[1], x", "runs/m1"]
    assert find_workdirs("~/runs/*") == [f"{here}/runs/m1", f"{here}/runs/m[1], x"]
    for nothing in ("runs/m[3]", "runs/*.txt", "runs/m2"):
        with pytest.raises(UserError, match="no run matches"):
            find_workdirs(nothing)


def test_a_glob_of_names_with_commas_may_have_a_weight(here):
    write("a,1.txt", "a,2.txt", "c.txt")
    found = matching.weighted_entries("a,*.txt:0.7,c.txt:0.3")
    assert [(name, float(weight)) for name, weight in found] == [("a,*.txt", 0.7), ("c.txt", 0.3)]


def test_a_name_between_commas_that_matches_nothing_is_said_to_be_one_of_several(here):
    write("c.txt")
    with pytest.raises(UserError, match=r"^no file matches 'a' \(one of 3 names between commas\)$"):
        find_text_files("a,b*.txt,c.txt")
    with pytest.raises(UserError, match=r"^no file matches 'a\*.txt'$"):
        find_text_files("a*.txt")


@pytest.mark.parametrize("files", ["a1.txt,gs://bucket/x.txt", "~nobody-is-called-so/x.txt"])
def test_urls_and_unknown_homes_are_refused(files):
    with pytest.raises(UserError, match="is not a local path|there is no such home directory"):
        find_text_files(files)
