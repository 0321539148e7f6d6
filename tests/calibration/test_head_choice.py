"""Which wishes for exact heads a model can have."""

import pytest

from darkformer_jax.calibration.exact_layers import check_wish
from darkformer_jax.calibration.head_choice import check_head_wish, parse_wishes
from darkformer_jax.config.specs import model_spec
from darkformer_jax.errors import UserError
from tests.tiny_runs import tiny_config


def specs(**attention):
    """An exact model with these options, and the same with features in every layer."""
    options = {f"model__attention__{name}": value for name, value in attention.items()}
    both = (tiny_config(**options, model__num_layers=2, model__attention__kind=kind) for kind in ("softmax", "dark"))
    return [model_spec(config, 257) for config in both]


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"positions": "alibi"}, "the heads of layer 0 have ALiBi's slopes by their number"),
        ({"positions": "rope+alibi"}, r"\(positions = 'rope\+alibi'\), and another order would change them"),
        ({"decay": "gate", "undecayed_heads": 1}, "the last heads of layer 0 do not decay"),
    ],
)
def test_heads_that_are_what_they_are_by_their_place_stay_where_they_are(attention, message):
    with pytest.raises(UserError, match=message):
        check_head_wish(1, *specs(**attention))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("0:1,1:0+0", "names head 0 of layer 1 twice"),
        ("2:0", "there is no layer 2; allowed: 0 to 1"),
        ("0:2", "layer 0 has no key/value head 2; allowed: 0 to 1"),
        ("0:0+1,1:0+1", "of 4 key/value heads one at least must be replaced"),
        ("0", "allowed: none, auto:N .* or heads by layer, 5:2,20:1[+]2"),
        ("0:1,", "allowed: none, auto:N"),
        ("0:-1", "allowed: none, auto:N"),
        ("0:¹", "allowed: none, auto:N"),
    ],
)
def test_heads_that_are_named_are_there(given, message):
    with pytest.raises(UserError, match=message):
        check_head_wish(parse_wishes("none", given, "")[1], *specs())


def test_named_heads_take_no_budget_and_leave_no_layer_that_is_local_anyway():
    with pytest.raises(UserError, match="--exact_heads=0:1 with --cache_budget=20%@99; allowed"):
        parse_wishes("none", "0:1", "20%@99")
    local = specs(pattern="softmax_local,softmax", local_window=8)
    with pytest.raises(UserError, match="layer 0 is softmax_local and stays as it is anyway"):
        check_head_wish(((0, 1),), local[0], specs(pattern="softmax_local,dark", local_window=8)[1])


@pytest.mark.parametrize(("wish", "part"), [(("auto", "none"), "layer"), (("none", "auto"), "head")])
def test_where_the_exact_model_is_the_smaller_one_no_budget_is_named(wish, part):
    layers, heads = parse_wishes(*wish, "100%@1")
    message = f"at 1 tokens the exact model needs .* exact {part} .* more tokens behind the @"
    with pytest.raises(UserError, match=message):
        check_head_wish(heads, *specs()) if heads else check_wish(layers, *specs())


@pytest.mark.parametrize("attention", [{"positions": "none"}, {"decay": "gate"}, {"conv_width": 2}])
def test_other_heads_can_be_in_any_order(attention):
    check_head_wish(1, *specs(**attention))


@pytest.mark.parametrize(("heads", "allowed"), [(1, "of 1 .* allowed: none$"), (2, "of 2 .* allowed: 1 to 1$")])
def test_one_head_at_least_is_replaced(heads, allowed):
    changes = {"model__num_layers": 1, "model__num_heads": 2, "model__num_kv_heads": heads}
    both = (model_spec(tiny_config(model__attention__kind=kind, **changes), 257) for kind in ("softmax", "dark"))
    with pytest.raises(UserError, match=allowed):
        check_head_wish(2, *both)
