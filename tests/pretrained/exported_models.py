"""Tiny models of every family with every mechanism, exported with their code and loaded by transformers."""

import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from darkformer_jax.pretrained.export import export_workdir
from darkformer_jax.runs.load import WorkdirModel, load_model
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.training.experiment import Experiment
from darkformer_jax.training.step import TrainState, make_state_init
from tests.pretrained.tiny_models import torch, transformers
from tests.tiny_runs import experiment_of, tiny_config, write_workdir

VOCAB = 257  # of bytes
HYBRID = "window=8,chunk_size=4"  # windows are shorter than the 37 tokens of `TOKENS`
GEMMA = {"model__norm_plus_one": True, "model__scale_embeddings": True, "model__activation": "gelu_tanh"}
GEMMA2 = GEMMA | {"model__post_norms": True, "model__num_layers": 4}
YARN = {"model__rope_scaling": "yarn", "model__rope_factor": 4.0, "model__rope_original_length": 16}
GATES = {"model__attention__decay": "gate", "model__attention__conv_width": 4}

# name -> the layers, and what differs from a tiny Llama with 4 query heads in 2 groups and 3 layers.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-dark": ("dark", {}),
    "llama-hybrid-tied": (
        f"dark({HYBRID},num_sinks=6,far_gain=True,far_horizon=12,balanced=True)",
        {"model__num_kv_heads": 1, "model__tie_embeddings": True},
    ),
    "llama-some-exact-yarn": (f"dark({HYBRID},num_sinks=2,window_kernel=softmax,exact_kv_heads=1),softmax", YARN),
    "qwen2-performer": (f"performer(exact_kv_heads=1),performer({HYBRID})", {"model__qkv_bias": True}),
    "qwen3-lfk": (f"lfk({HYBRID})", {"model__qk_norm": True}),
    "gemma-dark": (f"dark({HYBRID},num_sinks=3)", GEMMA),
    "gemma2-caps": (
        f"softmax_local(local_window=6,softcap=20.0),dark({HYBRID})",
        GEMMA2 | {"model__logit_softcap": 15.0},
    ),
    "gemma3-local-rope": (
        "softmax_local(local_window=5),dark(balanced=True)",
        GEMMA2 | {"model__qk_norm": True, "model__rope_local_theta": 500.0},
    ),
    "gates": ("dark(learn_projections=True),hedgehog,linear_transformer", GATES),
    "gates-hybrid": (
        f"dark({HYBRID},num_sinks=3,exact_kv_heads=1,far_gain=True,far_horizon=9,balanced=True),softmax_local(local_window=5),softmax",
        GATES | {"model__attention__undecayed_heads": 1},
    ),
    "learned-decay": (f"window_only({HYBRID}),dark({HYBRID},num_sinks=2)", {"model__attention__decay": "learned"}),
    "alibi": ("cosformer(horizon=64),softmax,dark", {"model__attention__positions": "alibi"}),
}
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 37)).astype(np.int32)


class Exported(NamedTuple):
    """A model here, its workdir, the directory of its export, and the same model in PyTorch."""

    ours: WorkdirModel
    workdir: Path
    directory: Path
    theirs: Any


@functools.cache
def exported(name: str) -> Exported:
    """One of `MODELS`. Every parameter is drawn: one left at its start would hide mistakes."""
    pattern, changes = MODELS[name]
    sizes = {"model__num_layers": 3, "model__num_heads": 4, "model__num_kv_heads": 2}
    config = tiny_config(**sizes | {"model__attention__pattern": pattern, "data__tokenizer": ""} | changes)
    root = Path(tempfile.mkdtemp(prefix="exported-"))
    write_workdir(root / "run", config, drawn_state(experiment_of(config)))
    export_workdir(Workdir(root / "run"), str(root / "exported"))
    return Exported(load_model(Workdir(root / "run")), root / "run", root / "exported", load(root / "exported"))


def drawn_state(experiment: Experiment) -> TrainState:
    """A state whose parameters are all drawn. Nothing is compiled."""
    random = np.random.default_rng(1)
    draw = lambda leaf, scale: random.normal(0, scale, leaf.shape).astype(leaf.dtype)
    init = make_state_init(experiment.network, experiment.optimizer, 0, experiment.trained)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(init))
    return state._replace(
        params=jax.tree.map(lambda leaf: draw(leaf, 0.3), state.params),
        projections=jax.tree.map(lambda leaf: draw(leaf, 1.0), state.projections),
    )


def load(directory: Path, **options: Any) -> Any:
    """What AutoModelForCausalLM makes of a directory. No array may be missing or left over."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        str(directory), trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(report.values()), report
    return model.eval()


def torch_logits(model: Any, tokens: Any = TOKENS, **options: Any) -> np.ndarray:
    """[b, n, vocab] of rows without padding, unless options say otherwise."""
    with torch.no_grad():
        return model(torch.as_tensor(tokens).long(), **options).logits.float().numpy()
