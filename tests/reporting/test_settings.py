import json

from configs import ablation
from darkformer_jax.reporting.settings import is_comparable, origin_of, settings_of
from darkformer_jax.runs.workdir import Workdir
from tests.tiny_runs import tiny_config


def test_settings_are_the_fields_that_the_mechanism_uses():
    def settings(arguments, **changes):
        config = ablation.get_config(arguments)
        config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
        return settings_of(config.to_dict(), "run")

    assert settings("attention=dark,seed=1") == settings("attention=dark", log__every=5, mesh__data=2, data__files="x")
    assert settings("attention=performer,geometry_lr=1") == settings("attention=performer")
    assert settings("attention=softmax", model__attention__num_features=8) == settings("attention=softmax")
    assert settings("attention=dark", model__attention__pattern="softmax,dark")["mechanism"] == "softmax,dark"
    assert settings("attention=dark", task__name="classification") != settings("attention=dark")
    for other in ("attention=dark,lr=1", "attention=dark,m=8", "attention=dark,steps=9", "attention=dark,window=64"):
        assert settings(other) != settings("attention=dark")


def test_dark_is_compared_layer_by_layer_and_from_the_same_start():
    def settings(pattern, **changes):
        config = ablation.get_config()
        fields = {"model.attention.pattern": pattern, "model.attention.local_window": 8, **changes}
        config.update_from_flattened_dict(fields)
        return settings_of(config.to_dict(), "run")

    dark = settings("softmax_local,dark")
    assert is_comparable(dark, settings("softmax_local,performer"), "performer")
    assert is_comparable(dark, settings("softmax_local,softmax"), "exact")
    assert is_comparable(dark, settings("softmax_local"), "exact")
    for other in ("performer", "softmax_local,performer,softmax_local,dark", "softmax,performer"):
        assert not is_comparable(dark, settings(other), "performer")
    for change in (
        {"optimizer.learning_rate": 1.0},
        {"init_from": "runs/other"},
        {"model.attention.num_features": 8},
        {"model.attention.local_window": 16},  # of the exact layers, which both have
        {"model.num_layers": 6},
    ):
        assert not is_comparable(dark, settings("softmax_local,performer", **change), "performer")
    other_rate = settings("softmax_local,performer", **{"optimizer.learning_rate": 1.0})
    assert is_comparable(dark, other_rate, "performer", ("optimizer.learning_rate",))


def test_calibrations_that_differ_in_the_seed_and_what_was_found_with_it_are_one_origin(tmp_path):
    options = {"mechanism": "dark", "exact_heads": "auto:2"}
    found = [
        {"seed": seed, "layers": [seed], "heads": {"curve": [seed]}, "exact": {"curve": [seed]}} for seed in (0, 1)
    ]
    origins = []
    for name, content in (("a", options | found[0]), ("b", options | found[1]), ("c", {"mechanism": "dark"})):
        Workdir(tmp_path / name).write_config(tiny_config().to_dict())
        (tmp_path / name / "calibration.json").write_text(json.dumps(content))
        origins.append(origin_of(str(tmp_path / name)))
    assert origins[0] == origins[1]
    assert origins[0]["calibration"]["exact_heads"] == "auto:2" and origins[2]["calibration"]["exact_heads"] == "none"
