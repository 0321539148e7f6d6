import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from configs import ablation, classify, finetune, glue, large, linearise, lm_1b, lra, paper, quickstart
from darkformer_jax.config import base
from darkformer_jax.config.arguments import ARGUMENTS, fields_of_arguments
from darkformer_jax.config.specs import model_spec
from darkformer_jax.config.usage import require_new_uses
from darkformer_jax.config.validation import from_json, validate
from darkformer_jax.distributed.sharding import MESH_AXES
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from darkformer_jax.mixers.encoders import EncoderMechanism
from darkformer_jax.training.run import dry_run
from tests.tiny_specs import rope_spec

# No config; one whose sizes are those of another run; one whose sizes depend on the labels of its files.
NOT_ALONE = ("arguments", "finetune", "linearise", "classify", "lra", "glue")
CAUSAL = [kind for kind in MIXERS if not issubclass(MIXERS[kind], EncoderMechanism)]
CONFIGS = [path.stem for path in (Path(__file__).parents[2] / "configs").glob("*.py") if path.stem not in NOT_ALONE]


def changed(changes):
    config = base.get_config()
    config.update_from_flattened_dict(changes)
    return config


AT_LEAST_ONE = [
    "num_steps", "batch_size", "sequence_length", "accumulation_steps", "model.num_layers", "model.embed_dim",
    "model.num_heads", "model.num_kv_heads", "model.head_dim", "model.mlp_dim", "model.attention.num_features",
    "model.rope_factor", "model.rope_original_length", "model.attention.state_size", "model.attention.expand",
    "model.attention.chunk_size", "eval.batch_size", "checkpoint.keep", "log.every", "sample.max_new_tokens",
    "profile.steps", "model.attention.num_hashes",
]  # fmt: skip
AT_LEAST_ZERO = [
    "seed", "model.vocab_size", "model.attention.redraw_every", "model.attention.window", "model.attention.num_sinks",
    "model.attention.far_horizon", "eval.patience",
    "data.num_workers", "optimizer.warmup_steps", "eval.every", "eval.batches", "checkpoint.every", "sample.top_k",
    "model.logit_softcap", "optimizer.weight_decay", "optimizer.clip_norm", "optimizer.z_loss",
    "optimizer.geometry_learning_rate", "sample.temperature", "model.rope_local_theta", "model.rope_attention_factor",
    "model.attention.query_scale", "model.attention.softcap", "model.attention.local_window", "model.lora_rank",
    "profile.first_step",
]  # fmt: skip
POSITIVE = [
    "model.norm_eps", "model.rope_theta", "model.attention.geometry_init", "optimizer.learning_rate", "optimizer.eps",
    "model.rope_low_freq_factor", "model.rope_high_freq_factor", "model.rope_beta_fast", "model.rope_beta_slow",
]  # fmt: skip
CHOICES = {
    "model.activation": "silu, gelu_tanh",
    "model.dtype": "bfloat16, float32",
    "model.remat": "none, dots, full",
    "model.rope_scaling": "none, linear, llama3, yarn",
    "model.attention.kind": ", ".join(MIXERS),
    "model.attention.projections": "iid, orthogonal, orthogonal_unsigned",
    "model.attention.window_kernel": "dark, softmax",
    "model.attention.backend": "auto, scan, parallel, pallas",
    "data.source": "stdlib, text, news, chat, array_record, labelled",
    "optimizer.schedule": "cosine, rsqrt, constant",
    "optimizer.train": "all, qkv_geometry, geometry, lora",
}
RULES = [
    *[({name: 0}, f"{name} = 0(.0)?: must be at least 1") for name in AT_LEAST_ONE],
    *[({name: -1}, f"{name} = -1(.0)?: must be at least 0") for name in AT_LEAST_ZERO],
    *[({name: 0.0}, f"{name} = 0.0: must be positive") for name in POSITIVE],
    *[({name: float("nan")}, f"{name} = nan: must be finite") for name in POSITIVE],
    *[({name: "magic"}, f"{name} = 'magic': allowed: {allowed}") for name, allowed in CHOICES.items()],
    ({"optimizer.learning_rate": float("inf")}, "optimizer.learning_rate = inf: must be finite"),
    ({"model.num_heads": 6}, "model.num_heads = 6 is not a multiple of model.num_kv_heads = 4"),
    ({"model.head_dim": 7}, "model.head_dim = 7: must be even, for rotary positions"),
    ({"model.attention.pattern": "dark,magic"}, "model.attention.pattern has 'magic': allowed: softmax, softmax_local"),
    ({"model.attention.pattern": "dark,"}, "model.attention.pattern has '': allowed"),
    (
        {"model.attention.pattern": "dark,dark,softmax", "model.num_layers": 2},
        "model.attention.pattern has 3 entries, more than model.num_layers = 2",
    ),
    (
        {"model.rope_local_theta": 1e4, "model.attention.pattern": "softmax,dark"},
        "model.rope_local_theta = 10000.0: no softmax or dark layer uses it; allowed: 0.0",
    ),
    ({"model.rope_factor": 8.0}, "model.rope_factor = 8.0 with model.rope_scaling = 'none'; allowed: 1"),
    (
        {"model.rope_scaling": "llama3", "model.rope_low_freq_factor": 4.0},
        "model.rope_low_freq_factor = 4.0: must be below model.rope_high_freq_factor = 4.0",
    ),
    (
        {"model.rope_scaling": "yarn", "model.rope_beta_slow": 32.0},
        "model.rope_beta_slow = 32.0: must be below model.rope_beta_fast = 32.0",
    ),
    ({"model.rope_scaling": "yarn", "model.rope_theta": 1.0}, "model.rope_theta = 1.0: must be above 1 for 'yarn'"),
    (
        {"model.rope_scaling": "llama3", "model.rope_attention_factor": 1.2},
        "model.rope_attention_factor = 1.2 with model.rope_scaling = 'llama3'; allowed: 0",
    ),
    (
        {"model.attention.softcap": 50.0},
        "model.attention.softcap = 50.0: no dark layer uses it; allowed: 0.0",
    ),
    (
        {"model.attention.pattern": "softmax_local,dark"},
        "model.attention.local_window = 0: 'softmax_local' needs at least 1",
    ),
    (
        {"model.attention.local_window": 64, "model.attention.kind": "softmax"},
        "model.attention.local_window = 64: no softmax layer uses it; allowed: 0",
    ),
    ({"model.attention.window": 64}, "model.attention.window = 64 is not a multiple of chunk_size = 128"),
    ({"model.attention.num_sinks": 4}, "model.attention.num_sinks = 4 needs window, but model.attention.window = 0"),
    (
        {"model.attention.window": 128, "model.attention.kind": "softmax"},
        "128: no softmax layer uses it; allowed: 0",
    ),
    ({"model.attention.window": 128, "model.attention.kind": "constant"}, "window = 128: no constant layer uses it"),
    ({"model.attention.window_kernel": "softmax"}, "model.attention.window_kernel = 'softmax' needs window"),
    ({"model.attention.far_horizon": 9}, "far_horizon = 9 needs window, but model.attention.window = 0"),
    ({"model.attention.far_gain": True}, "far_gain = True needs window, but model.attention.window = 0"),
    (
        {"model.attention.longest_memory": 512.0},
        "longest_memory = 512.0 needs decay, but model.attention.decay = 'none'",
    ),
    (
        {"model.attention.decay": "gate", "model.attention.shortest_memory": 200.0},
        "shortest_memory = 200.0: must be at most longest_memory = 128.0",
    ),
    (
        {"model.attention.decay": "gate", "model.attention.undecayed_heads": 4},
        "undecayed_heads = 4 of 4 key/value heads: at least one must decay",
    ),
    (
        {"model.attention.backend": "pallas", "model.attention.window": 24, "model.attention.chunk_size": 24},
        "'pallas' with model.attention.window = 24: chunk_size = 24; allowed: a multiple of 16, or backend = 'scan'",
    ),
    (
        {"model.attention.backend": "pallas", "model.attention.window": 128, "model.attention.decay": "gate"},
        "'pallas' with model.attention.window = 128 and a decay; allowed: model.attention.window = 0, or backend = 's",
    ),
    (
        {"model.attention.backend": "pallas", "model.causal": False, "task.name": "classification"},
        "backend = 'pallas' with model.causal = False; allowed: model.causal = True",
    ),
    (
        {"model.attention.backend": "parallel", "model.causal": False, "task.name": "classification"},
        "backend = 'parallel' with model.causal = False; allowed: model.causal = True",
    ),
    (
        {"model.attention.backend": "scan", "model.attention.kind": "hedgehog"},
        "model.attention.backend = 'scan': no hedgehog layer uses it; allowed: 'auto'",
    ),
    ({"model.attention.exact_kv_heads": 4}, "exact_kv_heads = 4 of 4 key/value heads: at least one must be left"),
    (
        {"model.attention.decay": "gate", "model.attention.positions": "rope+alibi"},
        "positions = 'rope.alibi' with decay = 'gate': ALiBi is a decay",
    ),
    (
        {"model.attention.kind": "cosformer", "model.attention.horizon": 511},
        "model.attention.horizon = 511: must be at least sequence_length = 512",
    ),
    ({"model.attention.kind": "cosformer"}, "model.attention.horizon = 0: 'cosformer' needs at least 1"),
    ({"model.attention.kind": "mamba2", "model.attention.window": 128}, "window = 128: no mamba2 layer uses it"),
    ({"model.attention.kind": "mamba2", "model.attention.decay": "gate"}, "decay = 'gate': no mamba2 layer uses it"),
    ({"model.attention.kind": "mamba2", "model.attention.conv_width": 4}, "conv_width = 4: no mamba2 layer uses it"),
    (
        {"model.attention.kind": "mamba2", "model.causal": False, "task.name": "classification"},
        "model.causal = False: 'mamba2' is causal only; allowed: True",
    ),
    (
        {"model.attention.kind": "gated_deltanet", "model.attention.window": 128},
        "window = 128: no gated_deltanet layer uses it",
    ),
    ({"model.attention.conv_width": 1}, "conv_width = 1; allowed: 0, or 2 and more"),
    ({"model.attention.conv_width": 513}, "conv_width = 513: must be at most sequence_length = 512"),
    (
        {"model.attention.far_gain": True, "model.attention.window": 128, "model.attention.kind": "window_only"},
        "far_gain = True: no window_only layer uses it; allowed: False",
    ),
    (
        {"model.attention.learn_projections": True, "model.attention.kind": "lfk"},
        "True: no lfk layer uses it; allowed: False",
    ),
    (
        {"model.attention.learn_projections": True, "model.attention.redraw_every": 5},
        "redraw_every = 5 with learn_projections = True; allowed: 0",
    ),
    ({"model.attention.kind": "window_only"}, "model.attention.window = 0: 'window_only' needs at least 1"),
    (
        {"model.attention.redraw_every": 5, "model.attention.kind": "lfk"},
        "model.attention.redraw_every = 5: no lfk layer uses it; allowed: 0",
    ),
    ({"seed": 2**32}, "seed = 4294967296: must be below 4294967296"),
    ({"num_steps": 2**31}, "num_steps = 2147483648: must be below 2147483648"),
    ({"batch_size": 6, "accumulation_steps": 4}, "batch_size = 6 is not a multiple of accumulation_steps = 4"),
    (
        {"optimizer.train": "geometry", "optimizer.geometry_learning_rate": 0.0},
        "optimizer.geometry_learning_rate = 0.0 with optimizer.train = 'geometry': nothing would be trained",
    ),
    ({"optimizer.train": "lora"}, "model.lora_rank = 0 with optimizer.train = 'lora': must be at least 1"),
    (
        {"model.lora_rank": 4},
        "model.lora_rank = 4 with optimizer.train = 'all'; allowed: 0, or optimizer.train = 'lora",
    ),
    ({"eval.patience": 2, "eval.every": 0}, "eval.patience = 2 with eval.every = 0: .*; allowed: 0, or eval.every of"),
    ({"log.trackers": "wandb,aim"}, "log.trackers = 'wandb,aim': allowed: wandb, mlflow, or several with commas"),
    ({"log.trackers": "wandb,wandb"}, "log.trackers = 'wandb,wandb': allowed: wandb, mlflow, or several with commas"),
    ({"num_steps": 50}, "optimizer.warmup_steps = 50 is not shorter than num_steps = 50"),
    ({"optimizer.b1": 1.0}, r"optimizer.b1 = 1.0: must be in \[0, 1\)"),
    ({"optimizer.b2": -0.1}, r"optimizer.b2 = -0.1: must be in \[0, 1\)"),
    ({"optimizer.final_fraction": 1.5}, r"optimizer.final_fraction = 1.5: must be in \[0, 1\]"),
    ({"distill.weight": 1.5}, r"distill.weight = 1.5: must be in \[0, 1\]"),
    ({"distill.weight": 0.5}, "distill.weight = 0.5 with distill.workdir = ''; allowed: both or neither"),
    ({"distill.workdir": "runs/a"}, "distill.weight = 0.0 with distill.workdir = 'runs/a'; allowed: both or neither"),
    (
        {"distill.workdir": "runs/a", "distill.weight": 0.6, "distill.hidden_weight": 0.5},
        "distill.weight = 0.6 and distill.hidden_weight = 0.5: their sum must be at most 1",
    ),
    (
        {"distill.hidden_weight": 0.5},
        "distill.weight = 0.0 and distill.hidden_weight = 0.5 with distill.workdir = ''; allowed: both or neither",
    ),
    ({"sample.top_p": 0.0}, r"sample.top_p = 0.0: must be in \(0, 1\]"),
    ({"sample.prompts": ("def ", 1)}, r"sample.prompts = \('def ', 1\): must be strings"),
    ({"data.heldout_fraction": -0.1}, r"data.heldout_fraction = -0.1: must be in \[0, 1\)"),
    ({"data.heldout_fraction": 1.0}, r"data.heldout_fraction = 1.0: must be in \[0, 1\)"),
]


@pytest.mark.parametrize(("changes", "message"), RULES, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(RULES)])
def test_a_rule_names_its_field_and_what_is_allowed(changes, message):
    with pytest.raises(UserError, match=message) as raised:
        validate(changed(changes))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_steps": 1},
        {"distill.workdir": "runs/a", "distill.weight": 1.0},
        {"distill.workdir": "runs/a", "distill.hidden_weight": 1.0},
        {"distill.workdir": "runs/a", "distill.weight": 0.3, "distill.hidden_weight": 0.7},
        {"optimizer.train": "lora", "model.lora_rank": 4},
        {"model.num_kv_heads": 1},
        {"model.attention.pattern": "softmax, dark"},
        {"model.attention.window": 256, "model.attention.num_sinks": 4},
        {"model.attention.window": 128, "model.attention.pattern": "softmax,dark"},
        {"model.attention.window": 128, "model.attention.pattern": "dark,random"},
        {"model.attention.window": 128, "model.attention.kind": "window_only"},
        {"model.attention.redraw_every": 5, "model.attention.pattern": "lfk,dark"},
        {"optimizer.warmup_steps": 0, "optimizer.final_fraction": 0.0, "sample.temperature": 0.0},
        {"sample.prompts": ()},
        {"log.trackers": "mlflow,wandb", "eval.patience": 3},
        {"task.name": "classification", "data.source": "labelled"},
        {"task.name": "regression", "data.source": "labelled", "optimizer.z_loss": 0.0},
        {"data.source": "labelled", "task.text_column": "Source", "task.heldout_files": "val.tsv"},
        {"model.attention.pattern": "dark,dark,softmax"},
        {"model.attention.pattern": "softmax,dark", "model.attention.softcap": 50.0},
        {
            "model.attention.pattern": "softmax_local,softmax",
            "model.attention.local_window": 7,
            "model.rope_local_theta": 1e4,
            "model.rope_scaling": "linear",
            "model.rope_factor": 8.0,
        },
        {"model.rope_scaling": "llama3", "model.rope_factor": 32.0, "model.rope_original_length": 8192},
        {"model.rope_scaling": "yarn", "model.rope_factor": 4.0, "model.rope_attention_factor": 1.1},
    ],
)
def test_what_is_allowed(changes):
    validate(changed(changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "softmax", "num_features": 128}, "num_features = 128: no softmax layer uses it; allowed: 64"),
        ({"kind": "softmax", "projections": "iid"}, "projections = 'iid': no softmax layer uses it; allowed: 'orth"),
        ({"kind": "gated_deltanet", "state_size": 32}, "state_size = 32: no gated_deltanet layer uses it; allowed"),
        ({"kind": "mamba2", "num_features": 32}, "num_features = 32: no mamba2 layer uses it; allowed: 64"),
        ({"kind": "constant", "geometry_init": 0.5}, "geometry_init = 0.5: no constant layer uses it; allowed: 1.0"),
        ({"kind": "linear_transformer", "query_scale": 0.3}, "query_scale = 0.3: no linear_transformer layer uses it"),
        (
            {"pattern": "dark(chunk=64),softmax", "chunk_size": 32},
            "chunk_size = 32: every dark layer has a value of its own",
        ),
    ],
)
def test_what_an_experiment_sets_in_vain_is_refused_in_a_new_run(changes, message):
    config = changed({f"model.attention.{name}": value for name, value in changes.items()})
    with pytest.raises(UserError, match=message):
        require_new_uses(config)
    validate(config)  # a run of an earlier version may have it
    require_new_uses(config, ["model.attention.kind"])  # the experiment chose it for its own mechanism


def overridden(config, flags):
    """(the config with flags, the fields they set), as the command line has them."""
    changes = {}
    for flag in flags:
        name, _, value = flag.removeprefix("--config.").partition("=")
        changes[name] = base.fields()[name].parse(value)
    new = config.copy_and_resolve_references()
    new.update_from_flattened_dict(changes)
    return new, list(changes)


EXPERIMENTS = {
    "quickstart": quickstart.get_config,
    "lm_1b": lm_1b.get_config,
    "classify": lambda: classify.get_config("files=a.tsv"),
    "large": lambda: large.get_config("gemma_2b"),
    "hybrid": lambda: changed(
        {
            "model.attention.window": 128,
            "model.attention.num_sinks": 2,
            "model.attention.window_kernel": "softmax",
            "model.attention.far_gain": True,
        }
    ),
}


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_mechanism_that_does_not_fit_the_experiment_is_refused_once_with_the_flags_that_make_it_fit(experiment, kind):
    flags = [f"--config.model.attention.kind={kind}"]
    try:
        validate(*overridden(EXPERIMENTS[experiment](), flags))
    except UserError as error:
        said, _, added = str(error).rpartition("; add ")
        assert "the experiment sets it" in said or " needs " in said
        flags += added.split()
    config, names = overridden(EXPERIMENTS[experiment](), flags)
    validate(config, names)
    require_new_uses(config, names)


def test_all_that_does_not_fit_is_in_one_message_that_tells_the_users_fields_from_the_experiments():
    flags = ["--config.model.attention.kind=softmax", "--config.model.attention.num_features=8"]
    flags += ["--config.model.attention.num_sinks=4"]
    with pytest.raises(UserError) as error:
        validate(*overridden(quickstart.get_config(), flags))
    assert str(error.value) == (
        "model.attention.num_features = 8: no softmax layer uses it; "
        "model.attention.window = 32: no softmax layer uses it, but the experiment sets it; "
        "model.attention.num_sinks = 4: no softmax layer uses it; "
        "add --config.model.attention.window=0; instead give --config.model.attention.num_sinks=0; "
        "leave out model.attention.num_features"
    )


def test_an_experiment_with_another_mechanism_sets_nothing_in_vain():
    for kind in CAUSAL:
        window = ",window=64" if kind == "window_only" else ""
        for config in (
            ablation.get_config(f"attention={kind}{window}"),
            classify.get_config(f"files=a.tsv,attention={kind}{window}"),
            large.get_config(f"gemma_2b,attention={kind}" + (",window=256" if window else "")),
        ):
            require_new_uses(config)
    require_new_uses(paper.get_config("pretrain"))
    assert ablation.get_config("attention=performer").model.attention.chunk_size == 64


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "data.files",
            "a.txt",
            "data.files = 'a.txt' with data.source = 'stdlib'; allowed: '', or data.source = 'text'",
        ),
        ("data.text_field", "body", "'body' with data.source = 'stdlib'; allowed: 'text', or data.source = 'text'$"),
        ("model.rope_beta_fast", 16.0, "16.0 with model.rope_scaling = 'none'; allowed: 32.0, or .* = 'yarn'$"),
        ("model.rope_original_length", 9, "9 with .*; allowed: 8192, or model.rope_scaling = 'llama3' or 'yarn'$"),
        ("optimizer.final_fraction", 0.5, "0.5 with optimizer.schedule = 'constant'; allowed: 0.1, or .* = 'cosine'$"),
    ],
)
def test_a_field_that_another_one_makes_idle_is_refused_on_the_command_line(name, value, message):
    config = changed({"optimizer.schedule": "constant", name: value})
    with pytest.raises(UserError, match=message):
        require_new_uses(config, [name])
    if not name.startswith("data."):
        require_new_uses(config)
    require_new_uses(changed({"optimizer.schedule": "constant"}), [name])  # as by default


@pytest.mark.parametrize("arguments", ["files=a.jsonl", "files=a.jsonl,pretrain=next_token"])
def test_an_experiment_names_no_text_field_for_labelled_files_but_may_for_a_source_that_is_swapped(arguments):
    config = classify.get_config(arguments)
    config.data.text_field = "body"
    with pytest.raises(UserError, match="data.text_field = 'body' with data.source = 'labelled'; allowed: 'text', or"):
        require_new_uses(config)
    require_new_uses(config, ["data.source"])


@pytest.mark.parametrize(("name", "value"), [("model.rope_theta", 77.0), ("model.rope_scaling", "linear")])
@pytest.mark.parametrize("own", [{"model.attention.positions": "none"}, {"model.attention.kind": "mamba2"}])
def test_rotary_positions_are_refused_where_no_layer_has_them(name, value, own):
    without = {**own, "model.head_dim": 15, "model.rope_factor": 2.0}
    config = changed({**without, "model.rope_scaling": "linear", name: value})
    validate(config)
    with pytest.raises(UserError, match=f"{name} = {value!r}: no layer has rotary positions"):
        require_new_uses(config, [name])
    with pytest.raises(UserError, match="model.head_dim = 15: must be even, for rotary positions"):
        validate(changed({"model.head_dim": 15}))


def test_only_a_language_model_writes_samples():
    labelled = {"task.name": "classification", "data.source": "labelled"}
    message = "sample.top_k = 7 with task.name = 'classification'; allowed: 0, or task.name = 'language_model'"
    with pytest.raises(UserError, match=message):
        require_new_uses(changed({**labelled, "sample.top_k": 7}), ["sample.top_k"])
    require_new_uses(changed({**labelled, "sample.prompts": ()}), ["sample.prompts"])
    require_new_uses(changed({"sample.top_k": 7}), ["sample.top_k"])


def test_every_experiments_arguments_are_known_and_none_is_given_twice():
    for experiment in (ablation, classify, finetune, glue, large, linearise, lra):
        assert set(experiment.ARGUMENTS) <= ARGUMENTS.keys()
    with pytest.raises(UserError, match=r"configs/ablation.py: 'm=64': m is there twice$"):
        ablation.get_config("m=32,m=64")
    assert paper.get_config("dark,chunk=64,steps=70").model.attention.chunk_size == 64  # by default it has 32
    assert ablation.get_config("steps=30").optimizer.warmup_steps == 7  # by default 50, which is no warm-up of 30 steps
    assert ablation.get_config("steps=60").optimizer.warmup_steps == 50
    assert fields_of_arguments("dark,m=32,steps=3") == ["model.attention.num_features", "num_steps"]


@pytest.mark.parametrize(
    ("experiment", "choices"), [(classify, "pretrain"), (lra, "task, scale, pretrain"), (glue, "task, attention")]
)
def test_the_message_for_an_unknown_argument_has_also_those_that_are_no_fields(experiment, choices):
    allowed = ", ".join([*experiment.ARGUMENTS, choices])
    with pytest.raises(UserError, match=f"has no argument 'foo'; allowed: {allowed}$"):
        experiment.get_config("foo=x")


def test_pretrained_models_and_the_papers_have_no_decay_and_no_convolution():
    # Conversions inherit theirs.
    for config in (paper.get_config("pretrain"), large.get_config("llama_7b"), lm_1b.get_config("paper")):
        attention = config.model.attention
        assert (attention.decay, attention.conv_width, attention.geometry_init) == ("none", 0, 1.0)


def test_an_argument_keeps_its_value_until_all_is_known():
    config = ablation.get_config("attention=softmax,m=32")
    assert config.model.attention.num_features == 32 and config.model.attention.chunk_size == 128
    names = fields_of_arguments("attention=softmax,m=32")
    with pytest.raises(UserError, match="num_features = 32: no softmax layer uses it"):
        require_new_uses(config, names)
    config.model.attention.pattern = "dark"
    require_new_uses(config, names)


def test_every_field_with_a_number_has_a_rule():
    ruled = {name for changes, _ in RULES for name in changes}
    ruled |= {f"mesh.{axis}" for axis in MESH_AXES}  # make_mesh checks them against the devices
    fields = base.get_config().to_dict()

    def numbers(tree, prefix=""):
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from numbers(value, f"{prefix}{name}.")
            elif isinstance(value, int | float) and not isinstance(value, bool):
                yield prefix + name

    assert set(numbers(fields)) == {name for name in numbers(fields) if name in ruled}


def test_unknown_fields_and_other_types_are_refused_by_the_config_itself():
    with pytest.raises(AttributeError):
        base.get_config().model.num_layer = 3
    with pytest.raises(TypeError):
        base.get_config().num_steps = "many"


def test_the_model_follows_the_config():
    config = changed({"model.attention.pattern": "softmax, dark", "model.attention.num_features": 5, "seed": 7})
    spec = model_spec(config, 257)
    softmax, dark = spec.pattern
    assert (softmax.kind, dark.kind) == ("softmax", "dark")
    assert (spec.vocab_size, dark.num_features, dark.seed) == (257, 5, 7)
    assert model_spec(changed({"model.vocab_size": 300}), 257).vocab_size == 300
    with pytest.raises(UserError, match="model.vocab_size = 200 is smaller than the tokenizer's 257"):
        model_spec(changed({"model.vocab_size": 200}), 257)
    local = {"pattern": "softmax_local,softmax", "local_window": 7, "query_scale": 0.25, "softcap": 50.0}
    rope = {"rope_local_theta": 5e3, "rope_scaling": "yarn", "rope_factor": 4.0, "rope_theta": 1e6}
    gemma = {"qkv_bias": True, "norm_plus_one": True, "post_norms": True}
    fields = {f"model.{name}": value for name, value in {**rope, **gemma}.items()}
    full = model_spec(changed(fields | {f"model.attention.{name}": value for name, value in local.items()}), 257)
    local, whole = full.pattern
    assert (local.local_window, local.query_scale, local.softcap) == (7, 0.25, 50.0)
    assert (whole.local_window, whole.query_scale, whole.softcap) == (0, 0.25, 50.0)
    assert local.qkv_bias and full.norm_plus_one and full.post_norms
    np.testing.assert_array_equal(local.rope.frequencies(8), rope_spec(theta=5e3).frequencies(8))
    assert whole.rope == rope_spec(theta=1e6, scaling="yarn", factor=4.0)
    again = from_json(json.loads(json.dumps(config.to_dict())))
    assert model_spec(again, 257) == spec


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds_abstractly(name, capsys):
    config = importlib.import_module(f"configs.{name}").get_config()
    dry_run(config)
    shown = dict(
        line.split(maxsplit=1) for line in capsys.readouterr().out.replace("tokens/step", "tokens").splitlines()
    )
    assert int(shown["parameters"].replace(",", "")) > 500_000
    assert shown["state"].endswith("MiB per device")
    assert (
        shown["tokens"]
        == f"{config.batch_size * config.sequence_length:,} = {config.batch_size} x {config.sequence_length}"
    )


def test_lm_1b_is_the_size_it_says(capsys):
    dry_run(importlib.import_module("configs.lm_1b").get_config())
    shown = capsys.readouterr().out
    embed, mlp, layers = 768, 3072, 12
    geometry, gates, convolutions = 12 * 64 * 64, 12 * embed + 12, 4 * 3 * embed
    attention = 4 * embed**2 + geometry + gates + convolutions
    parameters = 32_000 * embed + embed + layers * (attention + 3 * embed * mlp + 2 * embed)
    assert f"parameters     {parameters:,}\n" in shown
    assert 135e6 < parameters < 160e6
    assert "262,144 = 256 x 1024" in shown


@pytest.mark.parametrize(
    ("changes", "vocabulary"),
    [
        ({"data.tokenizer": "bytes"}, "257"),
        ({"data.tokenizer": "bpe:1000"}, "1,000"),
        ({"model.vocab_size": 300}, "300"),
    ],
)
def test_a_dry_run_reads_no_text(changes, vocabulary, capsys):
    dry_run(changed({"data.source": "text", "data.files": "nowhere/*.txt", **changes}))
    assert f"vocabulary     {vocabulary}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ("bpe:x", "tokenizer 'bpe:x' is not possible"),
        ("bpe:9", "tokenizer 'bpe:9' is not possible"),
        ("nowhere.json", "tokenizer 'nowhere.json' is not a file"),
        ("", "tokenizer '' is not a file"),
    ],
)
def test_a_dry_run_refuses_a_tokenizer_that_is_none(tokenizer, message):
    with pytest.raises(UserError, match=message):
        dry_run(changed({"data.tokenizer": tokenizer}))


@pytest.mark.parametrize("name", ["qk_norm", "qkv_bias"])
def test_options_of_attention_are_refused_where_no_layer_is_attention(name):
    changes = {f"model.{name}": True, "model.attention.kind": "mamba2"}
    with pytest.raises(UserError, match=f"model.{name} = True: no mamba2 layer uses it; allowed: False"):
        require_new_uses(changed(changes))
    require_new_uses(changed({f"model.{name}": True, "model.attention.pattern": "mamba2,softmax"}))
