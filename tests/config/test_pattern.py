"""Patterns of mixers, with options of a layer's own."""

import pytest

from darkformer_jax.config import base
from darkformer_jax.config.pattern import parse_pattern, pattern_kinds, show_layer
from darkformer_jax.config.specs import mixer_specs
from darkformer_jax.config.validation import validate
from darkformer_jax.errors import UserError


def with_pattern(pattern, **attention):
    config = base.get_config()
    config.model.attention.update({"pattern": pattern, **attention})
    return config


def test_a_pattern_is_kinds_and_without_one_the_kind_is_everywhere():
    assert pattern_kinds("softmax, dark,dark", "lfk") == ("softmax", "dark", "dark")
    assert pattern_kinds("", "lfk") == pattern_kinds(None, "lfk") == ("lfk",)


def test_two_dark_layers_may_have_different_features_and_windows():
    config = with_pattern("softmax, dark(m=128, window=64, chunk=32), dark", num_features=16)
    validate(config)
    softmax, wide, plain = mixer_specs(config)
    assert (wide.num_features, wide.window, wide.chunk_size) == (128, 64, 32)
    assert (plain.num_features, plain.window, plain.chunk_size) == (16, 0, 128)
    assert softmax.window == 0


def test_options_have_the_types_of_their_fields():
    (layer,) = parse_pattern("dark(init=0.5,learn_projections=true,projections=iid)", "dark")
    assert layer.options == {"geometry_init": 0.5, "learn_projections": True, "projections": "iid"}
    assert parse_pattern(show_layer(layer), "softmax") == (layer,)


def test_a_field_that_one_kind_uses_is_off_for_the_others():
    dark, noise = mixer_specs(with_pattern("dark,random", window=128, num_sinks=4))
    assert (dark.window, dark.num_sinks, noise.window, noise.num_sinks) == (128, 4, 0, 0)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "dark(mm=3)",
            r"pattern has dark\(mm=3\): dark has no option 'mm'; allowed: balanced, chunk_size, conv_width, decay",
        ),
        (
            "softmax(m=3)",
            r"has softmax\(m=3\): softmax has no option 'num_features'; allowed: conv_width, .*query_scale",
        ),
        ("constant(m=3)", r"constant has no option 'num_features'; allowed: chunk_size, conv_width"),
        ("dark(m=x)", r"pattern has dark\(m=x\): num_features must be a whole number and at least 1"),
        ("dark(m)", r"pattern has dark\(m\): num_features must be a whole number and at least 1"),
        ("dark(far_gain=maybe)", r"far_gain must be True or False"),
        ("dark(m=0)", r"pattern has dark\(m=0\): num_features = 0: must be at least 1"),
        ("dark(projections=some)", r"projections = 'some': allowed: iid, orthogonal"),
        ("dark(redraw_every=3)", r"dark has no option 'redraw_every'"),
        ("dark(backend=scan)", r"dark has no option 'backend'"),
        ("dark(m=3", r"pattern has 'dark\(m=3': must be kind or kind\(option=value,option=value\)"),
        ("dark(m=3,num_features=4)", r"pattern has dark\(m=3,num_features=4\): num_features is there twice"),
        ("dark(,)", r"pattern has dark\(\): dark has no option ''"),
        ("dark(window=64)", r"model.attention.window = 64 is not a multiple of chunk_size = 128"),
        ("dark(sinks=2)", r"model.attention.num_sinks = 2 needs window, but model.attention.window = 0$"),
    ],
)
def test_what_an_entry_refuses(pattern, message):
    with pytest.raises(UserError, match=message) as raised:
        validate(with_pattern(pattern))
    assert "\n" not in str(raised.value)
