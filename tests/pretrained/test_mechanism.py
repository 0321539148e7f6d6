"""Which models have files of our own beside Hugging Face's, and what their config.json says of attention."""

import pytest

from darkformer_jax.config.fields import flat_fields
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from darkformer_jax.pretrained.mechanism import exact_fields, is_exact
from tests.tiny_runs import tiny_config


def fields(pattern, **changes):
    config = tiny_config(model__num_layers=4, model__attention__pattern=pattern, **changes)
    return dict(flat_fields(config.model.to_dict()))


@pytest.mark.parametrize("kind", MIXERS)
def test_one_layer_of_a_mechanism_makes_a_model_inexact_with_or_without_arrays(kind):
    assert is_exact(fields(f"softmax,softmax_local,{kind}")) == (kind in ("softmax", "softmax_local"))


@pytest.mark.parametrize(
    ("pattern", "exact"),
    [
        ("softmax", ("softmax", "", 0.0, 0.0, 0)),
        ("softmax(softcap=30.0,query_scale=0.5)", ("softmax", "", 30.0, 0.5, 0)),
        ("softmax(softcap=30.0),dark(m=16)", ("softmax", "", 30.0, 0.0, 0)),
        ("softmax(query_scale=0.5),dark,constant", ("softmax", "", 0.0, 0.5, 0)),
        ("dark(query_scale=0.5),linear_transformer", ("softmax", "", 0.0, 0.5, 0)),
        ("softmax_local(local_window=8),dark", ("softmax", "softmax_local,softmax", 0.0, 0.0, 8)),
    ],
)
def test_the_exact_model_has_the_options_of_its_layers(pattern, exact):
    names = ("kind", "pattern", "softcap", "query_scale", "local_window")
    found = exact_fields(fields(pattern), "runs/a")
    assert tuple(found[f"attention.{name}"] for name in names) == exact


@pytest.mark.parametrize(
    ("pattern", "difference"),
    [
        ("softmax(softcap=30.0),softmax,dark", "softcap is 0.0 in some layers and 30.0 in others"),
        ("softmax_local(query_scale=0.5),softmax", "query_scale is 0.0 in some layers and 0.5 in others"),
        ("softmax_local,softmax_local(local_window=4)", "local_window is 4 in some layers and 8 in others"),
        ("dark,lfk(query_scale=0.5)", "query_scale is 0.0 in some layers and 0.5 in others"),
    ],
)
def test_a_difference_between_layers_that_no_family_has_is_named(pattern, difference):
    with pytest.raises(UserError) as error:
        exact_fields(fields(pattern, model__attention__local_window=8), "runs/a")
    assert str(error.value).startswith(f"runs/a: {difference}, by model.attention.pattern = {pattern!r}; ")
