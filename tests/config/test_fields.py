"""A field is declared once: its default, its range, its history."""

import pytest

from darkformer_jax.config import base
from darkformer_jax.config.fields import Section, anything, at_least, default_config, flat_fields, flat_section
from darkformer_jax.errors import UserError


def test_every_field_of_the_config_is_declared_and_has_an_allowed_default():
    values = dict(flat_fields(base.get_config().to_dict()))
    assert values.keys() == base.fields().keys()
    for name, field in base.fields().items():
        field.check(name, values[name])


def test_what_a_field_needs_is_a_field_beside_it():
    for name, field in base.fields().items():
        assert not field.needs or f"{name.rpartition('.')[0]}.{field.needs}" in base.fields()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1, "n = 1: must be at least 2"),
        (2.5, "n = 2.5: must be int"),
        (True, "n = True: must be int"),
        ("3", "n = '3': must be int"),
        (None, "n = None: must be int"),
    ],
)
def test_a_value_of_another_type_or_out_of_range_is_refused(value, message):
    with pytest.raises(UserError, match=message):
        at_least(2, 3).check("n", value)


def test_json_may_write_a_whole_float_as_an_integer_and_a_tuple_as_a_list():
    at_least(0, 1.0).check("x", 2)
    anything(()).check("x", [])


def test_sections_nest():
    section = Section(a=at_least(0, 1), inner=Section(b=anything("x")))
    assert [name for name, _ in flat_section(section)] == ["a", "inner.b"]
    assert default_config(section).to_dict() == {"a": 1, "inner": {"b": "x"}}
