import json

import pytest

from darkformer_jax.errors import UserError
from darkformer_jax.reporting.probed import find_probes
from tests.test_report import run_report
from tests.tiny_runs import tiny_config


def entry(probe, place, figures, fingerprint="same", at=None):
    return {
        "probe": probe,
        "at": at or f"{place:,}",
        "place": place,
        "rows": 4,
        "fingerprint": fingerprint,
        "figures": {name: {"mean": mean, "standard_error": 0.25} for name, mean in figures.items()},
    }


def write_probes(workdir, *entries, name="probes.json", step=0):
    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(tiny_config().to_dict()))
    (workdir / name).write_text(json.dumps({"step": step, "probes": entries}))


def copied(place, nats, **options):
    return entry("copy", place, {"second_copy": nats, "first_copy": 4.0, "gain": 4 - nats, "accuracy": 0.5}, **options)


@pytest.fixture
def two(tmp_path):
    right = {name: {"right": share} for name, share in (("exact", 1.0), ("dark", 0.5))}
    for name, nats in (("exact", 0.5), ("dark", 3.5)):
        octaves = [entry("positions", last, {"bits_per_token": nats + last / 1e4}, at=at)
                   for at, last in (("0-255", 255), ("256-511", 511))]  # fmt: skip
        write_probes(tmp_path / name, copied(1024, nats + 0.25), copied(512, nats), entry("classes", 0, right[name]))
        write_probes(tmp_path / name, *octaves, name="probes-positions.json")
    return tmp_path


def test_models_stand_beside_each_other_by_distance(two):
    result = run_report(f"{two}/exact,{two}/dark", two / "out")
    page = (two / "out" / "report.md").read_text()
    assert page.startswith("# Language models, probed\n")
    assert (
        f"""| distance | model | second copy, nats | first copy, nats | gain, nats | accuracy |
| --- | --- | ---: | ---: | ---: | ---: |
| 512 | {two}/exact | 0.500 ± 0.250 | 4.000 ± 0.250 | 3.500 ± 0.250 | 50 ± 25% |
| 512 | {two}/dark | 3.500 ± 0.250 | 4.000 ± 0.250 | 0.500 ± 0.250 | 50 ± 25% |
| 1,024 | {two}/exact | 0.750 ± 0.250 |"""
        in page
    )
    assert (
        f"| position | model | bits per token |\n| --- | --- | ---: |\n| 0-255 | {two}/exact | 0.525 ± 0.250 |" in page
    )
    assert f"| 0 | {two}/dark | 50 ± 25% |" in page
    assert [(one["probe"], one["at"]) for one in result["probes"]][:4:2] == [("copy", "512"), ("copy", "1,024")]
    assert result["probes"][1]["figures"]["second_copy"] == {"mean": 3.5, "standard_error": 0.25}


def test_a_probe_with_several_distances_has_a_picture_with_a_line_per_model(two):
    run_report(f"{two}/exact,{two}/dark", two / "out")
    assert {path.name for path in (two / "out").glob("*.png")} == {"probe_copy.png", "probe_positions.png"}
    page = (two / "out" / "report.md").read_text()
    assert f"{two}/dark: lowest 3.5 at 512, 3.75 at 1024." in page.replace("\\", "")
    (copy, classes, positions) = find_probes([str(two / "exact"), str(two / "dark")])
    assert [(line.label, [x for x, _ in line.points]) for line in copy.lines] == [
        (str(two / "exact"), [512, 1024]),
        (str(two / "dark"), [512, 1024]),
    ]
    assert not classes.lines and positions.axes[0] == "last position of the octave"


def test_rows_that_differ_are_not_compared(two):
    write_probes(two / "other", copied(512, 1.0, fingerprint="other"))
    with pytest.raises(UserError, match=r"exact/probes.json and .*other/probes.json asked copy at 512 with other rows"):
        run_report(f"{two}/exact,{two}/other", two / "out")


def test_two_figures_of_one_model_are_refused_and_two_steps_are_two_models(two):
    write_probes(two / "exact", copied(512, 1.0), name="probes2.json")
    with pytest.raises(UserError, match=r"probes.json and .*probes2.json both have copy at 512; allowed: one of them"):
        run_report(f"{two}/exact", two / "out")
    write_probes(two / "exact", copied(512, 1.0), name="probes2.json", step=9)
    names = {one.model for table in find_probes([str(two / "exact")]) for one in table.entries}
    assert names == {f"{two}/exact step 0", f"{two}/exact step 9"}


@pytest.mark.parametrize(
    "content", ["{}", '{"probes": [1]}', '{"probes": [{"probe": "copy"}]}', '{"step": 0, "loss": 1.0}']
)
def test_a_foreign_file_is_named(two, content):
    (two / "exact" / "probes.json").write_text(content)
    with pytest.raises(UserError, match=r"exact/probes.json is not what evaluate --probes --json writes"):
        run_report(f"{two}/exact", two / "out")


def test_a_figure_that_is_no_number_is_refused(two):
    write_probes(two / "exact", copied(512, float("nan")))
    with pytest.raises(UserError, match=r"exact/probes.json is not what evaluate"):
        run_report(f"{two}/exact", two / "out")
