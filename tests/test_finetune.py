import json
import re

import numpy as np
import pytest

from configs import finetune, linearise
from darkformer_jax.config.usage import require_new_uses
from darkformer_jax.config.validation import validate
from darkformer_jax.data.tokenizers import train_bpe
from darkformer_jax.errors import UserError
from darkformer_jax.runs.inherit import inherit, other_mechanism
from darkformer_jax.runs.workdir import Workdir
from tests.tiny_runs import (
    TINY,
    metrics_without_time,
    run_commands,
    saved_arrays,
    tiny_config,
    write_text,
    write_workdir,
)

pytestmark = pytest.mark.standard_promotion

LOCAL = {"model__attention__local_window": 8}


def from_run(directory, arguments="dark", overrides=None, **changes):
    """configs/finetune.py with what it inherits from a run of `tiny_config(**changes)`."""
    Workdir(directory / "source").write_config(tiny_config(**changes).to_dict())
    config = finetune.get_config(arguments)
    config.init_from = str(directory / "source")
    config.update_from_flattened_dict(overrides or {})
    return inherit(config, Workdir(directory / "own"))


def test_sizes_are_those_of_init_from_and_the_rest_is_not(tmp_path):
    source = {"model__norm_eps": 1e-5, "model__tie_embeddings": False, "model__vocab_size": 300}
    config = from_run(tmp_path, "dark,m=16,window=128,lr=1e-5,steps=70", **source)
    validate(config)
    wanted = tiny_config(**source).model.to_dict()
    model = config.model.to_dict()
    attention = model.pop("attention")
    chosen = {"dtype": "bfloat16", "remat": "full", "attention": wanted["attention"]}
    assert model | {"attention": wanted["attention"]} == wanted | chosen
    assert (attention["num_features"], attention["window"], attention["num_sinks"]) == (16, 128, 4)
    assert (config.num_steps, config.optimizer.learning_rate) == (70, 1e-5)
    assert None not in attention.values()
    assert finetune.get_config().model.num_layers is None  # and stays so


@pytest.mark.parametrize("arguments", ["dark", "softmax", "dark,window=0", "performer,sinks=2"])
def test_a_conversion_keeps_what_its_source_forgets(tmp_path, arguments):
    decay = {"decay": "learned", "undecayed_heads": 1, "longest_memory": 500.0, "shortest_memory": 3.0, "conv_width": 3}
    config = from_run(tmp_path, arguments, **{f"model__attention__{name}": value for name, value in decay.items()})
    validate(config)
    assert {name: config.model.attention[name] for name in decay} == decay


@pytest.mark.parametrize(
    ("arguments", "inherited"),
    [
        ("dark", (True, True)),
        ("performer", (True, False)),
        ("window_only", (False, False)),
        ("dark,window=0", (False, True)),
    ],
)
def test_what_calibration_made_learnable_stays_so_where_the_mechanism_has_it(tmp_path, arguments, inherited):
    source = {"model__attention__far_gain": True, "model__attention__learn_projections": True}
    config = from_run(tmp_path, arguments, **source, model__attention__far_horizon=300)
    validate(config)
    assert config.model.attention.far_horizon == 300 * inherited[0]
    assert (config.model.attention.far_gain, config.model.attention.learn_projections) == inherited


@pytest.mark.parametrize(
    ("arguments", "source", "said"),
    [
        ("dark", {"window": 512, "num_features": 32}, "num_features = 64 instead of 32, window = 64 instead of 512: "),
        ("dark", {"pattern": "softmax,dark", "window": 512}, None),  # refused: it would replace the exact layer
        ("dark,window=512", {"window": 512}, ""),
        ("keep", {"window": 512}, ""),
        ("performer", {"window": 512}, ""),  # another mechanism has options of its own
        ("dark", {"kind": "softmax"}, ""),
    ],
)
def test_another_window_than_the_model_was_fitted_for_is_said(tmp_path, arguments, source, said):
    fitted = {"num_features": 64, "num_sinks": 4, "window_kernel": "softmax"} | source
    changes = {f"model__attention__{name}": value for name, value in fitted.items()}
    if said is None:
        with pytest.raises(UserError, match="would replace the exact ones"):
            from_run(tmp_path, arguments, **changes)
        return
    found = other_mechanism(from_run(tmp_path, arguments, **changes))
    wanted = f"model.attention: {said}init_from = .* has dark already; configs/finetune.py:keep keeps it as it is"
    assert re.fullmatch(wanted if said else "", found), found


SPLIT = {"model__num_layers": 3, "model__attention__pattern": "dark,dark(exact_kv_heads=1,window=16),dark"}


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("dark", "dark,dark(exact_kv_heads=1),dark"),
        ("window_only", "window_only,window_only(exact_kv_heads=1),window_only"),
        ("softmax", ""),
    ],
)
def test_heads_that_a_calibration_left_exact_stay_so_where_the_mechanism_can_have_them(tmp_path, kind, pattern):
    """Their layer has its heads in an order of its own, and the training would undo the choice without a word."""
    config = from_run(tmp_path, kind, **SPLIT)
    validate(config)
    assert config.model.attention.pattern == pattern
    of_all = from_run(tmp_path / "all", kind, model__attention__exact_kv_heads=1)
    validate(of_all)
    assert of_all.model.attention.exact_kv_heads == (1 if pattern else 0)
    none = from_run(tmp_path / "none", kind, {"model.attention.exact_kv_heads": 0}, **SPLIT)
    assert none.model.attention.pattern == ""


@pytest.mark.parametrize("source", [SPLIT, {"model__attention__exact_kv_heads": 1}])
def test_a_mechanism_that_can_have_no_exact_heads_does_not_silently_take_their_place(tmp_path, source):
    with pytest.raises(UserError, match="some of its heads are exact .*; hedgehog would replace them, too; allowed"):
        from_run(tmp_path, "hedgehog", **source)
    config = from_run(tmp_path, "hedgehog", {"model.attention.pattern": "hedgehog"}, **source)
    validate(config)
    assert config.model.attention.exact_kv_heads == 0


def test_what_is_trained_is_the_runs_own_choice(tmp_path):
    source = {"model__lora_rank": 8, "optimizer__train": "lora"}
    config = from_run(tmp_path, "dark,train=lora,lora=4", **source)
    validate(config)
    assert (config.optimizer.train, config.model.lora_rank) == ("lora", 4)
    config = from_run(tmp_path / "other", "dark", **source)
    validate(config)
    assert (config.optimizer.train, config.model.lora_rank) == ("all", 0)


def test_an_override_stands(tmp_path):
    config = from_run(tmp_path, overrides={"model.logit_softcap": 30.0, "model.attention.pattern": "softmax,dark"})
    assert (config.model.logit_softcap, config.model.attention.pattern) == (30.0, "softmax,dark")


@pytest.mark.parametrize(
    ("arguments", "kind", "old", "new"),
    [
        ("dark", "softmax", "", ""),
        ("softmax", "dark", "softmax,dark", ""),
        ("softmax", "softmax", "", ""),
        ("softmax", "dark", "", ""),
        ("dark", "softmax", "softmax_local, softmax", "softmax_local,dark"),
        ("softmax", "softmax", "softmax_local,softmax", "softmax_local,softmax"),
        ("performer", "softmax_local", "", ""),
        ("softmax", "softmax_local", "", "softmax_local"),
        ("softmax_local", "softmax", "softmax_local,softmax", ""),
    ],
)
def test_the_mechanism_takes_the_place_of_all_but_local_layers(tmp_path, arguments, kind, old, new):
    changes = {"model__attention__kind": kind, "model__attention__pattern": old, "model__num_layers": 2}
    local = LOCAL | {"model__rope_local_theta": 500.0} if "softmax_local" in kind + old else {}
    config = from_run(tmp_path, arguments, **changes, **local, model__attention__softcap=50.0)
    validate(config)
    attention = config.model.attention
    assert (attention.kind, attention.pattern) == (arguments, new)
    has_local = "softmax_local" in (new or arguments)
    assert (attention.local_window, config.model.rope_local_theta) == ((8, 500.0) if has_local else (0, 0.0))
    assert attention.softcap == (50.0 if has_local or arguments == "softmax" else 0.0)


KEPT = {
    "model__num_layers": 4,
    "model__attention__pattern": "dark,softmax,dark,dark",
    "model__attention__window": 16,
    "model__attention__window_kernel": "softmax",
    "model__attention__far_gain": True,
    "model__attention__softcap": 50.0,
}


def test_what_a_calibration_left_exact_is_kept(tmp_path):
    config = from_run(tmp_path, "keep,lr=1e-5,context=64", **KEPT)
    validate(config)
    require_new_uses(config, ["sequence_length", "optimizer.learning_rate"])
    assert config.model.attention.to_dict() == tiny_config(**KEPT).model.attention.to_dict()
    assert config.optimizer.learning_rate == 1e-5


def test_the_backend_is_of_the_new_run_alone(tmp_path):
    config = from_run(tmp_path, "keep,lr=1e-5,context=64", **KEPT, model__attention__backend="scan")
    assert config.model.attention.backend == "auto"


@pytest.mark.parametrize("argument", ["m=8", "window=32", "chunk=8", "init=1.0", "sinks=1"])
def test_kept_layers_have_the_sizes_that_they_were_fitted_with(argument):
    name = argument.partition("=")[0]
    with pytest.raises(UserError, match=f"configs/finetune.py:keep has no argument '{name}'; allowed: data"):
        finetune.get_config(f"keep,{argument}")


@pytest.mark.parametrize("kind", ["dark", "performer"])
def test_a_mechanism_does_not_silently_take_the_place_of_layers_left_exact(tmp_path, kind):
    with pytest.raises(UserError) as error:
        from_run(tmp_path, kind, **KEPT)
    wanted = (
        f"its layers are dark, softmax; {kind} would replace the exact ones, too; allowed: configs/finetune.py:keep, "
        f"which keeps them, or --config.model.attention.pattern={kind}"
    )
    assert wanted in str(error.value)
    config = from_run(tmp_path, kind, {"model.attention.pattern": kind}, **KEPT)
    validate(config)
    assert config.model.attention.softcap == 0.0  # no layer uses it any more


def test_a_scale_of_queries_that_the_new_mechanism_does_not_use_is_left_behind(tmp_path):
    source = {"model__attention__kind": "softmax", "model__attention__query_scale": 0.25}
    assert from_run(tmp_path / "a", "performer", **source).model.attention.query_scale == 0.25
    config = from_run(tmp_path / "b", "constant", **source)
    assert config.model.attention.query_scale == 0.0
    require_new_uses(config)


def test_a_run_that_has_begun_is_resumed_without_init_from(tmp_path):
    config = from_run(tmp_path, "dark", model__attention__kind="softmax")
    Workdir(tmp_path / "own").write_config(config.to_dict())
    (tmp_path / "source/config.json").unlink()
    again = finetune.get_config("dark")
    again.init_from = config.init_from
    assert inherit(again, Workdir(tmp_path / "own")).to_dict() == config.to_dict()


def test_what_cannot_be_inherited(tmp_path):
    config = finetune.get_config("dark")
    with pytest.raises(UserError, match="--config.init_from=<workdir of a run or of an imported model>"):
        inherit(config)
    config.init_from = str(tmp_path / "none")
    with pytest.raises(UserError, match=f"{tmp_path}/none/config.json cannot be read: No such file"):
        inherit(config)
    config.init_from = str(tmp_path)
    saved = tiny_config().to_dict()
    del saved["model"]["norm_eps"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"config.json has no model.norm_eps; another version wrote it"):
        inherit(config)
    plain = tiny_config()
    assert inherit(plain) is plain
    cases = (("dark,sauce=1", "no argument 'sauce'; allowed: m, window"), ("dark,m=x", "m must be a whole number"))
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            finetune.get_config(arguments)


def test_the_whole_road(tmp_path):
    """An exact model with its own tokenizer, fine-tuned with DARK attention, resumed, evaluated, continued."""
    source, workdir, text = tmp_path / "source", tmp_path / "run", write_text(tmp_path / "text.txt")
    write_workdir(source, tiny_config(model__attention__kind="softmax", model__vocab_size=300, data__tokenizer=""))
    (source / "tokenizer.bytes").unlink()
    (source / "pretrained.json").write_text('{"model_type": "llama", "config": {}}')
    tokenizer = train_bpe(280, [(tmp_path / "text.txt").read_text()])
    tokenizer.save(str(source))
    sizes = {
        "batch_size": 4,
        "sequence_length": 32,
        "model.dtype": "float32",
        "model.remat": "none",
        "model.attention.projections": "iid",
        "data.source": "text",
        "data.files": text,
        "optimizer.warmup_steps": 1,
        "eval.batch_size": 4,
        "log.every": 1,
        "sample.max_new_tokens": 3,
    }
    arguments = "--config=configs/finetune.py:dark,m=8,chunk=16,window=16,steps=3"
    flags = [arguments, *(f"--config.{name}={value}" for name, value in sizes.items())]
    init_from, to = f"--config.init_from={source}", f"--workdir={workdir}"
    nothing, described, trained, again, other = run_commands(
        [
            ("train.py", [*flags, to]),
            ("train.py", [*flags, init_from, to, "--dry_run"]),
            ("train.py", [*flags, init_from, to]),
            ("train.py", [*flags, init_from, to]),
            ("train.py", [*flags, init_from, to, "--config.model.mlp_dim=48"]),
        ]
    )
    assert nothing.status == 2 and nothing.err.count("\n") == 1 and "--config.init_from=" in nothing.err
    assert described.status == 0 and "vocabulary     300" in described.out, described.err
    assert trained.status == 0, trained.err
    assert "initialised 11 of 12 parameter arrays" in trained.err and "; new: attention/mechanism/M" in trained.err
    assert "\nprompts from the held-out text, at 0%, 33%, 67% of it:\n--- '" in trained.out
    assert again.status == 0 and f"resuming {workdir} from step 3" in again.err, again.err
    assert other.status == 2 and "model.mlp_dim: 32 -> 48" in other.err
    lines = metrics_without_time(workdir)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert [line["step"] for line in lines if "heldout_loss" in line] == [0, 3]  # before training, and after
    model = json.loads((workdir / "config.json").read_text())["model"]
    assert (model["num_layers"], model["vocab_size"], model["mlp_dim"]) == (1, 300, TINY["model.mlp_dim"])
    assert (workdir / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert json.loads((workdir / "pretrained.json").read_text())["model_type"] == "llama"
    weights = [
        np.frombuffer(saved_arrays(directory)["['params']['embedding']"], np.float32) for directory in (source, workdir)
    ]
    assert 0 < np.abs(weights[0] - weights[1]).max() < 0.01  # small steps from the source's


@pytest.mark.parametrize("stage", ["hidden,steps=7,lora=4", "logits", "long,context=64"])
def test_a_stage_of_linearise_keeps_every_layer_as_it_is(tmp_path, stage):
    layers = {"pattern": "softmax,dark(m=16),softmax_local,dark", "local_window": 8, "window": 16, "num_sinks": 2}
    source = tiny_config(model__num_layers=6, **{f"model__attention__{name}": value for name, value in layers.items()})
    Workdir(tmp_path / "source").write_config(source.to_dict())
    config = linearise.get_config(stage)
    config.init_from = config.distill.workdir = str(tmp_path / "source")
    config = inherit(config, Workdir(tmp_path / "own"))
    validate(config)
    require_new_uses(config)
    assert config.model.attention.to_dict() == source.model.attention.to_dict()
    chosen = {"dtype": "bfloat16", "remat": "full", "lora_rank": 4 if "lora=4" in stage else 16}
    assert config.model.to_dict() == source.model.to_dict() | chosen
    assert config.optimizer.warmup_steps == (1 if "steps=7" in stage else 20)


def test_a_stage_that_there_is_not():
    with pytest.raises(UserError, match="stage 'transfer' is unknown; allowed: hidden, logits, long"):
        linearise.get_config("transfer")
