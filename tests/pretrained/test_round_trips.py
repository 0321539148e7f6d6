"""HF -> ours -> HF and ours -> HF -> ours change no bit; a model with mechanisms comes back whole."""

import json
import shutil

import numpy as np
import pytest

from darkformer_jax.config import base
from darkformer_jax.config.migrations import VERSION
from darkformer_jax.errors import UserError
from darkformer_jax.pretrained.export import export_workdir
from darkformer_jax.pretrained.own_format import write_code
from darkformer_jax.pretrained.safetensors_files import SafetensorsFiles
from darkformer_jax.runs.load import load_model
from darkformer_jax.runs.workdir import Workdir
from tests.pretrained.tiny_sources import BFLOAT16, CONFIG, import_source, llama_arrays, write_arrays, write_llama
from tests.tiny_runs import saved_arrays, tiny_config, write_workdir

pytestmark = pytest.mark.standard_promotion  # the state of a checkpoint is made with its optimizer


def whole_files(directory):
    """Every array of a directory's model."""
    files = SafetensorsFiles(str(directory))
    return {name: files.read(name, tuple(slice(0, n) for n in array.shape)) for name, array in files.arrays.items()}


@pytest.mark.parametrize(("stored", "dtype"), [(np.float32, None), (BFLOAT16, None), (np.float16, "float16")])
def test_hf_to_ours_to_hf(tmp_path, stored, dtype):
    source = write_llama(tmp_path / "hf", stored, max_position_embeddings=48)
    generation = {"eos_token_id": [1, 2], "temperature": 0.6}
    (source / "generation_config.json").write_text(json.dumps(generation))
    import_source(source, tmp_path / "workdir")
    export_workdir(Workdir(tmp_path / "workdir"), str(tmp_path / "out"), dtype=dtype, shard_bytes=3000)
    written = whole_files(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert written.keys() == llama_arrays().keys()
    for name, value in llama_arrays(stored).items():
        assert written[name].dtype == stored and written[name].tobytes() == value.tobytes(), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for name, value in (CONFIG | {"max_position_embeddings": 48}).items():
        assert config[name] == value, name
    assert config["torch_dtype"] == np.dtype(stored).name
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == generation
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "README.md").exists()


@pytest.mark.parametrize(
    ("pattern", "has_arrays"),
    [
        ("dark", True),
        ("softmax,dark,lfk", True),
        ("random,softmax_local(local_window=8)", True),
        # 0.25 is head_dim^-0.5, the scale of every family
        ("softmax(query_scale=0.25),dark(m=16,window=32,query_scale=0.5)", True),
        ("window_only(window=16),constant,linear_transformer", False),
    ],
)
def test_ours_to_hf_to_ours_with_mechanisms(tmp_path, pattern, has_arrays):
    config = tiny_config(
        model__num_layers=5,
        model__head_dim=16,
        model__qk_norm=True,
        model__attention__pattern=pattern,
        seed=7,
        data__tokenizer="",
    )
    write_workdir(tmp_path / "run", config)
    said = export_workdir(Workdir(tmp_path / "run"), str(tmp_path / "out"), as_exact=True)
    assert "Qwen3ForCausalLM" in said and "in darkformer.json and in darkformer.safetensors" in said
    assert "exact softmax attention" in (tmp_path / "out" / "README.md").read_text()
    assert_comes_back(tmp_path, config, has_arrays)


def assert_comes_back(tmp_path, config, has_arrays):
    """The import of tmp_path / "out" has every array and every field of the model of tmp_path / "run"."""
    copy = import_source(tmp_path / "out", tmp_path / "copy")
    before, after = saved_arrays(tmp_path / "run"), saved_arrays(tmp_path / "copy")
    kept = {name for name in before if "params" in name.split("'")[1] or "projections" in name.split("'")[1]}
    assert kept | {"['step']"} == after.keys()
    assert any(name.startswith("['projections']") for name in kept) == has_arrays
    for name in kept:
        assert before[name] == after[name], name
    assert copy.config.model.to_dict() == {**config.model.to_dict(), "vocab_size": 257}
    assert copy.config.seed == config.seed


GATES = {"model__attention__decay": "gate", "model__attention__conv_width": 4}


@pytest.mark.parametrize(
    ("pattern", "changes", "has_arrays"),
    [
        ("dark", {}, True),
        ("dark(learn_projections=True),hedgehog,linear_transformer", GATES, False),
        ("softmax,dark(window=32,num_sinks=3,far_gain=True,far_horizon=40,balanced=True),lfk(m=16)", GATES, True),
        ("softmax_local(local_window=8),performer", {"model__attention__positions": "alibi"}, True),
        ("window_only(window=16),cosformer(horizon=64)", {"model__attention__positions": "none"}, False),
        ("softmax(softcap=30.0),softmax", {}, False),
        ("softmax", {"model__attention__decay": "learned"}, False),
    ],
)
def test_ours_to_our_own_format_to_ours(tmp_path, pattern, changes, has_arrays):
    config = tiny_config(model__num_layers=5, model__attention__pattern=pattern, seed=7, data__tokenizer="", **changes)
    write_workdir(tmp_path / "run", config)
    said = export_workdir(Workdir(tmp_path / "run"), str(tmp_path / "out"), dtype="float32", shard_bytes=20_000)
    assert said.startswith("DarkformerForCausalLM on llama, step 3, ") and "trust_remote_code=True" in said
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    path = tmp_path / "out" / "config.json"
    content = json.loads(path.read_text())
    for layer in content["darkformer"]["pattern"]:  # as a machine that rounds otherwise would write them
        layer["frequencies"] = layer["frequencies"] and [1.000001 * number for number in layer["frequencies"]]
    path.write_text(json.dumps(content))
    assert_comes_back(tmp_path, config, has_arrays)


REFUSED = {
    "random": "its attention does not look at its input, .* --as_exact exports",
    "constant": "its attention does not look at its input, .* --as_exact exports",
    "mamba2": "the exported code does not compute this mixer",
    "rfa_gate": "the exported code does not compute this mixer",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_kind_that_the_exported_code_lacks_is_refused(tmp_path, kind):
    decay = {"model__attention__decay": "gate"} if kind == "rfa_gate" else {}
    write_workdir(tmp_path / "run", tiny_config(model__attention__kind=kind, **decay))
    with pytest.raises(UserError, match=rf"run: {kind}: {REFUSED[kind]}.*; allowed: softmax, "):
        export_workdir(Workdir(tmp_path / "run"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_exact_model_is_exported_as_it_is(tmp_path):
    write_workdir(tmp_path / "run", tiny_config(model__attention__kind="softmax"))
    with pytest.raises(UserError, match=r"--as_exact: .*run has exact attention already"):
        export_workdir(Workdir(tmp_path / "run"), str(tmp_path / "out"), as_exact=True)


def test_what_a_damaged_export_in_our_own_format_says(tmp_path):
    write_workdir(tmp_path / "run", tiny_config())
    export_workdir(Workdir(tmp_path / "run"), str(tmp_path / "out"))
    path = tmp_path / "out" / "config.json"
    content = json.loads(path.read_text())

    def refused(change, message):
        changed = json.loads(json.dumps(content))
        change(changed)
        path.write_text(json.dumps(changed))
        with pytest.raises(UserError) as error:
            import_source(tmp_path / "out", tmp_path / "copy")
        assert message in str(error.value) and "\n" not in str(error.value), str(error.value)

    own = lambda **changes: lambda values: values["darkformer"].update(changes)
    model = lambda **changes: lambda values: values["darkformer"]["model"].update(changes)
    refused(lambda values: values.pop("darkformer"), "config.json: darkformer must be an object of format 2")
    refused(own(format=3), "config.json: darkformer must be an object of format 2")
    refused(own(family="gpt2"), "darkformer.family = 'gpt2': allowed: llama, ")
    refused(own(version=VERSION + 1), f"darkformer is of version {VERSION + 1}, but this darkformer_jax reads 0 to")
    refused(model(sauce=1), "config.json: darkformer does not fit this version")
    refused(lambda values: values["darkformer"]["model"].pop("mlp_dim"), "darkformer: model.mlp_dim is missing")
    refused(model(mlp_dim=48), "darkformer.model.mlp_dim = 48, but the rest of the file says 32")
    features = lambda values: values["darkformer"]["model"]["attention"].update(num_features=4)
    refused(features, "darkformer.pattern says num_features = 8 of layer 0, and darkformer.model 4")

    refused(lambda values: values["darkformer"].update(pattern=["dark"]), "pattern has 'dark' for layer 0; allowed: an")

    def features_everywhere(values):
        features(values)
        values["darkformer"]["pattern"][0]["num_features"] = 4

    refused(features_everywhere, "mechanism.projections has shape [2, 8, 8]; config.json makes it [2, 4, 8]")


def test_an_export_from_before_versions_is_read_as_a_run_of_its_time(tmp_path):
    """Then configs/finetune.py set window_kernel for every kind; later fields are missing."""
    hybrid = {"model__attention__window": 16, "model__attention__pattern": "performer,window_only"}
    config = tiny_config(model__num_layers=2, data__tokenizer="", **hybrid)
    write_workdir(tmp_path / "run", config)
    export_workdir(Workdir(tmp_path / "run"), str(tmp_path / "out"), as_exact=True)
    path = tmp_path / "out" / "darkformer.json"
    content = json.loads(path.read_text())
    content.pop("version", None)
    for name, field in base.fields().items():
        if field.since:
            content["model"].pop(name.removeprefix("model."), None)
    content["model"]["attention.window_kernel"] = "softmax"
    path.write_text(json.dumps(content))
    copy = import_source(tmp_path / "out", tmp_path / "copy")
    assert copy.config.model.to_dict() == {**config.model.to_dict(), "vocab_size": 257}


GEMMA2 = {
    "model__norm_plus_one": True,
    "model__scale_embeddings": True,
    "model__post_norms": True,
    "model__activation": "gelu_tanh",
}


@pytest.mark.parametrize(
    ("pattern", "changes"),
    [
        ("softmax(softcap=30.0,query_scale=0.5)", GEMMA2),
        ("softmax_local(local_window=8),softmax", {"model__qk_norm": True}),
    ],
)
def test_options_of_exact_layers_go_out_and_come_back(tmp_path, pattern, changes):
    write_workdir(tmp_path / "run", tiny_config(model__num_layers=2, model__attention__pattern=pattern, **changes))
    export_workdir(Workdir(tmp_path / "run"), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "darkformer.json").exists()
    copy = import_source(tmp_path / "out", tmp_path / "copy")

    def used(model):
        return [(x.kind, x.softcap, x.query_scale, x.local_window) for x in model.network.spec.layers]

    assert used(copy) == used(load_model(Workdir(tmp_path / "run")))


def test_a_model_trained_here_goes_out_as_the_family_it_fits(tmp_path):
    write_workdir(tmp_path / "run", tiny_config(model__attention__kind="softmax", sequence_length=32))
    assert "LlamaForCausalLM, step 3" in export_workdir(Workdir(tmp_path / "run"), str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["max_position_embeddings"]) == (257, 32)
    assert (config["bos_token_id"], config["eos_token_id"]) == (256, 256)
    write_workdir(tmp_path / "other", tiny_config(model__attention__kind="softmax", model__logit_softcap=30.0))
    with pytest.raises(UserError, match=r"other: no Hugging Face family has this model; .*model.logit_softcap = 30.0"):
        export_workdir(Workdir(tmp_path / "other"), str(tmp_path / "refused"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out", "run"]


def test_what_a_damaged_or_contradictory_export_says(tmp_path):
    write_workdir(tmp_path / "run", tiny_config())
    export_workdir(Workdir(tmp_path / "run"), str(tmp_path / "whole"), as_exact=True)
    content = json.loads((tmp_path / "whole" / "darkformer.json").read_text())

    assert content["version"] == VERSION

    def refused(change, message):
        shutil.copytree(tmp_path / "whole", tmp_path / "out")
        change(tmp_path / "out")
        with pytest.raises(UserError) as error:
            import_source(tmp_path / "out", tmp_path / "copy")
        assert message in str(error.value) and "\n" not in str(error.value), str(error.value)
        shutil.rmtree(tmp_path / "out")

    def with_model(**changes):
        changed = content | {"model": content["model"] | changes}
        return lambda path: (path / "darkformer.json").write_text(json.dumps(changed))

    refused(with_model(mlp_dim=48), "darkformer.json: model.mlp_dim = 48, but config.json beside it says 32")
    without = {name: value for name, value in content["model"].items() if name != "mlp_dim"}
    incomplete, newer = content | {"model": without}, content | {"version": VERSION + 1}
    refused(
        lambda path: (path / "darkformer.json").write_text(json.dumps(incomplete)),
        "darkformer.json: model.mlp_dim is missing",
    )
    refused(
        lambda path: (path / "darkformer.json").write_text(json.dumps(newer)),
        f"darkformer.json is of version {VERSION + 1}, but this darkformer_jax reads 0 to {VERSION}",
    )
    refused(with_model(sauce=1), "darkformer.json does not fit this version")
    refused(with_model(**{"attention.num_features": 4}), "darkformer.json makes it")
    refused(lambda path: (path / "darkformer.json").write_text('{"format": 2}'), "format = 2: allowed: 1")
    refused(lambda path: (path / "darkformer.safetensors").unlink(), "holds no darkformer.safetensors")


def test_a_workdir_of_many_rows_keeps_their_order(tmp_path):
    arrays = llama_arrays()
    write_arrays(write_llama(tmp_path / "hf", model_type="mistral", architectures=None, sliding_window=8), arrays)
    import_source(tmp_path / "hf", tmp_path / "workdir")
    export_workdir(Workdir(tmp_path / "workdir"), str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 8)
    for name, value in whole_files(tmp_path / "out").items():
        np.testing.assert_array_equal(value, arrays[name])


def test_an_exports_readme_says_which_layers_have_exact_heads(tmp_path):
    pattern = "dark,softmax,dark(exact_kv_heads=1),dark(exact_kv_heads=1)"
    config = tiny_config(model__num_layers=4, model__attention__pattern=pattern)
    write_code(tmp_path, config, None)
    wanted = "layer by layer: 1 x dark, 1 x softmax, 2 x dark (1 of 2 key/value heads exact).\n"
    assert wanted in (tmp_path / "README.md").read_text()
