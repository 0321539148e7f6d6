"""HF -> ours -> HF and ours -> HF -> ours change no bit; a model with mechanisms comes back whole."""

import json
import shutil

import numpy as np
import pytest

from darkformer_jax.errors import UserError
from darkformer_jax.pretrained.export import export_workdir
from darkformer_jax.pretrained.safetensors_files import SafetensorsFiles
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


@pytest.mark.parametrize("pattern", ["dark", "softmax,dark,lfk", "random,softmax_local"])
def test_ours_to_hf_to_ours_with_mechanisms(tmp_path, pattern):
    local = {"model__attention__local_window": 8} if "local" in pattern else {}
    config = tiny_config(
        model__num_layers=5, model__qk_norm=True, model__attention__pattern=pattern, seed=7, data__tokenizer="", **local
    )
    write_workdir(tmp_path / "run", config)
    said = export_workdir(Workdir(tmp_path / "run"), str(tmp_path / "out"))
    assert "Qwen3ForCausalLM" in said and "in darkformer.safetensors" in said
    assert "exact softmax attention" in (tmp_path / "out" / "README.md").read_text()
    copy = import_source(tmp_path / "out", tmp_path / "copy")
    before, after = saved_arrays(tmp_path / "run"), saved_arrays(tmp_path / "copy")
    kept = {name for name in before if "params" in name.split("'")[1] or "projections" in name.split("'")[1]}
    assert kept | {"['step']"} == after.keys()
    assert any(name.startswith("['projections']") for name in kept)
    for name in kept:
        assert before[name] == after[name], name
    assert copy.config.model.to_dict() == {**config.model.to_dict(), "vocab_size": 257}
    assert copy.config.seed == 7


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
    export_workdir(Workdir(tmp_path / "run"), str(tmp_path / "whole"))
    content = json.loads((tmp_path / "whole" / "darkformer.json").read_text())

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
