"""What --exact_layers and --cache_budget ask for, the order of the layers, and the pattern that comes of it."""

import pytest

from darkformer_jax.calibration.cache_budget import CacheSizes
from darkformer_jax.calibration.exact_layers import check_wish, hybrid_pattern, parse_wish, ranking
from darkformer_jax.calibration.hybrids import Quality
from darkformer_jax.calibration.quality_curve import Point, counts_of, curve_lines, draw_curve
from darkformer_jax.config.specs import model_spec
from darkformer_jax.errors import UserError
from tests.tiny_runs import tiny_config

HYBRID = {"model__attention__window": 16, "model__attention__num_sinks": 2}


def configs(exact="softmax", replaced="dark", num_layers=4, **changes):
    local = {"model__attention__local_window": 8} if "local" in exact else {}
    changes |= {"model__num_layers": num_layers, **local}
    before = tiny_config(**changes, model__attention__kind="softmax", model__attention__pattern=exact)
    return before, tiny_config(**changes, **HYBRID, model__attention__pattern=replaced)


def specs(*args, **changes):
    return [model_spec(config, 257) for config in configs(*args, **changes)]


def checked(exact_layers, cache_budget="", *models, **changes):
    return check_wish(parse_wish(exact_layers, cache_budget), *specs(*models, **changes))


def test_what_is_asked_for():
    assert checked("none") == parse_wish("none", "")
    assert checked("3,0").layers == (0, 3)
    assert checked("auto:3").number == 3
    assert not checked("0").is_auto and checked("auto:1").is_auto


def test_a_budget_is_a_number_of_layers():
    sizes = CacheSizes.of(*specs(), 4096)
    assert sizes.exact[0] == 4096 * (2 * 2 * 8 * 4 + 8) + 4  # keys and values of two heads of 8, two numbers per token
    assert sizes.total(range(4)) == 4 * sizes.exact[0] and sizes.replaced[0] < sizes.exact[0] / 10
    for count in (1, 2, 3):
        budget = sizes.total(range(count)) / 1000
        assert checked("auto", f"{budget:.3f}kB@4096").number == count
        if count > 1:
            assert checked("auto", f"{budget - 0.001:.3f}kB@4,096").number == count - 1
    half = checked("auto", "60%@4096")
    assert half.number == 2 and half.budget.context == 4096


def test_local_layers_take_part_in_no_count():
    models = ("softmax_local,softmax", "softmax_local,dark")
    assert checked("3", "", *models).layers == (3,)
    with pytest.raises(UserError, match="layer 2 is softmax_local and stays as it is anyway"):
        checked("2", "", *models)
    with pytest.raises(UserError, match="auto:2: 2 layers can be replaced, and one at least must be; allowed: 1 to 1"):
        checked("auto:2", "", *models)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("4",), "there is no layer 4; allowed: 0 to 3"),
        (("-1",), "there is no layer -1; allowed: 0 to 3"),
        (("1,1",), "--exact_layers=1,1: a layer is there twice"),
        (("1;2",), "--exact_layers=1;2: allowed: none, numbers of layers such as 3,17, or auto:N"),
        (("",), "--exact_layers=: allowed: none, numbers"),
        (("auto:0",), "--exact_layers=auto:0: allowed: none"),
        (("auto:x",), "--exact_layers=auto:x: allowed: none"),
        (("auto:99",), "auto:99: 4 layers can be replaced, and one at least must be; allowed: 1 to 3"),
        (("0,1,2,3",), "names all of the 4 layers; allowed: fewer, or there is nothing to replace"),
        (("auto",), "--exact_layers=auto: how many? allowed: auto:N, or auto with --cache_budget=64MB@32768"),
        (("auto:2", "20%@4096"), "with --exact_layers=auto:2; allowed: --exact_layers=auto or --exact_heads=auto"),
        (("none", "20%@4096"), "with --exact_layers=none; allowed: --exact_layers=auto or --exact_heads=auto"),
        (("auto", "20@4096"), "--cache_budget=20@4096: allowed: bytes or a share"),
        (("auto", "1MB"), "--cache_budget=1MB: allowed: bytes or a share"),
        (("auto", "1MB@0"), "--cache_budget=1MB@0: 0 is no number of tokens"),
        (("auto", "1kB@4096"), "without an exact layer the model needs 0.0211 MB, with one 0.573 MB"),
        (("auto", "100%@4096"), "there is nothing to replace"),
        (("auto", "1GB@4096"), "there is nothing to replace"),
    ],
)
def test_a_mistake_names_what_is_allowed(flags, message):
    with pytest.raises(UserError) as error:
        checked(*flags)
    assert message in str(error.value)


def test_the_orders_take_turns_and_name_no_layer_twice():
    base = Quality(3.0, 0.5)
    alone = [Quality(3.0 + loss, 0.5 + copy) for loss, copy in ((0.1, 0.0), (0.4, 0.9), (0.3, 0.2), (0.2, 0.3))]
    # by copying: 5 7 6 4; by loss: 5 6 7 4
    assert ranking(alone, base, [4, 5, 6, 7]) == [5, 6, 7, 4]


@pytest.mark.parametrize(
    ("models", "layers", "pattern"),
    [
        (("softmax", "dark"), [1], "dark,softmax,dark"),  # and again: dark
        (("softmax", "dark"), [0, 2], "softmax,dark"),  # what repeats is written once
        (("softmax_local,softmax", "softmax_local,dark"), [3], "softmax_local,dark,softmax_local,softmax"),
        (("softmax(softcap=5.0)", "dark(num_features=4)"), [0], "softmax(softcap=5.0)" + 3 * ",dark(num_features=4)"),
    ],
)
def test_the_pattern_has_the_layers_of_either_model(models, layers, pattern):
    assert hybrid_pattern(*configs(*models), layers) == pattern


def test_the_curve_has_the_choice_and_the_exact_model():
    assert counts_of(3, 30) == [0, 2, 3, 4, 6, 8, 30]
    assert counts_of(10, 30) == [0, 2, 4, 6, 8, 10, 12, 30]
    assert counts_of(1, 3) == [0, 1, 2, 3]


def test_the_table_and_the_picture(tmp_path):
    points = [Point([], 3.3, 3.0, 10**6), Point([5], 3.15, 1.0, 10**7), Point([5, 2], 3.0, 0.5, 10**9)]
    lines = curve_lines(points, chosen=1, context=4096)
    assert lines[0].split() == [
        "exact",
        "layers",
        "loss",
        "over",
        "exact",
        "copy",
        "cache",
        "at",
        "4,096",
        "of",
        "exact",
    ]
    assert lines[2].split() == ["1*", "3.1500", "5.00%", "1.000", "10", "MB", "1.0%"]
    assert lines[3].split() == ["all", "3.0000", "0.00%", "0.500", "1,000", "MB", "100.0%"]
    assert lines[4].startswith("* chosen: layers 5 stay exact.")
    draw_curve(points, 1, 4096, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
