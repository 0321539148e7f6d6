"""The title and the conclusion say what the losses by seed allow, and no more."""

import json

import pytest

from configs import ablation
from darkformer_jax.reporting.findings import collect
from tests.test_report import write_calibration, write_labelled_run, write_run

BEST = "has the lowest held-out loss"
CHANCE = "With too few seeds to show a spread, its lead over"
CLEAR = "is more than the spread of the seeds."
WITHIN = "The spread of the seeds does not separate it from"


def found(tmp_path, losses):
    """losses: kind -> losses by seed."""
    for kind, by_seed in losses.items():
        for seed, loss in by_seed.items():
            write_run(tmp_path / f"{kind}-{seed}", loss, f"attention={kind},seed={seed}")
    return collect(f"{tmp_path}/*")


@pytest.mark.parametrize(
    ("softmax", "performer", "said"),
    [
        ({0: 2.0}, {0: 3.0}, f"{CHANCE} performer (+1.0000) may be chance."),
        ({0: 2.0, 1: 2.2}, {0: 3.0}, f"{CHANCE} performer (+1.0000) may be chance."),  # one shared seed
        ({0: 2.0, 1: 2.2, 2: 2.1}, {0: 3.0, 1: 3.3, 2: 3.1}, f"Its lead over performer (+1.0333 ± 0.0333) {CLEAR}"),
        ({0: 2.0, 1: 2.2, 2: 2.1}, {0: 2.1, 1: 2.6, 2: 2.05}, f"{WITHIN} performer (+0.1500 ± 0.1323)."),
        ({0: 2.0, 1: 2.2}, {0: 2.3, 1: 2.6}, f"{WITHIN} performer (+0.3500 ± 0.0500)."),  # 7 errors, but two seeds
        ({0: 2.0, 1: 2.1}, {2: 3.0, 3: 3.3}, f"{WITHIN} performer (+1.1000 ± 0.1581)."),  # other seeds: the widest
        ({0: 2.0, 1: 2.4}, {1: 2.3}, "On the seeds that both have, it is not ahead of performer (-0.1000)."),
    ],
)
def test_a_lead_is_called_what_the_seeds_allow(tmp_path, softmax, performer, said):
    page = found(tmp_path, {"softmax": softmax, "performer": performer})
    assert page.title == "softmax and performer compared as language models"
    assert page.conclusion.startswith(f"softmax (exact) {BEST}: 2.") and said in page.conclusion
    others = {CHANCE, CLEAR, WITHIN} - {text for text in (CHANCE, CLEAR, WITHIN) if text in said}
    assert not any(text in page.conclusion for text in others)


def test_the_conclusion_tells_how_dark_fares_at_its_best(tmp_path):
    write_run(tmp_path / "dark-8", 2.9, "attention=dark,m=8")
    write_run(tmp_path / "performer-8", 2.95, "attention=performer,m=8")
    page = found(tmp_path, {"softmax": {0: 2.0}, "performer": {0: 3.0}, "dark": {0: 2.5}})
    assert "In the row dark, m 64: DARK is below Performer (-0.5000 in held-out loss" in page.conclusion
    assert "It closes 50% of the gap of 1.0000" in page.conclusion and page.conclusion.count("DARK is ") == 1


def test_rows_with_unequal_budgets_are_named_and_long_lists_are_counted(tmp_path):
    kinds = ("softmax", "performer", "dark", "random", "constant", "lfk")
    page = found(tmp_path, {kind: {0: 2.0 + i} for i, kind in enumerate(kinds)})
    assert page.title == "6 attention mechanisms compared as language models"
    listed = "performer (+1.0000), dark (+2.0000), random (control) (+3.0000) and 2 more may be chance."
    assert listed in page.conclusion and "equally many tokens" not in page.conclusion
    config = tmp_path / "lfk-0" / "config.json"
    config.write_text(config.read_text().replace('"batch_size": 8', '"batch_size": 4', 1))
    assert "The rows were not trained on equally many tokens." in collect(f"{tmp_path}/*").conclusion


def test_without_two_rows_there_is_nothing_to_compare(tmp_path):
    write_run(tmp_path / "a", 2.0, "attention=dark", last_step=12)
    page = collect(f"{tmp_path}/*")
    assert page.title == "dark as a language model"
    assert page.conclusion == "No run has finished, so there is nothing to conclude about losses."
    write_run(tmp_path / "b", 2.0, "attention=dark,seed=1")
    page = collect(f"{tmp_path}/*")
    assert page.conclusion == (
        "dark has a held-out loss of 2.0000 nats per token (1 seed); there is nothing to compare it with."
    )


def test_titles_name_the_task_and_what_was_compared(tmp_path):
    (tmp_path / "calibrated").mkdir()
    (tmp_path / "calibrated" / "config.json").write_text(json.dumps(ablation.get_config().to_dict()))
    write_calibration(tmp_path / "calibrated", 0.1, 64)
    assert collect(f"{tmp_path}/*").title == "Calibrated attention"
    for task, kinds in (("classification", "classifiers"), ("regression", "regression models")):
        for m in (8, 16):
            write_labelled_run(tmp_path / task / f"{m}", task, {"loss": 1 / m}, f"attention=dark,m={m}")
        assert collect(f"{tmp_path}/{task}/*").title == f"dark compared as {kinds}"
