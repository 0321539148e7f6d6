"""Which wishes for exact heads a model can have."""

import pytest

from darkformer_jax.calibration.head_choice import check_head_wish, parse_head_wish
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
        check_head_wish(parse_head_wish("auto:1", ""), *specs(**attention))


@pytest.mark.parametrize("attention", [{"positions": "none"}, {"decay": "gate"}, {"conv_width": 2}])
def test_other_heads_can_be_in_any_order(attention):
    check_head_wish(parse_head_wish("auto:1", ""), *specs(**attention))
