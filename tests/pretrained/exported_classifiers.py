"""Tiny classifiers and regressions of several mechanisms, exported with their code and loaded by transformers."""

import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from darkformer_jax.data.labelled import LabelledRows, Text, save_class_names
from darkformer_jax.pretrained.export import export_workdir
from darkformer_jax.runs.load import WorkdirModel, load_model
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.classification import Classes
from darkformer_jax.tasks.regression import Numbers
from darkformer_jax.training.experiment import Experiment
from tests.pretrained.exported_models import GEMMA, HYBRID, VOCAB, drawn_state
from tests.pretrained.tiny_models import torch, transformers
from tests.tiny_runs import tiny_config, write_workdir

LENGTH = 48  # tokens; one of `TEXTS` is longer, and some are longer than windows
NAMES = ("contradiction", "entailment", "neutral")
REGRESSION = {"task__name": "regression"}

# name -> the layers, and what differs from a classification on a tiny Llama that reads the last token.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dark": (f"dark({HYBRID},num_sinks=3,balanced=True)", {}),
    "exact": ("softmax", {"model__tie_embeddings": True, "task__text_column": "first,second"}),
    "number-of-gemma": (f"dark({HYBRID},exact_kv_heads=1),softmax", REGRESSION | GEMMA),
    "mean": ("dark,softmax_local(local_window=5)", {"task__pooling": "mean"}),
}
TEXTS = (
    "A man plays a flute.\nA man plays.",
    "no",
    "It spells <|doc|> and </s>: that is text. ",
    "Ein Käfer – 日本 " + "and so on " * 6,
)


class Exported(NamedTuple):
    """A model here, its outputs for `TEXTS`, its workdir, its export, and the same model and tokenizer in PyTorch."""

    ours: WorkdirModel
    outputs: np.ndarray
    workdir: Path
    directory: Path
    theirs: Any
    tokenizer: Any


@functools.cache
def exported(name: str) -> Exported:
    """One of `MODELS`. Every parameter is drawn: one left at its start would hide mistakes."""
    root = Path(tempfile.mkdtemp(prefix="classifier-"))
    write_classifier(root / "run", *MODELS[name])
    export_workdir(Workdir(root / "run"), str(root / "exported"))
    ours = load_model(Workdir(root / "run"))
    theirs, tokenizer = load(root / "exported"), tokenizer_of(root / "exported")
    return Exported(ours, our_outputs(ours), root / "run", root / "exported", theirs, tokenizer)


def write_classifier(workdir: Path, pattern: str, changes: dict[str, Any]) -> None:
    """A workdir as `train` leaves it, its parameters drawn."""
    sizes = {"model__num_layers": 2, "model__num_heads": 4, "model__num_kv_heads": 2, "sequence_length": LENGTH}
    own = {"task__name": "classification", "data__source": "labelled", "model__attention__pattern": pattern}
    config = tiny_config(**sizes | own | {"data__tokenizer": ""} | changes)
    is_regression = config.task.name == "regression"
    objective = Numbers(VOCAB, LENGTH) if is_regression else Classes(VOCAB, LENGTH, NAMES)
    write_workdir(workdir, config, drawn_state(Experiment.of(config, objective)))
    if not is_regression:
        save_class_names(workdir, NAMES)


def load(directory: Path, **options: Any) -> Any:
    """What AutoModelForSequenceClassification makes of a directory. No array may be missing or left over."""
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        str(directory), trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(report.values()), report
    return model.eval()


def tokenizer_of(directory: Path) -> Any:
    """What AutoTokenizer makes of a directory."""
    return transformers.AutoTokenizer.from_pretrained(str(directory), trust_remote_code=True)


def our_outputs(model: WorkdirModel) -> np.ndarray:
    """[texts, outputs] here, of a batch of `TEXTS` as the task makes it."""
    texts = [Text(text, "") for text in TEXTS]
    rows = LabelledRows(texts, np.zeros(len(TEXTS)), model.tokenizer, model.config.sequence_length)
    batch = rows.read(np.arange(len(TEXTS)))
    tokens = [batch[name] for name in ("inputs", "segment_ids", "positions")]
    outputs = jax.jit(lambda params, projections, *tokens: model.network.bind(params, projections).outputs(*tokens))
    return np.asarray(outputs(model.params, model.projections, *tokens))


def batch_of(model: Exported, side: str = "right") -> dict[str, Any]:
    """The same batch as the exported tokenizer makes it."""
    model.tokenizer.padding_side = side
    return dict(model.tokenizer(list(TEXTS), padding=True, truncation=True, return_tensors="pt"))


def torch_outputs(model: Any, batch: dict[str, Any]) -> np.ndarray:
    """[texts, outputs] in PyTorch."""
    with torch.no_grad():
        return model(**batch).logits.numpy()
