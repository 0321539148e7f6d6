"""A field is declared once: its default, its range, its history."""

import pytest

from darkformer_jax.config import base
from darkformer_jax.config.fields import (
    Section,
    anything,
    at_least,
    default_config,
    flat_fields,
    flat_section,
    fraction,
    positive,
)
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


@pytest.mark.parametrize(
    ("text", "number"),
    [("12", 12), ("-1", -1), ("1e3", 1000), ("1.5e1", 15), ("1_000", 1000), ("2.0", 2), ("0x10", 16)],
)
def test_a_whole_number_may_be_written_in_any_way_that_spells_it_exactly(text, number):
    assert at_least(-2, 3).parse(text) == number and type(at_least(-2, 3).parse(text)) is int


@pytest.mark.parametrize("text", ["many", "", "1.5", "1e-1", "1e999999999", "inf", "nan", "1,000", "0x"])
def test_a_text_that_spells_no_whole_number_is_refused_in_words(text):
    with pytest.raises(ValueError, match="^must be a whole number and at least -2$"):
        at_least(-2, 3).parse(text)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (positive(1.0), "must be a number and positive"),
        (fraction(0.5, high=")"), r"must be a number and in \[0, 1\)"),
        (anything(1), "must be a whole number"),
        (anything(True), "must be True or False"),
    ],
)
def test_every_type_says_what_it_allows(field, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        field.parse("x")


def test_json_may_write_a_whole_float_as_an_integer_and_a_tuple_as_a_list():
    at_least(0, 1.0).check("x", 2)
    anything(()).check("x", [])


def test_sections_nest():
    section = Section(a=at_least(0, 1), inner=Section(b=anything("x")))
    assert [name for name, _ in flat_section(section)] == ["a", "inner.b"]
    assert default_config(section).to_dict() == {"a": 1, "inner": {"b": "x"}}
