"""Workdirs of earlier versions: versions/ has the config.json that the defaults gave at each of them, as it was."""

import importlib
import json
from pathlib import Path

import pytest

from darkformer_jax.config import base
from darkformer_jax.config.fields import flat_fields
from darkformer_jax.config.migrations import VERSION
from darkformer_jax.config.specs import model_spec
from darkformer_jax.config.validation import from_json, validate
from darkformer_jax.errors import UserError
from darkformer_jax.runs.inherit import inherit
from darkformer_jax.runs.workdir import Workdir

VERSIONS = sorted((Path(__file__).parent / "versions").glob("*.json"))

# What a run did before there was a field for it.
MEANT = {
    "data.text_field": "text",
    "distill.hidden_weight": 0.0,
    "distill.weight": 0.0,
    "eval.patience": 0,
    "log.trackers": "",
    "mesh.context": 1,
    "model.attention.backend": "auto",
    "model.attention.balanced": False,
    "model.attention.conv_width": 0,
    "model.attention.exact_kv_heads": 0,
    "model.attention.decay": "none",
    "model.attention.far_gain": False,
    "model.attention.far_horizon": 0,
    "model.attention.horizon": 0,
    "model.attention.learn_projections": False,
    "model.attention.local_window": 0,
    "model.attention.positions": "rope",
    "model.attention.query_scale": 0.0,
    "model.attention.softcap": 0.0,
    "model.attention.window_kernel": "dark",
    "model.lora_rank": 0,
    "model.norm_plus_one": False,
    "model.post_norms": False,
    "model.qkv_bias": False,
    "model.rope_scaling": "none",
    "optimizer.train": "all",
    "profile.first_step": 0,
}


@pytest.mark.parametrize("path", VERSIONS, ids=lambda path: path.stem)
def test_a_config_of_each_version_means_what_it_meant(path, tmp_path):
    saved = json.loads(path.read_text())
    saved["model"]["attention"] |= {"kind": "performer", "num_features": 48, "window": 256, "num_sinks": 3}
    saved["model"] |= {"rope_theta": 500.0, "tie_embeddings": not saved["model"]["tie_embeddings"]}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config = Workdir(tmp_path).read_config()
    saved.pop("version", None)
    before, now = dict(flat_fields(saved)), dict(flat_fields(config))
    assert now.items() >= before.items()
    assert {name: now[name] for name in MEANT} == {name: before.get(name, meant) for name, meant in MEANT.items()}
    read = from_json(config)
    validate(read)
    for layer in model_spec(read, 257).layers:
        assert (layer.kind, layer.num_features, layer.window, layer.num_sinks) == ("performer", 48, 256, 3)


@pytest.mark.parametrize("path", VERSIONS, ids=lambda path: path.stem)
def test_the_model_that_the_defaults_gave_at_each_version_is_the_one_they_give(path, tmp_path):
    (tmp_path / "config.json").write_text(path.read_text())
    workdir = Workdir(tmp_path)
    read = from_json(workdir.read_config())
    validate(read)
    assert model_spec(read, 257) == model_spec(base.get_config(), 257)
    workdir.write_config(read.to_dict())  # the run goes on
    assert workdir.read_config() == json.loads(json.dumps(read.to_dict()))


def test_the_first_and_todays_format_have_a_file():
    assert {json.loads(path.read_text()).get("version", 0) for path in VERSIONS} >= {0, VERSION}


FINE_TUNED = sorted((Path(__file__).parent / "fine_tuned").glob("*.json"))


@pytest.mark.parametrize("path", FINE_TUNED, ids=lambda path: path.stem)
def test_a_run_of_every_mechanism_that_the_former_configs_made_goes_on_with_todays(path, tmp_path):
    """fine_tuned/ has what configs/finetune.py and configs/paper.py made before version 2, filled in."""
    (tmp_path / "config.json").write_text(path.read_text())
    experiment, _, kind = path.stem.partition("_")
    arguments = f"{kind},window=32" if path.stem == "paper_window_only" else kind
    config = importlib.import_module(f"configs.{experiment}").get_config(arguments)
    config.init_from = "source"
    workdir = Workdir(tmp_path)
    config = inherit(config, workdir)
    validate(config)
    workdir.check_config(config.to_dict())
    config.model.attention.update({"softmax": {"softcap": 3.0}}.get(kind, {"chunk_size": 16}))
    with pytest.raises(UserError, match="belongs to another experiment"):
        workdir.check_config(config.to_dict())
