"""config.json from one version to the next."""

import json

import pytest

from darkformer_jax.config import base
from darkformer_jax.config.fields import flat_fields
from darkformer_jax.config.migrations import VERSION, migrate, with_version
from darkformer_jax.config.validation import from_json, validate
from darkformer_jax.errors import UserError


def saved(version=None, **changes):
    config = base.get_config()
    config.update_from_flattened_dict(changes)
    as_json = json.loads(json.dumps(config.to_dict()))
    return as_json if version is None else as_json | {"version": version}


def test_todays_config_is_read_as_it_is():
    assert migrate(with_version(saved()), "config.json") == saved()


@pytest.mark.parametrize("version", [None, 0, 1])
def test_a_field_that_came_later_means_what_runs_did_before_it(version):
    old = saved(version)
    younger = [name for name, field in base.fields().items() if field.since > (version or 0)]
    assert younger
    for name in younger:
        *sections, field = name.split(".")
        section = old
        for part in sections:
            section = section[part]
        del section[field]
    now = dict(flat_fields(migrate(old, "config.json")))
    assert {name: now[name] for name in younger} == {name: base.fields()[name].default for name in younger}


def test_a_field_that_the_versions_own_file_lacks_is_not_made_up():
    broken = with_version(saved())
    del broken["model"]["causal"]
    assert "causal" not in migrate(broken, "config.json")["model"]


def test_version_2_takes_back_a_window_kernel_that_no_layer_uses():
    window = {"model.attention.window": 128, "model.attention.window_kernel": "softmax"}
    for changes, kernel in (
        ({"model.attention.kind": "performer"}, "dark"),
        ({"model.attention.kind": "dark"}, "softmax"),
        ({"model.attention.kind": "softmax", "model.attention.pattern": "lfk, dark"}, "softmax"),
        ({"model.attention.kind": "dark", "model.attention.pattern": "lfk,softmax"}, "dark"),
    ):
        config = from_json(migrate(saved(**window, **changes), "config.json"))
        assert config.model.attention.window_kernel == kernel
        validate(config)


@pytest.mark.parametrize("version", [VERSION + 1, -1, "2", True])
def test_a_version_that_is_not_known_is_refused(version):
    end = "; use a newer one" if version == VERSION + 1 else ""
    with pytest.raises(UserError, match=f"runs/a/config.json is of version .*reads 0 to {VERSION}{end}$"):
        migrate(saved(version), "runs/a/config.json")


@pytest.mark.parametrize("version", [0, 1, VERSION])
def test_a_field_in_the_place_of_a_section_is_refused(version):
    with pytest.raises(UserError, match=r"runs/a/config.json: attention = \[\]: must be a section with fields"):
        migrate(saved(version) | {"model": {"attention": []}}, "runs/a/config.json")
