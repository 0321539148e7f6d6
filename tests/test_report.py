import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from configs import ablation
from darkformer_jax import report
from darkformer_jax.errors import UserError
from darkformer_jax.reporting.findings import collect
from darkformer_jax.reporting.plots import pictures_of
from darkformer_jax.reporting.themes import LIGHT
from darkformer_jax.runs.manifest import write_manifest
from tests.tiny_runs import tiny_config, write_workdir

STEPS = 20
FINGERPRINT = "f" * 64


def write_run(workdir, loss, arguments="", last_step=STEPS, fingerprint=FINGERPRINT, broken=None, init_from=""):
    """A workdir as training leaves it, with a held-out loss of our choice and made-up curves before it."""
    config = ablation.get_config(f"steps={STEPS},{arguments}".rstrip(","))
    config.init_from = init_from
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    (workdir / "data.json").write_text(json.dumps({"fingerprint": fingerprint}))
    lines = [{"step": step, "loss": loss + 2 / step, "grad_norm": 1.0} for step in range(1, last_step + 1)]
    lines.append({"step": STEPS // 2, "heldout_loss": loss + 1, "heldout_bits_per_byte": 1.0, "heldout_accuracy": 0.1})
    if last_step == STEPS:
        figures = {"heldout_bits_per_byte": loss / math.log(2), "heldout_accuracy": 1 - loss / 8}
        lines.append({"step": STEPS, "heldout_loss": loss, **figures, "heldout_tokens": 12345})
    if broken:
        lines.append({"step": last_step + 1, "loss": None, "grad_norm": 1.0})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_labelled_run(workdir, task, figures, arguments=""):
    """A workdir as training of a labelled task leaves it, with held-out figures of our choice."""
    write_run(workdir, figures["loss"], arguments)
    config = json.loads((workdir / "config.json").read_text())
    config["task"]["name"], config["data"]["source"] = task, "labelled"
    (workdir / "config.json").write_text(json.dumps(config))
    lines = (workdir / "metrics.jsonl").read_text().splitlines()[:STEPS]
    lines.append(json.dumps({"step": STEPS} | {f"heldout_{name}": value for name, value in figures.items()}))
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def run_report(runs, out):
    return report.report(report.parse_flags(["report", f"--runs={runs}", f"--out={out}"]))


# Losses by seed, and what must come of them, worked out by hand.
EXACT, PERFORMER, DARK = {0: 2.0, 1: 2.1, 2: 2.2}, {0: 3.0, 1: 3.3, 2: 3.0}, {0: 2.5, 1: 2.6, 2: 2.7}


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for kind, losses in (("softmax", EXACT), ("performer", PERFORMER), ("dark", DARK)):
        for seed, loss in losses.items():
            write_run(root / f"{kind}-{seed}", loss, f"attention={kind},seed={seed}")
    write_run(root / "constant", 3.5, "attention=constant")
    write_run(root / "dark-fast", 2.9, "attention=dark,lr=0.01")
    write_run(root / "dark-m", 2.45, "attention=dark,m=128")
    write_run(root / "dark-hot", 4.0, "attention=dark,lr=0.1", last_step=12, broken=True)
    write_run(root / "dark-nan", 2.5, "attention=dark,seed=5", last_step=7, broken=True)
    write_run(root / "stopped", 2.4, "attention=dark,seed=3", last_step=15)
    write_run(root / "<b>_&|_", 2.8, "attention=dark,seed=4", last_step=14)
    out = root.parent / "out" / "page"
    return run_report(f"{root}/*", out), out, root


def test_the_page_begins_with_a_title_and_a_conclusion_in_words(reported):
    result, out, _ = reported
    title = "softmax, dark, performer and constant compared as language models"
    lines = (out / "report.md").read_text().splitlines()
    assert lines[0] == f"# {title}" and f"<title>{title}</title>" in (out / "report.html").read_text()
    assert lines[2] == result["conclusion"]
    assert lines[2].startswith("softmax (exact) has the lowest held-out loss: 2.1000 ± 0.0577 nats per token (3 seeds)")
    assert "In the row dark, m 64, learning rate 0.003: DARK is better than Performer" in lines[2]
    assert "zero is outside its 95% interval by Student's t" in (out / "report.md").read_text()


def test_facts_that_all_runs_share_stand_once_and_the_others_in_a_table(tmp_path):
    for kind, cores in (("dark", 1), ("performer", 8)):
        write_run(tmp_path / kind, 2.0, f"attention={kind}")
        facts = {
            "hardware": f"{cores} cores",
            "version": "0.9 *",
            "parameters": 1234,
            "trained": 1234,
            "data": "7 tokens",
        }
        session = {"began": 0.0, "ended": 60.0 * cores, "facts": facts}
        (tmp_path / kind / "sessions.jsonl").write_text(json.dumps(session) + "\n")
        (tmp_path / kind / "samples.txt").write_text(f"--- 'def '\ndef {kind}:\n\n\n\n    pass\n")
    result = run_report(f"{tmp_path}/*", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    for line in ("* **data**: stdlib, tokenizer bytes; 7 tokens", "* **version**: 0.9 \\*", "* **parameters**: 1,234",
                 "* **date**: 1970-01-01", "* **not recorded**: tokens/s"):  # fmt: skip
        assert f"\n{line}\n" in text
    table = "| run | hardware | wall time |\n| --- | --- | ---: |\n"
    assert f"{table}| {tmp_path}/dark | 1 cores | 1.0 min |\n| {tmp_path}/performer | 8 cores | 8.0 min |\n" in text
    assert f"### {tmp_path}/dark\n\n```\n--- 'def '\ndef dark:\n\n\n\n    pass\n```\n" in text
    assert [row["runs"][0]["facts"]["hardware"] for row in result["rows"]] == ["1 cores", "8 cores"]


def test_earlier_runs_have_a_page_too(tmp_path):
    write_run(tmp_path / "a", 2.0)
    run_report(f"{tmp_path}/*", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "* **not recorded**: hardware, version, date, parameters, tokens/s, wall time\n" in text
    assert "## Each run" not in text and "## Samples" not in text


def test_every_picture_of_the_page_is_there_in_two_themes_and_in_words(reported):
    _, out, _ = reported
    html = (out / "report.html").read_text()
    sources = re.findall(
        r'<source media="\(prefers-color-scheme: dark\)" srcset="data:image/png;base64,([^"]+)">', html
    )
    images = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)" width="\d+">', html)
    files = list(out.glob("*.png"))
    assert len(sources) == len(images) == len({*sources, *(content for content, _ in images)}) / 2 == len(files)
    alts = re.findall(r"!\[(.+?)\]\((\w+\.png)\)", (out / "report.md").read_text())
    assert {name for _, name in alts} == {path.name for path in files} and all(len(alt) > 80 for alt, _ in alts)
    assert {alt for _, alt in images} == {re.sub(r"\\(.)", r"\1", alt) for alt, _ in alts}


def test_rows_hold_hand_computed_means_and_standard_errors(reported):
    result, out, _ = reported
    rows = {
        (row["settings"]["mechanism"], row["settings"].get("optimizer.learning_rate")): row
        for row in result["rows"][:3]
    }
    assert len(result["rows"]) == 6
    softmax = rows["softmax", 0.003]
    assert [run["seed"] for run in softmax["runs"]] == [0, 1, 2]
    assert softmax["heldout_loss"]["mean"] == pytest.approx(2.1)
    assert softmax["heldout_loss"]["standard_error"] == pytest.approx(0.1 / math.sqrt(3))
    assert softmax["heldout_bits_per_byte"]["mean"] == pytest.approx(2.1 / math.log(2))
    assert softmax["heldout_accuracy"]["mean"] == pytest.approx(1 - 2.1 / 8)
    text = (out / "report.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| softmax (exact) |"))
    assert line.endswith("| 3 | 0 | 2.1000 ± 0.0577 | 3.0297 ± 0.0833 | (73.75 ± 0.72)% |")
    assert re.search(r"\| constant \(control\) \|.*\| 1 \| 0 \| 3\.5000 \| 5\.0494 \| 56\.25% \|", text)
    assert (
        "Common to all rows that use the field: window 0, learning rate of M 0.0003, steps 20, tokens 81,920." in text
    )
    dark = next(row for row in result["rows"] if row["diverged"])
    assert dark["settings"]["mechanism"] == "dark" and dark["diverged"] == 1 and len(dark["runs"]) == 3


def test_the_share_of_the_gap_and_its_paired_standard_error(reported):
    result, out, _ = reported
    same, *_ = [c for c in result["comparisons"] if c["with"] == "performer" and not c["each_at_best_learning_rate"]]
    # p - e = 1.0, 1.2, 0.8; p - d = 0.5, 0.7, 0.3: share 0.5; p - d - 0.5 (p - e) = 0, 0.1, -0.1: sd 0.1
    assert same["share"] == {
        "mean": pytest.approx(0.5),
        "standard_error": pytest.approx(0.1 / math.sqrt(3)),
        "shared_seeds": 3,
    }
    assert same["difference"]["mean"] == pytest.approx(-0.5)
    assert same["difference"]["standard_error"] == pytest.approx(0.2 / math.sqrt(3))
    assert same["gap"]["mean"] == pytest.approx(1.0)
    text = (out / "report.md").read_text()
    assert "DARK is better than Performer (-0.5000 ± 0.1155 in held-out loss, 3 shared seeds)" in text
    assert "It closes (50 ± 6)% of the gap of 1.0000 ± 0.1155 between Performer and exact attention." in text


def test_a_dark_that_is_not_better_is_called_that(tmp_path):
    for kind, loss in (("softmax", 2.0), ("performer", 3.0), ("dark", 3.1)):
        write_run(tmp_path / kind, loss, f"attention={kind}")
    write_run(tmp_path / "another-budget", 1.0, "attention=performer,m=8")
    result = run_report(f"{tmp_path}/*", tmp_path / "out")
    assert len(result["comparisons"]) == 1  # not with other m
    assert result["comparisons"][0]["share"] == {"mean": pytest.approx(-0.1), "standard_error": None, "shared_seeds": 1}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "DARK is not better than Performer (+0.1000 in held-out loss, 1 shared seed)" in text


def test_hybrids_are_compared_with_the_window_alone_at_the_same_window(tmp_path):
    for kind, loss, window in (("window_only", 2.0, 64), ("window_only", 1.0, 128), ("dark", 2.2, 64)):
        write_run(tmp_path / f"{kind}-{window}", loss, f"attention={kind},window={window}")
    result = run_report(f"{tmp_path}/*", tmp_path / "out")
    (c,) = result["comparisons"]
    assert c["with"] == "window_only" and c["difference"]["mean"] == pytest.approx(0.2)
    assert "DARK is not better than the window alone" in (tmp_path / "out" / "report.md").read_text()


def test_unfinished_and_diverged_runs_are_named_with_the_reason(reported):
    result, out, root = reported
    left_out = {entry["workdir"]: entry["reason"] for entry in result["left_out"]}
    assert left_out == {
        f"{root}/dark-nan": f"diverged: loss was not finite at step 8 of {STEPS}",
        f"{root}/dark-hot": f"diverged: loss was not finite at step 13 of {STEPS}",
        f"{root}/stopped": f"unfinished: step 15 of {STEPS}, no last evaluation",
        f"{root}/<b>_&|_": f"unfinished: step 14 of {STEPS}, no last evaluation",
    }
    text = (out / "report.md").read_text()
    assert "Crosses mark learning rates at which a run diverged." in text
    assert "; 12 finished, 2 diverged, 2 did not finish" in text


def test_pictures_are_there_and_drawn(reported):
    from matplotlib.image import imread

    _, out, _ = reported
    files = {path.name for path in out.iterdir()}
    pictures = {"loss_curves_1_training.png", "loss_curves_1_held_out.png", "learning_rates.png", "features.png"}
    assert files == {*pictures, "report.md", "report.html", "results.json"}
    for name in pictures:
        assert len(np.unique(imread(out / name)[::4, ::4, :3].sum(axis=-1))) > 20
        assert f"]({name})" in (out / "report.md").read_text()


class Links(HTMLParser):
    """Every address that a page asks for, and every element."""

    def __init__(self):
        super().__init__()
        self.addresses, self.tags, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        self.text += data


def test_the_page_asks_for_nothing_and_escapes_names(reported):
    _, out, root = reported
    html = (out / "report.html").read_text()
    links = Links()
    links.feed(html)
    assert links.addresses and all(address.startswith("data:") for address in links.addresses)
    assert links.tags.count("img") == 4 and "script" not in links.tags and "b" not in links.tags
    assert f"{root}/<b>_&|_: unfinished" in links.text
    assert "@import" not in html and "url(" not in html and "prefers-color-scheme: dark" in html
    assert "default-src 'none'" in html


def test_starts_that_differ_in_the_seed_alone_are_the_same_row(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"base-{seed}", 3.0, f"attention=softmax,seed={seed}")
        write_run(
            tmp_path / f"ft-{seed}", 2.0 + seed, f"attention=dark,seed={seed}", init_from=f"{tmp_path}/base-{seed}"
        )
    write_run(tmp_path / "ft-scratch", 2.0, "attention=dark")
    result = run_report(f"{tmp_path}/ft-*", tmp_path / "out")
    assert sorted(len(row["runs"]) for row in result["rows"]) == [1, 2]


def test_a_held_out_loss_that_is_not_finite_is_a_divergence_too(tmp_path):
    write_run(tmp_path / "a", 2.0)
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": STEPS, "heldout_loss": None}) + "\n")
    result = run_report(f"{tmp_path}/a", tmp_path / "out")
    assert not result["rows"] and "heldout_loss was not finite at step 20" in result["left_out"][0]["reason"]
    assert "there is no table" in (tmp_path / "out" / "report.html").read_text()


def test_classifiers_are_reported_by_their_own_figures(tmp_path):
    for kind, loss in (("performer", 0.6), ("dark", 0.5)):
        for seed in (0, 1):
            figures = {"loss": loss, "accuracy": 0.8 + seed / 10, "f1": 0.7, "matthews": 0.6}
            write_labelled_run(tmp_path / f"{kind}-{seed}", "classification", figures, f"attention={kind},seed={seed}")
    result = run_report(f"{tmp_path}/*", tmp_path / "out")
    row = result["rows"][0]
    assert row["settings"]["task.name"] == "classification" and "heldout_bits_per_byte" not in row
    assert row["heldout_accuracy"] == {"mean": pytest.approx(0.85), "standard_error": pytest.approx(0.05)}
    assert row["heldout_matthews"]["mean"] == row["runs"][1]["heldout_matthews"] == 0.6
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| seeds | held-out loss | accuracy | F1 | Matthews |" in text
    assert "| 2 | 0.5000 ± 0.0000 | (85.00 ± 5.00)% | 0.7000 ± 0.0000 | 0.6000 ± 0.0000 |" in text
    assert "the loss is in nats per example." in text and "per token" not in text
    assert "DARK is better than Performer (-0.1000 ± 0.0000 in held-out loss, 2 shared seeds)" in text


def write_listops_run(workdir, losses, accuracies, arguments, data, tests=()):
    """A run on ListOps, evaluated half way and at the end. tests: (step, accuracy) of each test*.json."""
    figures = {"loss": losses[1], "accuracy": accuracies[1], "f1": 0.5, "matthews": 0.4}
    write_labelled_run(workdir, "classification", figures, arguments)
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["files"] = str(data / "basic_train.tsv")
    config["task"] |= {"text_column": "Source", "label_column": "Target"}
    config["task"]["heldout_files"] = str(data / "basic_val.tsv")
    (workdir / "config.json").write_text(json.dumps(config))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    middle = {"step": STEPS // 2, "heldout_loss": losses[0], "heldout_accuracy": accuracies[0]}
    lines.insert(STEPS // 2, middle | {"heldout_f1": 0.5, "heldout_matthews": 0.4})
    lines[0]["time"] = {"tokens_per_second": 1000.0, "host_memory_bytes": 3 * 2**29}
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number, (step, accuracy) in enumerate(tests):
        write_test_file(workdir / f"test{number}.json", step, accuracy, data / "basic_test.tsv")


def write_test_file(path, step, accuracy, text, **more):
    path.write_text(json.dumps({"step": step, "accuracy": accuracy, "text": str(text)} | more))


@pytest.fixture
def listops(tmp_path):
    """A directory of data with nothing but its statistics."""
    (tmp_path / "data").mkdir()
    shares = {"train": {"0": 0.3, "1": 0.7}, "val": {"0": 0.6, "1": 0.4}, "test": {"0": 0.5, "1": 0.5}}
    statistics = {split: {"shares": values} for split, values in shares.items()}
    (tmp_path / "data" / "statistics.json").write_text(json.dumps(statistics))
    return tmp_path / "data"


def test_a_benchmark_has_best_and_last_figures_of_validation_and_test(listops, tmp_path):
    middle = STEPS // 2
    for seed in (0, 1):
        tests = [(middle, 0.30 + seed / 10), (STEPS, 0.2)]
        figures = (1.0, 2.0), (0.32 + seed / 50, 0.25)
        write_listops_run(tmp_path / "runs" / f"a{seed}", *figures, f"attention=softmax,seed={seed}", listops, tests)
    write_listops_run(tmp_path / "runs" / "b", (2.0, 1.5), (0.1, 0.2), "attention=performer", listops)
    result = run_report(f"{tmp_path}/runs/*", tmp_path / "out")["benchmark"]
    exact, performer = result["rows"]
    assert result["name"] == "listops" and result["metric"] == "accuracy"
    assert exact["best"] == {"mean": pytest.approx(33.0), "standard_error": pytest.approx(1.0)}
    assert exact["last"]["mean"] == pytest.approx(25.0) and exact["test_last"]["mean"] == pytest.approx(20.0)
    assert exact["test_best"] == {"mean": pytest.approx(35.0), "standard_error": pytest.approx(5.0)}
    assert performer["best"]["mean"] == pytest.approx(20.0) and performer["test_best"] is None
    assert result["majority_class"] == {"validation": pytest.approx(40.0), "test": pytest.approx(50.0)}
    text = (tmp_path / "out" / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| softmax (exact) |") and "GiB" in line)
    assert "| 2 | 33.00 ± 1.00 | 25.00 ± 0.00 | 35.00 ± 5.00 | 20.00 ± 0.00 | not recorded |" in row
    assert row.endswith("| 1,000 | 1.50 GiB |")
    heads, rows = re.search(r"## ListOps of Long Range Arena\n+(\|.*)\n\|.*\n((?:\|.*\n)+)", text).groups()
    assert {line.count(" |") for line in rows.splitlines()} == {heads.count(" |")}
    assert re.search(
        r"\| always the most frequent class (\|  )+\| 40.00 \| 40.00 \| 50.00 \| 50.00 (\|  ){4}\|\n", rows
    )
    assert "### Published, not ours" in text and "(arXiv 2011.04006) | 18.01 |" in text
    assert "read at most\n512 tokens per sequence and trained 20 steps" in text
    assert "ListOps of Long Range Arena</h2>" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(("examples", "is_said"), [(20_000, True), (96_000, False), (None, False)])
def test_published_rows_say_where_they_are_of_other_data(listops, tmp_path, examples, is_said):
    known = json.loads((listops / "statistics.json").read_text())
    known["train"] |= {} if examples is None else {"expressions": examples}
    (listops / "statistics.json").write_text(json.dumps(known))
    write_listops_run(tmp_path / "run", (1.0, 2.0), (0.3, 0.2), "", listops)
    assert run_report(tmp_path / "run", tmp_path / "out")["benchmark"]["training_examples"] == examples
    said = "**Other data:** 20,000 training examples are here, 96,000 in what was published under this name."
    assert (said in (tmp_path / "out" / "report.md").read_text()) == is_said


@pytest.mark.parametrize(
    ("levels", "has_published"),
    [(["hard"], True), ([None], True), (["easy"], False), (["hard", "intermediate"], False)],
)
def test_published_rows_of_pathfinder_stand_only_beside_the_hard_level(tmp_path, levels, has_published):
    for seed, level in enumerate(levels):
        data = tmp_path / f"data{seed}" / "lra_pathfinder32"
        data.mkdir(parents=True)
        source = {"directory": "x"} | ({} if level is None else {"level": level})
        (data / "statistics.json").write_text(json.dumps({"train": {"shares": {"0": 1.0}}, "source": source}))
        workdir = tmp_path / "runs" / str(seed)
        figures = {"loss": 0.6, "accuracy": 0.8, "f1": 0.7, "matthews": 0.6}
        write_labelled_run(workdir, "classification", figures, f"seed={seed}")
        config = json.loads((workdir / "config.json").read_text())
        config["data"]["files"] = str(data / "train.tsv")
        config["task"] |= {"text_column": "pixels", "heldout_files": str(data / "val.tsv")}
        (workdir / "config.json").write_text(json.dumps(config))
    found = run_report(f"{tmp_path}/runs/*", tmp_path / "out")["benchmark"]
    assert found["name"] == "lra_pathfinder32" and bool(found["published_not_ours"]) == has_published
    assert found["levels"] == sorted(level for level in levels if level)
    text = (tmp_path / "out" / "report.md").read_text()
    assert ("### Published, not ours" in text) == has_published
    assert ("\nLevel: " + " and ".join(found["levels"]) + "." in text) == bool(found["levels"])
    assert ("Published figures are of the hard level, and do not" in text) != has_published


def test_a_validation_split_without_the_commonest_training_class_has_none_of_it(listops, tmp_path):
    known = json.loads((listops / "statistics.json").read_text()) | {"val": {"shares": {"0": 1.0}}}
    (listops / "statistics.json").write_text(json.dumps(known))
    write_listops_run(tmp_path / "run", (1.0, 2.0), (0.3, 0.2), "", listops)
    result = run_report(tmp_path / "run", tmp_path / "out")
    assert result["benchmark"]["majority_class"] == {"validation": 0.0, "test": pytest.approx(50.0)}


def test_the_evaluation_before_training_is_not_the_best_checkpoint(listops, tmp_path):
    middle = STEPS // 2
    write_listops_run(tmp_path / "run", (1.0, 2.0), (0.3, 0.2), "", listops, [(middle, 0.25)])
    before = {"step": 0, "heldout_loss": 0.5, "heldout_accuracy": 0.9, "heldout_f1": 0.5, "heldout_matthews": 0.4}
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(json.dumps(before) + "\n" + metrics.read_text())
    (row,) = run_report(tmp_path / "run", tmp_path / "out")["benchmark"]["rows"]
    assert row["best"]["mean"] == pytest.approx(30.0) and row["test_best"]["mean"] == pytest.approx(25.0)
    assert "Of a run without checkpoints (1 here)" in (tmp_path / "out" / "report.md").read_text()


def test_the_best_is_the_checkpoint_that_the_run_keeps_as_best(listops, tmp_path):
    middle = STEPS // 2
    tests = [(middle, 0.25), (STEPS, 0.15)]
    write_listops_run(tmp_path / "run", (1.5, 1.0), (0.3, 0.2), "", listops, tests)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["eval"]["batches"] = 2
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    (tmp_path / "run" / "checkpoints").mkdir()
    for step, loss in ((middle, 1.5), (STEPS, 1.6)):  # of both by the same two batches; step 20's line has all of them
        manifest = tmp_path / "run" / "checkpoints" / f"{step}.sha256.json"
        write_manifest(manifest, step, {}, {"heldout_loss": loss}, {})
    (row,) = run_report(tmp_path / "run", tmp_path / "out")["benchmark"]["rows"]
    assert row["best"]["mean"] == pytest.approx(30.0) and row["test_best"]["mean"] == pytest.approx(25.0)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "cover eval.batches batches of the split" in text and "without checkpoints" not in text

    write_manifest(tmp_path / "run" / "checkpoints" / "3.sha256.json", 3, {}, {"heldout_loss": 0.1}, {})
    with pytest.raises(UserError, match="run has a best checkpoint, step 3, whose evaluation metrics.jsonl lacks"):
        run_report(tmp_path / "run", tmp_path / "other")


def test_runs_from_scratch_and_pretrained_ones_have_rows_that_say_so(listops, tmp_path):
    runs, pretrained = tmp_path / "runs", tmp_path / "pretrained"
    for seed in (0, 1):
        write_run(pretrained / f"s{seed}", 3.0, f"attention=dark,seed={seed}")
        for name, accuracy in (("scratch", 0.2), ("tuned", 0.4)):
            workdir, last = runs / f"dark-{name}-s{seed}", accuracy + seed / 10
            write_listops_run(workdir, (2.0, 1.0 - accuracy), (0.1, last), f"attention=dark,seed={seed}", listops)
        config = json.loads((runs / f"dark-tuned-s{seed}" / "config.json").read_text())
        config["init_from"] = str(pretrained / f"s{seed}")
        (runs / f"dark-tuned-s{seed}" / "config.json").write_text(json.dumps(config))
    rows = run_report(f"{runs}/*", tmp_path / "out")["benchmark"]["rows"]
    assert sorted(row["last"]["mean"] for row in rows) == [pytest.approx(25.0), pytest.approx(45.0)]
    text = (tmp_path / "out" / "report.md").read_text()
    origin = f"{pretrained}/s0 and {pretrained}/s1"
    table = text[text.index("## ListOps of Long Range Arena") : text.index("### Published")]
    assert "\n| mechanism | began from | seeds |" in table
    assert "\n| dark | random weights | 2 | 25.00 ± 5.00 |" in table and f"\n| dark | {origin} | 2 | 45.00 ±" in table
    assert f"\ndark, began from {origin} has the lowest held-out loss" in text
    assert "Its lead over dark, began from random weights (" in text
    assert "began from" not in next(line for line in text.splitlines() if line.startswith("Common to all rows"))


def test_what_all_runs_began_from_stands_once_and_random_weights_are_not_said(tmp_path):
    write_run(tmp_path / "base", 3.0)
    for kind in ("dark", "performer"):
        write_run(tmp_path / f"tuned-{kind}", 2.0, f"attention={kind}", init_from=str(tmp_path / "base"))
        write_run(tmp_path / f"new-{kind}", 2.0, f"attention={kind}")
    for name, said in (("tuned", f", began from {tmp_path}/base.\n"), ("new", ", tokens 81,920.\n")):
        run_report(f"{tmp_path}/{name}-*", tmp_path / f"out-{name}")
        text = (tmp_path / f"out-{name}" / "report.md").read_text()
        assert said in text and "| began from |" not in text


def test_two_test_files_of_one_checkpoint_and_foreign_ones_are_refused(listops, tmp_path):
    tests = [(STEPS, 0.3), (STEPS, 0.4)]
    write_listops_run(tmp_path / "twice", (1.0, 2.0), (0.3, 0.2), "", listops, tests)
    with pytest.raises(UserError, match=r"twice has two test\*.json of step 20; allowed: one per checkpoint"):
        run_report(tmp_path / "twice", tmp_path / "out")
    write_listops_run(tmp_path / "foreign", (1.0, 2.0), (0.3, 0.2), "", listops, [("last", 0.3)])
    with pytest.raises(UserError, match=r"foreign/test0.json is not what evaluate --json writes for this run"):
        run_report(tmp_path / "foreign", tmp_path / "out")


@pytest.mark.parametrize(
    "differ", [{"text_fingerprint": "b", "examples": 9}, {"text_fingerprint": None, "examples": 8}]
)
def test_figures_of_different_test_texts_are_no_mean(listops, tmp_path, differ):
    same = {"text_fingerprint": "a", "examples": 9}
    for seed, measured in enumerate((same, differ)):
        workdir = tmp_path / f"s{seed}"
        write_listops_run(workdir, (1.0, 2.0), (0.3, 0.2), f"seed={seed}", listops)
        write_test_file(workdir / "test.json", STEPS, 0.3, listops / f"test-{seed}.tsv", **measured)
    with pytest.raises(UserError, match=r"s0/test.json and .*s1/test.json measured different texts"):
        run_report(f"{tmp_path}/s?", tmp_path / "out")
    write_test_file(tmp_path / "s1" / "test.json", STEPS, 0.5, listops / "moved.tsv", **same)
    [row] = run_report(f"{tmp_path}/s?", tmp_path / "out")["benchmark"]["rows"]
    assert row["test_last"]["mean"] == pytest.approx(40.0)


@pytest.mark.parametrize(
    ("text", "is_there", "file", "field"),
    [
        ("data/basic_val.tsv", True, "basic_val.tsv", "task.heldout_files"),
        ("data/basic_val.tsv", False, "basic_val.tsv", "task.heldout_files"),
        ("data/../data/basic_train.tsv", False, "basic_train.tsv", "data.files"),
        ("data/basic_t*.tsv", True, "basic_train.tsv", "data.files"),
        ("data/basic_test.tsv,link/basic_val.tsv", True, "basic_val.tsv", "task.heldout_files"),
    ],
)
def test_files_that_the_run_has_seen_are_no_test_split(listops, tmp_path, monkeypatch, text, is_there, file, field):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(listops)
    for split in ("train", "val", "test"):
        if is_there:
            (listops / f"basic_{split}.tsv").touch()
    write_listops_run(tmp_path / "run", (1.0, 2.0), (0.3, 0.2), "", listops)
    write_test_file(tmp_path / "run" / "test.json", STEPS, 0.3, text)
    message = f"run/test.json measured {listops}/{file}, which is of the run's {field} and so no test split; give it"
    with pytest.raises(UserError, match=re.escape(message)):
        run_report("run", "out")
    write_test_file(tmp_path / "run" / "test.json", STEPS, 0.3, "data/basic_test.tsv")
    assert run_report("run", "out")["benchmark"]["rows"][0]["test_last"]["mean"] == pytest.approx(30.0)


def test_a_page_without_a_benchmark_names_none(tmp_path):
    write_labelled_run(tmp_path / "a", "classification", {"loss": 1.0, "accuracy": 0.5})
    assert "benchmark" not in run_report(tmp_path / "a", tmp_path / "out")
    assert "not ours" not in (tmp_path / "out" / "report.md").read_text()


def test_a_figure_that_only_some_rows_have_is_left_out_in_the_others(tmp_path):
    write_labelled_run(tmp_path / "a", "regression", {"loss": 4.0, "pearson": 0.5, "kendall_tau": 0.3})
    write_labelled_run(tmp_path / "b", "regression", {"loss": 5.0, "pearson": 0.4}, "attention=softmax")
    run_report(f"{tmp_path}/*", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| held-out loss | Pearson | kendall tau |" in text and "the loss is in squared units of the label" in text
    assert "| 1 | 4.0000 | 0.5000 | 0.3000 |" in text and "| 1 | 5.0000 | 0.4000 | – |" in text


def test_axes_name_the_unit_of_the_tasks_loss(tmp_path):
    for m in (8, 16):
        write_labelled_run(tmp_path / f"{m}", "classification", {"loss": 1 / m}, f"attention=dark,m={m}")
    drawn = {picture.name: picture.draw(LIGHT) for picture in pictures_of(collect(f"{tmp_path}/*"))}
    for name in ("training", "held_out"):
        assert drawn[f"loss_curves_1_{name}.png"].axes[0].get_ylabel() == "loss [nats per example]"
    assert drawn["features.png"].axes[0].get_ylabel() == "held-out loss [nats per example]"


def write_calibration(workdir, scale, num_features):
    rows = [
        {
            "layer": layer,
            **{name: [scale * (layer + 1), scale] for name in ("window_only", "before", "after")},
            "seconds": 1,
        }
        for layer in range(2)
    ]
    report = {"mechanism": "dark", "num_features": num_features, "window": 64, "seed": 0, "layers": rows}
    (workdir / "calibration.json").write_text(json.dumps(report))


@pytest.mark.standard_promotion
def test_errors_of_calibration_and_spectra_of_the_newest_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, scale, m in (("calibrated", 0.1, 64), ("more", 0.05, 128)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(ablation.get_config().to_dict()))
        write_calibration(tmp_path / name, scale, m)
    write_run(tmp_path / "run", 2.0, init_from="calibrated")
    trained = write_workdir(tmp_path / "model", tiny_config(model__attention__geometry_init=0.5))
    for name in ("data.json", "metrics.jsonl"):
        (tmp_path / "model" / name).write_bytes((tmp_path / "run" / name).read_bytes())
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {"num_steps": STEPS}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))

    result = run_report("run,more,model", "out")
    assert [(c["workdir"], c["num_features"], c["mean_errors"]["after"]) for c in result["calibrations"]] == [
        ("calibrated", 64, pytest.approx(0.125)),
        ("more", 128, pytest.approx(0.0625)),
    ]
    (spectra,) = result["spectra"]
    M = np.asarray(trained.params["blocks_0"]["attention"]["mechanism"]["M"], np.float64)[0]
    eigenvalues = np.linalg.eigvalsh(np.swapaxes(M, -1, -2) @ M)
    assert spectra["workdir"] == "model" and spectra["initial"] == 0.25
    assert spectra["largest"] == [pytest.approx(eigenvalues.max())] == [pytest.approx(0.25)]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "not shown: run: 'run' must hold" in text  # its weights are not there
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert names >= {
        "attention_error_1_before.png",
        "attention_error_2_after.png",
        "calibration_features.png",
        "spectra_1.png",
    }


def bad(change):
    """A name for a case, and what it does to two good runs."""
    return pytest.param(change, id=change.__name__)


def other_data(a, b):
    (b / "data.json").write_text(json.dumps({"fingerprint": "0" * 64}))
    return r"/a and .*/b have different training or held-out tokens \(the files changed\)"


def other_tokenizer(a, b):
    other_data(a, b)
    config = json.loads((b / "config.json").read_text())
    config["data"]["tokenizer"] = "bpe:512"
    (b / "config.json").write_text(json.dumps(config))
    return r"data.tokenizer: 'bytes' and 'bpe:512'"


def no_data(a, b):
    (b / "data.json").unlink()
    return r"/b has metrics.jsonl but no data.json"


def an_unreadable_line(a, b):
    lines = (b / "metrics.jsonl").read_text().splitlines()
    (b / "metrics.jsonl").write_text("\n".join([*lines[:3], '{"step": 4, "lo', *lines[4:]]) + "\n")
    return r"/b/metrics.jsonl: line 4 is not a line of metrics"


def a_loss_that_is_text(a, b):
    with (b / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "heldout_loss": "2.0"}\n')
    return r"heldout_loss = '2.0' is not a number"


def another_task(a, b):
    config = json.loads((b / "config.json").read_text())
    config["task"]["name"] = "regression"
    (b / "config.json").write_text(json.dumps(config))
    return (
        r"different tasks \(language_model and regression\): their losses do not compare; .*--runs=.*/a or --runs=.*/b"
    )


def an_unknown_task(a, b):
    another_task(a, b)
    (b / "config.json").write_text((b / "config.json").read_text().replace('"regression"', '"chess"'))
    return r"/b: its task 'chess' is not known"


def the_same_seed_twice(a, b):
    (b / "config.json").write_bytes((a / "config.json").read_bytes())
    return r"/a and .*/b are the same experiment with seed 0; leave one out"


def a_config_that_is_none(a, b):
    (b / "config.json").write_text("{}")
    return r"/b/config.json is not the config of a run of this version"


def a_calibration_that_is_none(a, b):
    (b / "calibration.json").write_text('{"layers": []}')
    return r"/b/calibration.json is not what calibrate writes"


def a_circle(a, b):
    for workdir, other in ((a, b), (b, a)):
        config = json.loads((workdir / "config.json").read_text()) | {"init_from": str(other)}
        (workdir / "config.json").write_text(json.dumps(config))
    return r"began from itself by init_from"


def nothing_trained(a, b):
    for workdir in (a, b):
        (workdir / "metrics.jsonl").unlink()
    return r"none of the 2 workdirs has been trained, calibrated or probed"


@pytest.mark.parametrize(
    "change",
    [
        bad(change)
        for change in (
            other_data,
            other_tokenizer,
            no_data,
            an_unreadable_line,
            a_loss_that_is_text,
            another_task,
            an_unknown_task,
            the_same_seed_twice,
            a_config_that_is_none,
            a_calibration_that_is_none,
            a_circle,
            nothing_trained,
        )
    ],
)
def test_bad_runs_are_refused_and_nothing_is_written(tmp_path, change):
    write_run(tmp_path / "runs" / "a", 2.0)
    write_run(tmp_path / "runs" / "b", 2.0, "seed=1")
    message = change(tmp_path / "runs" / "a", tmp_path / "runs" / "b")
    with pytest.raises(UserError, match=message):
        run_report(f"{tmp_path}/runs/*", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_bad_flags_are_refused(tmp_path):
    write_run(tmp_path / "a", 2.0)
    for runs in (f"{tmp_path}/none-*", f"{tmp_path}/a,{tmp_path}/none", "", ","):
        with pytest.raises(UserError, match="--runs="):
            run_report(runs, tmp_path / "out")
    with pytest.raises(UserError, match="is there already"):
        run_report(f"{tmp_path}/a", tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_torn_last_line_is_no_mistake(tmp_path):
    write_run(tmp_path / "a", 2.0, last_step=12)
    write_run(tmp_path / "b", 2.0)
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    assert run_report(f"{tmp_path}/a,{tmp_path}/*", tmp_path / "out")["left_out"][0]["reason"].startswith(
        "unfinished: step 12"
    )
