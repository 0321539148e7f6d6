"""The verb: an exact model in, the same model with fitted feature attention out, and one line for every mistake."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from configs import finetune
from darkformer_jax import calibrate, generate
from darkformer_jax.calibration import fitting
from darkformer_jax.calibration.hybrids import Hybrids, Quality
from darkformer_jax.calibration.kept import Kept
from darkformer_jax.calibration.moments import Moments
from darkformer_jax.calibration.passages import read_passages
from darkformer_jax.calibration.summary import summary
from darkformer_jax.calibration.worth import Worth
from darkformer_jax.data.progress import no_progress
from darkformer_jax.pretrained.export import export_workdir
from darkformer_jax.runs.inherit import inherit
from darkformer_jax.runs.load import load_model
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.training.init_from import initialize_from
from tests.tiny_runs import experiment_of, fresh_state, saved_arrays, tiny_config, write_text, write_workdir
from tests.tiny_runs import run as train

pytestmark = pytest.mark.standard_promotion  # the state of a checkpoint is made with its optimizer

SMALL = ("--context=192", "--passages=10", "--transfer_steps=4", "--num_sinks=2")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("exact")
    write_workdir(directory, tiny_config(model__attention__kind="softmax", model__num_layers=2))
    (directory / "pretrained.json").write_text('{"model_type": "llama", "config": {"eos_token_id": 7}}')
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def run(workdir, text, out, *flags):
    features = () if "--mechanism=window_only" in flags else ("--num_features=8",)
    given = ["calibrate", f"--workdir={workdir}", f"--text={text}", f"--out={out}", *SMALL, *features, *flags]
    return calibrate.main(calibrate.parse_flags(given))


@pytest.fixture(scope="module")
def fitted(workdir, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("fitted") / "dark"
    run(workdir, text, out)
    return out


def test_only_the_mechanisms_are_new(workdir, fitted):
    before, after = saved_arrays(workdir), saved_arrays(fitted)
    params = {name for name in before if name.startswith("['params']")}
    assert all(before[name] == after[name] for name in params)
    new = {name for name in after if name not in before}
    assert new == {"['params']['blocks_0']['attention']['mechanism']['M']"} | {
        name for name in after if name.startswith("['projections']")
    }
    assert not any("optimizer" in name for name in after)


def test_the_new_workdir_is_one_like_any_other(fitted, capsys):
    model = load_model(Workdir(fitted))
    assert model.network.spec.layer_kinds == ("dark", "dark") and model.ends == {7, 256}
    attention = model.network.spec.pattern[0]
    assert (attention.num_features, attention.window, attention.chunk_size, attention.num_sinks) == (8, 64, 64, 2)
    m = np.asarray(model.params["blocks_0"]["attention"]["mechanism"]["M"])
    assert m.shape == (2, 2, 8, 8) and np.isfinite(m).all()
    generate.main(generate.parse_flags(["generate", f"--workdir={fitted}", "--prompt=def ", "--max_new_tokens=3"]))
    assert capsys.readouterr().out.startswith("def ")


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    directory = tmp_path_factory.mktemp("deep")
    write_workdir(directory, tiny_config(model__attention__kind="softmax", model__num_layers=3))
    (directory / "pretrained.json").write_text('{"model_type": "llama", "config": {"eos_token_id": 7}}')
    return directory


CHOOSING = ("--context=200", "--passages=4", "--transfer_steps=2", "--exact_layers=auto:1")


@pytest.fixture(scope="module")
def chosen(deep, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("chosen") / "hybrid"
    run(deep, text, out, *CHOOSING)
    return out


def kinds(report):
    return tuple("softmax" if layer in report["exact"]["chosen"] else "dark" for layer in range(3))


def test_one_layer_stays_exact_and_the_report_says_why(chosen):
    report = json.loads((chosen / "calibration.json").read_text())
    found = report["exact"]
    assert found["chosen"] == found["ranking"][:1] and found["cache_context"] == 32768
    assert [row["layer"] for row in found["alone"]] == [0, 1, 2]
    assert max(found["alone"], key=lambda row: row["copy"])["layer"] == found["chosen"][0]
    assert [point["layers"] for point in found["curve"]] == [found["ranking"][:count] for count in range(4)]
    assert [row["layer"] for row in report["layers"]] == [x for x in range(3) if x not in found["chosen"]]
    assert (chosen / "exact_layers.png").is_file()
    assert load_model(Workdir(chosen)).network.spec.layer_kinds == kinds(report)


def test_the_model_that_is_written_is_the_one_that_was_measured(chosen, text):
    model = load_model(Workdir(chosen))
    passages, num_test = read_passages(text, "", "text", model.tokenizer, 4, 200, 0)
    bound = fitting._in_dtype(model.network, "float32").bind(model.params, model.projections)
    found = Hybrids(bound, bound, passages[:num_test], model.tokenizer).measure([frozenset()], no_progress)[0]
    point = json.loads((chosen / "calibration.json").read_text())["exact"]["curve"][1]
    np.testing.assert_allclose(found, (point["loss"], point["copy"]), rtol=1e-5)
    worth = json.loads((chosen / "calibration.json").read_text())["worth"]
    np.testing.assert_allclose(found, (worth["converted"]["loss"], worth["converted"]["copy"]), rtol=1e-5)


def test_it_generates_exports_and_trains_on(chosen, text, tmp_path, capsys):
    generate.main(generate.parse_flags(["generate", f"--workdir={chosen}", "--prompt=def ", "--max_new_tokens=3"]))
    assert capsys.readouterr().out.startswith("def ")
    export_workdir(Workdir(chosen), str(tmp_path / "export"))
    described = json.loads((tmp_path / "export/config.json").read_text())["darkformer"]["pattern"]
    wanted = kinds(json.loads((chosen / "calibration.json").read_text()))
    assert tuple(described[layer % len(described)]["kind"] for layer in range(3)) == wanted
    config = finetune.get_config("keep,context=32,batch=2,steps=1,data=text")
    config.init_from, config.data.files = str(chosen), text
    config.model.dtype, config.sample.prompts, config.eval.batches = "float32", (), 1
    train(config, tmp_path / "tuned")
    tuned = load_model(Workdir(tmp_path / "tuned"))
    before = load_model(Workdir(chosen))
    assert tuned.network.spec.layer_kinds == wanted
    moved, start = (model.params["blocks_0"]["attention"]["q"]["kernel"] for model in (tuned, before))
    assert 0 < np.abs(moved - start).max() < 0.01


def test_layers_that_are_named_stay_exact(deep, text, tmp_path):
    run(deep, text, tmp_path / "out", "--exact_layers=0,2", "--transfer_steps=0")
    report = json.loads((tmp_path / "out/calibration.json").read_text())
    assert [row["layer"] for row in report["layers"]] == [1] and "exact" not in report
    assert load_model(Workdir(tmp_path / "out")).network.spec.layer_kinds == ("softmax", "dark", "softmax")


def test_features_everywhere_are_fitted_and_reported(workdir, text, tmp_path, capsys):
    """Without a window the passages are longer than what is exact: M has something to learn."""
    run(workdir, text, tmp_path / "out", "--window=0", "--num_sinks=0", "--transfer_steps=40", "--learning_rate=0.03")
    report = json.loads((tmp_path / "out/calibration.json").read_text())
    assert [row["layer"] for row in report["layers"]] == [0, 1]
    before, after = (np.mean([row[name] for row in report["layers"]]) for name in ("before", "after"))
    assert after < before and len(report["layers"][0]["after"]) == 2
    printed = capsys.readouterr().out
    assert f"relative error of attention over 2 layers: before {before:.3f}, after {after:.3f}" in printed
    m = np.asarray(load_model(Workdir(tmp_path / "out")).params["blocks_0"]["attention"]["mechanism"]["M"])
    assert (np.abs(m - 0.5 * np.eye(8)).max(axis=(1, 2, 3)) > 1e-3).all()  # both layers'


def test_errors_of_another_text_and_moments_of_both(workdir, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{i} is not {i * i}. " for i in range(200)))
    options = ("--transfer_steps=2", "--learn_projections", "--far_gain", "--window=64")
    run(workdir, text, tmp_path / "own", *options)
    run(workdir, text, tmp_path / "other", f"--test_text={other}", *options)
    (own, moments), (others, both) = (
        (json.loads((tmp_path / name / "calibration.json").read_text()), Moments.load(tmp_path / name / "moments.npz"))
        for name in ("own", "other")
    )
    assert moments.tokens.tolist() == [8 * 192] * 2 and both.tokens.tolist() == [10 * 192] * 2
    assert moments.second_k.shape == (2, 2, 8, 8)
    assert own["layers"][0]["before"] != others["layers"][0]["before"]
    mechanism = load_model(Workdir(tmp_path / "other")).params["blocks_0"]["attention"]["mechanism"]
    assert set(mechanism) == {"M", "projections", "log_gain"}


def test_a_whitening_start(workdir, text, tmp_path):
    options = ("--transfer_steps=0", "--geometry=whitening", "--geometry_init=1.0")
    run(workdir, text, tmp_path / "out", *options)
    m = np.asarray(load_model(Workdir(tmp_path / "out")).params["blocks_0"]["attention"]["mechanism"]["M"], np.float64)
    moments = Moments.load(tmp_path / "out/moments.npz")
    whitened = m @ moments.pooled_second @ np.swapaxes(m, -1, -2)
    size = np.trace(moments.pooled_second, axis1=-2, axis2=-1)[..., None, None] / 8
    np.testing.assert_allclose(whitened, size * np.eye(8), rtol=1e-3, atol=1e-3 * size.max())


def logits_of(model, tokens):
    rows = tuple(map(jnp.asarray, (tokens, np.ones_like(tokens), np.tile(np.arange(len(tokens[0])), (len(tokens), 1)))))
    bound = fitting._in_dtype(model.network, "float32").bind(model.params, model.projections)
    return np.asarray(bound(rows[0], rows[1], rows[2].astype(jnp.int32))[0])


@pytest.mark.parametrize(("heads", "budget"), [("auto:2", ""), ("auto", "40%@32768"), ("1:1,2:1", "")])
def test_heads_in_another_order_are_the_same_model(deep, text, tmp_path, capsys, monkeypatch, heads, budget):
    """The logits of 32 tokens, which the window shows whole, are the exact model's, whichever heads are exact."""
    fit, found = fitting._fit_layers, []
    monkeypatch.setattr(fitting, "_fit_layers", lambda *given: found.append(fit(*given)) or found[0])
    flags = (f"--exact_heads={heads}", f"--cache_budget={budget}", "--far_gain", "--geometry=balanced")
    run(deep, text, tmp_path / "out", *flags)
    written = json.loads((tmp_path / "out/calibration.json").read_text())
    assert written["exact_heads"] == heads
    report, rows = written["heads"], written["layers"]
    assert heads.startswith("auto") or report["chosen"] == {"1": [1], "2": [1]}
    model = load_model(Workdir(tmp_path / "out"))
    counts = [layer.exact_kv_heads or 2 * (layer.kind == "softmax") for layer in model.network.spec.layers]
    assert counts == [len(report["chosen"].get(str(layer), ())) for layer in range(3)] and sum(counts) == 2
    tokens = np.arange(64, dtype=np.int32).reshape(2, 32)
    wanted = logits_of(load_model(Workdir(deep)), tokens)
    np.testing.assert_allclose(logits_of(model, tokens), wanted, atol=2e-4 * np.abs(wanted).max())
    assert "exact heads" in capsys.readouterr().out
    # What is said of each head is in the order of the model that is written.
    before, after = found[0][2], Moments.load(tmp_path / "out/moments.npz")
    for layer in range(3):
        first = report["chosen"].get(str(layer), [])
        order = [*first, *sorted({0, 1} - {*first})]
        np.testing.assert_array_equal(after.mean_k[layer], before.mean_k[layer][order])
    assert [row["layer"] for row in rows] == [layer for layer in range(3) if counts[layer] < 2]
    assert ("gains" in report) == heads.startswith("auto")
    if "gains" in report:  # the chosen ones have the largest
        gains = {(layer, head): report["gains"][layer][head] for layer in range(3) for head in range(2)}
        assert sorted(gains, key=gains.get, reverse=True) == [tuple(head) for head in report["ranking"]]


@pytest.mark.parametrize("flags", [CHOOSING, ("--exact_heads=auto:2", "--far_gain", "--geometry=balanced")])
def test_a_command_that_was_stopped_goes_on_and_ends_the_same(deep, text, tmp_path, monkeypatch, capsys, flags):
    call, computed, left = Kept.__call__, [], [2, 3, 99]

    def until_it_is_stopped(self, name, compute):
        def one_more():
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            computed.append(name)
            return compute()

        return call(self, name, one_more)

    run(deep, text, tmp_path / "whole", *flags)
    monkeypatch.setattr(Kept, "__call__", until_it_is_stopped)
    for _ in range(2):
        with pytest.raises(SystemExit) as exit_:
            run(deep, text, tmp_path / "out", *flags)
        assert exit_.value.code == 130 and not (tmp_path / "out").exists()
        assert "interrupted; the same command goes on from what was found" in capsys.readouterr().err
        left.pop(0)
    run(deep, text, tmp_path / "out", *flags)
    assert len(computed) == len(set(computed)) >= 6  # nothing twice
    assert saved_arrays(tmp_path / "out") == saved_arrays(tmp_path / "whole")
    reports = [json.loads((tmp_path / name / "calibration.json").read_text()) for name in ("out", "whole")]
    for row in (row for report in reports for row in report["layers"]):
        del row["seconds"]
    assert reports[0] == reports[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_command_with_other_flags_goes_on_from_nothing(workdir, text, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "measure_worth", raise_interrupt)
        with pytest.raises(SystemExit):
            run(workdir, text, tmp_path / "out")
    (begun,) = tmp_path.glob(".out.*.begun")
    assert sorted(path.name for path in begun.iterdir()) == ["layer_0.npz", "layer_1.npz"]
    other = tmp_path / ".out.copy.begun"  # of another workdir, whose name begins with this one's
    shutil.copytree(begun, other)
    run(workdir, text, tmp_path / "out", "--seed=1")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "out", other])
    run(workdir, text, tmp_path / "fresh", "--seed=1")
    assert saved_arrays(tmp_path / "out") == saved_arrays(tmp_path / "fresh")


def raise_interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("mechanism", ["dark", "performer"])
def test_balanced_coordinates_change_no_exact_weight(workdir, text, tmp_path, mechanism):
    """The logits of 32 tokens, which the window shows whole, are the exact model's."""
    run(workdir, text, tmp_path / "out", "--geometry=balanced", f"--mechanism={mechanism}")
    exact, balanced = load_model(Workdir(workdir)), load_model(Workdir(tmp_path / "out"))
    maps = balanced.projections["blocks_0"]["attention"]["mechanism"]["coordinates"]
    assert maps["key_map"].shape == (2, 2, 8, 8) and np.abs(np.asarray(maps["query_map"]) - np.eye(8)).max() > 0.1
    assert np.ptp(maps["key_center"], axis=0).max() > 0.01  # each layer has its own
    tokens = np.arange(64, dtype=np.int32).reshape(2, 32)
    rows = tuple(map(jnp.asarray, (tokens, np.ones_like(tokens), np.tile(np.arange(32, dtype=np.int32), (2, 1)))))
    ours, theirs = (
        np.asarray(fitting._in_dtype(m.network, "float32").bind(m.params, m.projections)(*rows)[0])
        for m in (balanced, exact)
    )
    np.testing.assert_allclose(ours, theirs, atol=2e-4 * np.abs(theirs).max())


def test_fine_tuning_keeps_the_coordinates_even_where_it_redraws(workdir, text, tmp_path):
    run(workdir, text, tmp_path / "out", "--geometry=balanced")
    config = finetune.get_config("dark,m=8,sinks=2,context=32")
    config.init_from, config.model.attention.redraw_every = str(tmp_path / "out"), 5
    config = inherit(config)
    assert config.model.attention.balanced
    experiment = experiment_of(config)
    state, _ = initialize_from(Workdir(tmp_path / "out"), experiment, fresh_state(experiment))
    ours, theirs = (
        x["blocks_0"]["attention"]["mechanism"]
        for x in (state.projections, load_model(Workdir(tmp_path / "out")).projections)
    )
    for name in ("query_map", "key_map", "key_center"):
        np.testing.assert_array_equal(ours["coordinates"][name], theirs["coordinates"][name])


@pytest.mark.parametrize("mechanism", ["performer", "window_only"])
def test_controls_have_nothing_to_fit(workdir, text, tmp_path, mechanism):
    """So passages that the window shows whole are none too few."""
    run(workdir, text, tmp_path / "out", f"--mechanism={mechanism}", "--context=32")
    report = json.loads((tmp_path / "out/calibration.json").read_text())
    assert all(row["before"] == row["after"] for row in report["layers"])
    assert load_model(Workdir(tmp_path / "out")).network.spec.layer_kinds == (mechanism, mechanism)


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], (64, 64, 4, 0.5)),
        (["--window=0"], (64, 0, 0, 0.5)),
        (["--window=128", "--num_sinks=1", "--num_features=16", "--geometry_init=1"], (16, 128, 1, 1.0)),
    ],
)
def test_options_that_are_not_given_are_those_of_a_conversion(flags, options):
    args = calibrate.parse_flags(["calibrate", "--workdir=w", "--text=t", "--out=o", *flags])
    calibrate.complete_flags(args)
    assert (args.num_features, args.window, args.num_sinks, args.geometry_init) == options


def test_passages_that_were_trained_on_are_no_test(workdir, tmp_path, capsys):
    few = tmp_path / "few.txt"
    few.write_text("".join(f"{i} is not {i * i}. " for i in range(200))[:2000])  # ten passages and no more
    with pytest.raises(SystemExit) as exit_:
        run(workdir, few, tmp_path / "out", f"--test_text={few}")
    assert exit_.value.code == 2 and not (tmp_path / "out").exists()
    assert f"--test_text={few}: has passages of --text={few}; allowed: other text" in capsys.readouterr().err


def test_too_little_text_to_whiten_with(workdir, text, tmp_path, capsys):
    few = ("--context=4", "--passages=2", "--window=0", "--num_sinks=0")
    with pytest.raises(SystemExit) as exit_:
        run(workdir, text, tmp_path / "out", "--geometry=whitening", *few)
    assert exit_.value.code == 2 and not any(tmp_path.iterdir())
    message = (
        "--geometry=whitening: needs at least 9 tokens to fit on, of heads of 8; --passages=2 of --context=4 leave 4"
    )
    assert message in capsys.readouterr().err


def test_fine_tuning_goes_on_from_it(fitted):
    config = finetune.get_config("dark,m=8,sinks=2,context=32")
    config.init_from = str(fitted)
    experiment = experiment_of(inherit(config))
    state, report = initialize_from(Workdir(fitted), experiment, fresh_state(experiment))
    assert re.search(r"initialised (\d+) of \1 parameter arrays", report) and "; new" not in report, report
    assert re.search(r"and (\d+) of \1 arrays of projections", report), report
    wanted = load_model(Workdir(fitted)).params["blocks_0"]["attention"]["mechanism"]["M"]
    np.testing.assert_array_equal(state.params["blocks_0"]["attention"]["mechanism"]["M"], wanted)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir={fitted}"], "its layers are dark; allowed: softmax, softmax_local"),
        (["--passages=1000"], "passages of --context=192 tokens; 1000 are needed (--passages)"),
        (["--test_text={dir}/none.txt"], "no file matches"),
        (["--geometry=whitening", "--mechanism=lfk"], "--geometry=whitening: lfk has no M"),
        (["--geometry=balanced", "--mechanism=lfk"], "lfk has no coordinates; allowed: --mechanism=performer, dark"),
        (["--geometry=whitening", "--shrinkage=2"], "--shrinkage=2.0: must be from 0 to 1"),
        (["--shrinkage=0.1"], "--shrinkage=0.1: allowed: 0, or --geometry=whitening"),
        (["--learn_projections", "--mechanism=lfk"], "no lfk layer uses it; allowed: False"),
        (["--mechanism=performer", "--geometry_init=0.7"], "--geometry_init=0.7: performer does not use it"),
        (["--mechanism=window_only", "--num_features=7"], "--num_features=7: window_only does not use it"),
        (["--far_gain", "--window=0", "--num_sinks=0"], "far_gain = True needs window"),
        (["--window=7"], "model.attention.window = 7"),
        (["--window=0"], "model.attention.num_sinks = 2"),
        (["--passages=1"], "--passages=1: must be from 2 to"),
        (["--learning_rate=0"], "--learning_rate=0.0: must be between 0 and 1"),
        (
            ["--learning_rate=0.1", "--transfer_steps=0"],
            "--learning_rate=0.1: nothing is learned with --transfer_steps=0",
        ),
        (["--mechanism=softmax"], "argument --mechanism: invalid choice: 'softmax'"),
        (["--text={dir}/none.txt"], "no file matches"),
        (["--text={dir}/x.jsonl", "--text_field=body"], '{dir}/x.jsonl:1: no "body" field that is a string'),
        (["--out={dir}"], "{dir} is there already"),
        (["--exact_layers=auto:2"], "--exact_layers=auto:2: 2 layers can be replaced, and one at least must be"),
        (
            ["--exact_heads=auto:4"],
            "auto:4: of 4 key/value heads one at least must be replaced; allowed: 1 to 3",
        ),
        (["--exact_heads=auto"], "--exact_heads=auto; allowed: none, auto:N with N from 1, auto with"),
        (["--exact_heads=auto:1", "--exact_layers=auto:1"], "with --exact_layers=auto:1: allowed: one of them"),
        (["--exact_heads=auto", "--cache_budget=1kB@4096"], "--cache_budget=1kB@4096: is 0.001 MB; without an exact"),
        (["--exact_layers=5"], "there is no layer 5; allowed: 0 to 1"),
        (["--exact_layers=auto", "--cache_budget=1kB@4096"], "--cache_budget=1kB@4096: is 0.001 MB; without an exact"),
        (["--step=9"], "no checkpoint step 9 in"),
        (["--context=128"], "--context=128: a window of 64 shows all of it, so there is nothing to fit; allowed: "),
        (["--context=131", "--exact_heads=auto:1"], "--context=131: its repeated half lies 65 tokens back, where a"),
        (["--context=132", "--exact_layers=auto:1"], "allowed with auto: --context above 132, or a smaller --window"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(workdir, fitted, text, tmp_path, flags, message, capsys):
    (tmp_path / "x.jsonl").write_text("{}\n")
    names = {"dir": tmp_path, "fitted": fitted}
    with pytest.raises(SystemExit) as exit_:
        run(workdir, text, tmp_path / "out", *(flag.format(**names) for flag in flags))
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert message.format(**names) in printed.err and printed.err.count("\n") == 1, printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


@pytest.mark.parametrize(
    ("mechanism", "named"),
    [("dark", "layers 5,17: features give nothing that the window does not"), ("window_only", "")],
)
def test_layers_whose_features_add_nothing_to_the_window_are_named(mechanism, named):
    rows = [
        {"layer": 5, "window_only": [0.3, 0.2], "before": [0.3, 0.2], "after": [0.3, 0.2]},  # no gradient at all
        {"layer": 11, "window_only": [0.3, 0.2], "before": [0.9, 0.9], "after": [0.2, 0.1]},
        {"layer": 17, "window_only": [0.3, 0.2], "before": [0.3, 0.2], "after": [1.5, 1.2]},
        {"layer": 18, "window_only": [0.01, 0.0], "before": [0.4, 0.0], "after": [0.01, 0.0]},  # nothing to do
    ]
    flags = ("--workdir=exact", "--text=text", "--out=out", f"--mechanism={mechanism}")
    args = calibrate.parse_flags(["calibrate", *flags])
    calibrate.complete_flags(args)
    options = fitting.FitOptions(**{name: value for name, value in vars(args).items() if name != "out"})
    worth = Worth(Quality(3.0, 0.3), Quality(3.1, 0.4), None, 2)
    _, *lines = summary(options, args.out, fitting.Calibrated(rows, None, None, worth, 512)).splitlines()
    assert [line.partition(";")[0] for line in lines] == [*([named] if named else []), *worth.lines()]


def test_copying_inside_the_window_is_no_figure_of_the_features(workdir, text, tmp_path, capsys):
    run(workdir, text, tmp_path / "out", "--context=131", "--transfer_steps=0")
    assert "copy: the first copy lies in the window, 65 tokens back, so no feature is asked" in capsys.readouterr().out
