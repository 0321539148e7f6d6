"""A run on several sources with weights, from its first step to its report."""

import json
import math

import pytest

from darkformer_jax.errors import UserError
from tests.tiny_runs import metrics_without_time, run, saved_arrays, tiny_config, write_text

NAMES = ("books", "code/*.txt")


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, num_bytes in (("books", 6000), ("code", 3000)):
        (tmp_path / name).mkdir()
        write_text(tmp_path / name / "text.txt", num_bytes)
    return "{}:0.75,{}:0.25".format(*NAMES)


def mixture_config(files, **changes):
    options = {"optimizer__schedule": "constant", "checkpoint__every": 4, "eval__every": 4, "eval__batches": 1}
    return tiny_config(data__files=files, **options | changes)


def test_a_mixture_is_trained_measured_by_source_and_resumed_as_if_unbroken(files, tmp_path, capsys):
    run(mixture_config(files), "unbroken")
    said = capsys.readouterr()
    assert "(books: 75% of the rows, " in said.err and "; code/*.txt: 25% of the rows, " in said.err
    lines = metrics_without_time(tmp_path / "unbroken")
    final = lines[-1]
    for name in NAMES:
        bits = final[f"heldout_bits_per_byte/{name}"]
        assert math.isfinite(bits) and f"{name} {bits:.4f}" in said.out

    run(mixture_config(files, num_steps=4, eval__batches=0), "broken")
    run(mixture_config(files), "broken")
    assert "resuming broken from step 4" in capsys.readouterr().err
    assert saved_arrays(tmp_path / "broken") == saved_arrays(tmp_path / "unbroken")
    trained = [[line for line in of if "loss" in line] for of in (metrics_without_time(tmp_path / "broken"), lines)]
    assert trained[0] == trained[1] and len(trained[0]) == 8 and metrics_without_time(tmp_path / "broken")[-1] == final


def test_other_weights_are_another_experiment(files, tmp_path):
    run(mixture_config(files, num_steps=3), "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for other in (files.replace("0.75", "0.7"), files.replace("code", "books", 1), "books"):
        with pytest.raises(UserError, match=r"run belongs to another experiment; .* data.files: "):
            run(mixture_config(other, num_steps=3), "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["files"] == files
