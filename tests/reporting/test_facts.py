"""Data, size, speed, machine, version and time of runs, also of earlier ones that did not record them."""

import json

import pytest

from darkformer_jax.errors import UserError
from darkformer_jax.reporting.facts import NOT_RECORDED, NUMBERS, common_facts, read_facts, shown_median

CONFIG = {"data": {"source": "text", "files": "a/*.txt", "tokenizer": "bpe:512"}}
LINES = [{"step": step, "time": {"tokens_per_second": speed}} for step, speed in ((1, 900.0), (2, 1100.4), (3, 1.0))]
RUN = {"parameters": 1_234_567, "trained": 1_234_567, "data": "9,000 training tokens", "hardware": "8 x TPU v5e"}
DAY = 86400.0


def session(began, ended, facts=None):
    account = {"began": began, "ended": ended, "first_step": 0, "last_step": 9, "seconds": {"steps": 1.0}}
    return account | ({"facts": RUN | {"version": "darkformer_jax 1"} | facts} if facts is not None else {})


def shown(workdir, *sessions, lines=LINES):
    if sessions:
        (workdir / "sessions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sessions))
    return read_facts(str(workdir), CONFIG, lines).shown


def test_what_a_run_recorded_is_shown(tmp_path):
    assert shown(tmp_path, session(DAY, DAY + 90, {})) == {
        "data": "text a/*.txt, tokenizer bpe:512; 9,000 training tokens",
        "hardware": "8 x TPU v5e",
        "version": "darkformer_jax 1",
        "date": "1970-01-02",
        "parameters": "1,234,567",
        "tokens/s": "900",
        "wall time": "1.5 min",
    }


def test_a_run_of_several_starts_names_each_machine_and_adds_their_time(tmp_path):
    starts = (session(0, 3600, {}), session(DAY, DAY + 7200, {"hardware": "1 x H100"}), session(3 * DAY, 3 * DAY, {}))
    facts = shown(tmp_path, *starts)
    assert facts["hardware"] == "8 x TPU v5e, then 1 x H100" and facts["version"] == "darkformer_jax 1"
    assert facts["wall time"] == "3.0 h in 3 starts" and facts["date"] == "1970-01-01 to 1970-01-04"


def test_a_median_leaves_out_what_is_not_known_and_has_its_unit():
    assert shown_median([3.0 * 2**30, None, 2.0 * 2**30], "{:.2f} GiB", 2**30) == "2.50 GiB"
    assert shown_median([None], "{:.2f} GiB", 2**30) == NOT_RECORDED


def test_frozen_parameters_are_told_apart(tmp_path):
    assert shown(tmp_path, session(0, 1, {"trained": 5}))["parameters"] == "1,234,567, of which 5 trained"


def test_what_earlier_versions_did_not_record_is_called_that(tmp_path):
    facts = shown(tmp_path, lines=[{"step": 1, "loss": 2.0}])
    assert facts.pop("data") == "text a/*.txt, tokenizer bpe:512"
    assert set(facts.values()) == {NOT_RECORDED} and {*NUMBERS} < facts.keys()
    facts = shown(tmp_path, session(0, 30))  # no facts yet
    assert (facts["wall time"], facts["date"], facts["tokens/s"]) == ("30 s", "1970-01-01", "900")
    assert {facts[name] for name in ("hardware", "version", "parameters")} == {NOT_RECORDED}
    facts = shown(tmp_path, session(0, 30), session(30, 60, {}))
    assert facts["hardware"] == f"{NOT_RECORDED}, then 8 x TPU v5e" and facts["parameters"] == "1,234,567"


@pytest.mark.parametrize("content", ["{", "3", '{"began": 1}', '{"began": 0, "ended": 1, "facts": {"trained": []}}'])
def test_a_damaged_account_is_named(tmp_path, content):
    (tmp_path / "sessions.jsonl").write_text(content + "\n")
    with pytest.raises(UserError, match=f"{tmp_path}/sessions.jsonl "):
        shown(tmp_path)


def test_only_what_all_runs_share_is_common(tmp_path):
    runs = []
    for name, hardware in (("a", "8 x TPU v5e"), ("b", "1 x H100")):
        (tmp_path / name).mkdir()
        shown(tmp_path / name, session(0, 1, {"hardware": hardware}))
        runs.append(read_facts(str(tmp_path / name), CONFIG, LINES))
    assert common_facts(runs).keys() == runs[0].shown.keys() - {"hardware"}
    assert common_facts([]) == {}


def test_long_samples_end_with_what_was_left_out(tmp_path):
    (tmp_path / "samples.txt").write_text("x" * 5000 + "\n")
    samples = read_facts(str(tmp_path), CONFIG, LINES).samples
    kept = samples.index("\n")
    assert samples == f"{'x' * kept}\n[{5000 - kept:,} more characters in samples.txt]" and kept > 500
    (tmp_path / "samples.txt").write_bytes(b"--- 'a'\nb\xff\n")
    assert read_facts(str(tmp_path), CONFIG, LINES).samples == "--- 'a'\nb\ufffd"
