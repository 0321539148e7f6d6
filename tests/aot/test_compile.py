"""Programs for TPUs, compiled without one: the compiler is libtpu's own."""

import importlib.util
from collections import Counter
from types import SimpleNamespace

import pytest

from darkformer_jax.aot.topology import topology_devices
from darkformer_jax.compile import DoesNotFit, _bound, compile_step, plan
from darkformer_jax.errors import UserError
from darkformer_jax.tasks import TASKS
from darkformer_jax.tasks.classification import Classes
from darkformer_jax.training.experiment import Experiment
from tests.tasks.labelled_files import labelled_config
from tests.tiny_runs import run_commands, tiny_config, tiny_flags

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: bash launch/install.sh aot"
)
pytestmark = pytest.mark.standard_promotion
SIZES = {
    "model__vocab_size": 512,
    "model__num_layers": 3,
    "model__embed_dim": 256,
    "model__num_heads": 2,
    "model__num_kv_heads": 2,
    "model__head_dim": 128,
    "model__mlp_dim": 512,
    "model__remat": "full",
    "model__attention__num_features": 128,
    "model__attention__chunk_size": 128,
    "batch_size": 8,
    "eval__batch_size": 8,
    "sequence_length": 128,
}


@needs_libtpu
def test_the_plan_of_a_small_step_on_four_chips(capsys):
    config = tiny_config(**SIZES, mesh__data=1, mesh__fsdp=4)
    text = plan(config, topology_devices("v5e:2x2"), "v5e:2x2")
    assert "compiling for 4 x TPU v5 lite (v5e:2x2)" in capsys.readouterr().err
    lines = {line.split()[0]: line for line in text.splitlines() if line and not line.startswith(" ")}
    assert "mesh           data=1, fsdp=4" in text
    assert "GiB per device at the peak" in lines["memory"] and lines["memory"].endswith("of 16 GiB: it fits")
    assert "utilisation up to" in lines["step"]
    assert "loop(s) of unknown length" not in text
    # The seven matrices of each of three layers are gathered for the forward pass and again for the backward one.
    gathers = [int(line.split()[0]) for line in text.splitlines() if " x all-gather " in line]
    assert sum(gathers) >= 2 * 7 * 3
    assert " x reduce-scatter " in text or " x all-reduce " in text


@needs_libtpu
@pytest.mark.parametrize("form", [{"decay": "gate"}, {"chunk_size": 128, "window": 128, "num_sinks": 2}], ids=str)
def test_a_step_with_the_kernel_for_tpus_on_four_chips(form):
    """Of heads that `tensor` splits, exact ones among them, and layers that are computed again."""
    sizes = SIZES | {"model__num_heads": 6, "model__num_kv_heads": 3, "model__attention__exact_kv_heads": 1}
    mesh = {"mesh__data": 1, "mesh__fsdp": 2, "mesh__tensor": 2}
    form = {f"model__attention__{name}": value for name, value in form.items()}
    config = tiny_config(**sizes | form, **mesh, model__attention__backend="pallas", model__dtype="bfloat16")
    experiment = Experiment.of(config, TASKS["language_model"].objective_of(config), topology_devices("v5e:2x2"))
    compiled = compile_step(experiment)
    assert compiled.as_text().count("tpu_custom_call") >= 1


@needs_libtpu
def test_layers_of_a_pattern_as_long_as_the_network_are_computed_again_one_by_one():
    def peak(remat):
        fields = {"model__attention__pattern": "dark,dark(exact_kv_heads=1),dark", "sequence_length": 1024}
        config = tiny_config(**SIZES | fields | {"model__remat": remat}, mesh__data=4, model__dtype="bfloat16")
        experiment = Experiment.of(config, TASKS["language_model"].objective_of(config), topology_devices("v5e:2x2"))
        return compile_step(experiment).memory_analysis().peak_memory_in_bytes

    assert peak("full") < 0.8 * peak("none")


@needs_libtpu
def test_what_does_not_fit_says_so():
    exact = {name: value for name, value in SIZES.items() if "attention" not in name}
    config = tiny_config(**exact | {"model__attention__kind": "softmax", "model__vocab_size": 2**21}, mesh__data=4)
    config.model.embed_dim = 2048  # 16 GiB of a table, and twice that of moments
    with pytest.raises(DoesNotFit, match=r"[0-9]{2,3}\.[0-9]+G\) exceeds available HBM \(15.75G\)$"):
        plan(config, topology_devices("v5e:2x2"), "v5e:2x2")


def test_layers_that_are_computed_again_are_a_third_of_a_classifiers_step():
    """It has no logits, which are never computed again."""
    memory = SimpleNamespace(argument_size_in_bytes=1, peak_memory_in_bytes=2)

    def seconds(remat):
        config = labelled_config("mails.jsonl", model__remat=remat)
        experiment = Experiment.of(config, Classes(257, 32, ("a", "b")))
        return _bound(experiment, "TPU v5 lite", Counter(), memory).compute

    assert seconds("full") == pytest.approx(4 / 3 * seconds("none"))


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "--topology=v9:2x2: INVALID_ARGUMENT: Invalid TPU external name"),
        ("v5e:3x5", "--topology=v5e:3x5: .*not divisible"),
    ],
)
def test_topologies_that_libtpu_does_not_know(name, message):
    with pytest.raises(UserError, match=message):
        topology_devices(name)


def test_mistakes_are_one_line(monkeypatch):
    with pytest.raises(UserError, match="--topology=v5e-8: expected a TPU's generation and shape .* v5e:16x16"):
        topology_devices("v5e-8")
    with pytest.raises(UserError, match="--topology=cuda-h100: .* compiling for a GPU needs a GPU"):
        topology_devices("cuda-h100")
    with pytest.raises(UserError, match="--num_slices=0: must be at least 1"):
        topology_devices("v5e:2x2", 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--topology=v5e:2x2 needs libtpu, .* bash launch/install.sh aot"):
        topology_devices("v5e:2x2")


def test_the_command_line():
    flags = tiny_flags(**SIZES)
    shown, wrong_field, wrong_topology = run_commands(
        [
            ("darkformer_jax.compile", ["--help"]),
            ("darkformer_jax.compile", [*flags, "--config.mesh.tensors=2"]),
            ("darkformer_jax.compile", [*flags, "--topology=v5e-8"]),
        ]
    )
    assert shown.status == 0 and "--topology" in shown.out
    assert (wrong_field.status, wrong_topology.status) == (2, 2)
    assert wrong_field.err.count("\n") == wrong_topology.err.count("\n") == 1
    assert "did you mean --config.mesh.tensor?" in wrong_field.err
    assert wrong_topology.err.startswith("error: --topology=v5e-8: expected")
