"""A run on too little data says so."""

import pytest

from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.classification import Classification
from darkformer_jax.tasks.language_model import LanguageModel
from tests.tasks.labelled_files import labelled_config, write_labelled
from tests.tiny_runs import run, tiny_config, write_text


def warnings(tmp_path, num_bytes, **changes):
    text = write_text(tmp_path / "text.txt", num_bytes)
    config = tiny_config(data__files=text, **changes)  # rows of 32 tokens, 4 of them in each of 8 steps
    return LanguageModel.load(config, Workdir(tmp_path / "run")).warnings


def test_enough_text_has_no_warning(tmp_path):
    assert warnings(tmp_path, 6000) == []


def test_three_bytes_are_a_share_of_a_row_and_seen_at_every_place_of_a_batch(tmp_path):
    assert warnings(tmp_path, 3) == [
        "3 training tokens, 9.4% of one row: each is seen about 32 times in 8 steps",
        "2 held-out tokens, 6.2% of one row: figures on them say little",
    ]


def test_text_that_is_seen_more_than_a_hundred_times_is_learned_by_heart(tmp_path):
    (warning,) = warnings(tmp_path, 6000, num_steps=5000)  # 20,000 rows
    assert warning == "5,717 training tokens, 178.7 rows: each is seen about 112 times in 5,000 steps"
    assert warnings(tmp_path, 6000, num_steps=4000) == []


def test_text_that_fills_no_batch_is_too_little(tmp_path):
    (warning,) = warnings(tmp_path, 6000, batch_size=256)
    assert "178.7 rows: each is seen about 11 times in 8 steps" in warning


def test_a_mixture_names_the_source_that_is_small(tmp_path):
    large, small = write_text(tmp_path / "large.txt"), write_text(tmp_path / "small.txt", 100)
    config = tiny_config(data__files=f"{large}:0.5,{small}:0.5", batch_size=16)
    (warning, *_) = LanguageModel.load(config, Workdir(tmp_path / "run")).warnings
    assert f"training tokens of {small}, 3.0 rows: each is seen about 21 times" in warning


def test_labelled_examples_are_counted_one_by_one(tmp_path):
    few = labelled_config(write_labelled(tmp_path / "few.jsonl", count=20), num_steps=1000)
    training, heldout = Classification.load(few, Workdir(tmp_path / "run")).warnings
    assert training == "13 training examples: each is seen about 308 times in 1,000 steps"
    assert heldout == "7 held-out examples: figures on them say little"
    enough = labelled_config(write_labelled(tmp_path / "enough.jsonl", count=200))
    assert Classification.load(enough, Workdir(tmp_path / "run")).warnings == []


@pytest.mark.standard_promotion
def test_a_run_prints_one_line_before_it_trains(tmp_path, capsys):
    text = write_text(tmp_path / "text.txt", 3)
    run(tiny_config(data__files=text, num_steps=2, optimizer__warmup_steps=0), tmp_path / "run")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert line.startswith("warning: little data: 3 training tokens, 9.4% of one row: each is seen about 8 times")
