"""What an export says of a classifier or a regression: in config.json, to the tokenizer and in README.md; and back.

config.json has transformers' own fields, `id2label`, `label2id` and `problem_type`, and under `darkformer.task` what
the model reads: pooling, columns, and the length at which texts are cut.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import tokenizers

from darkformer_jax.config.base import LABELLED_SOURCE, LANGUAGE_MODEL, fields
from darkformer_jax.data.files import read_json_object, write_json
from darkformer_jax.data.labelled import load_class_names, shown_label
from darkformer_jax.data.tokenizer_config import CONFIG_FILE, token_names
from darkformer_jax.data.tokenizers import Tokenizer
from darkformer_jax.errors import UserError
from darkformer_jax.pretrained.hf_config import HFConfig
from darkformer_jax.runs.load import WorkdirModel
from darkformer_jax.runs.workdir import Workdir

CLASSIFIER = "DarkformerForSequenceClassification"
_CLASSIFICATION, _REGRESSION = "classification", "regression"
_PROBLEMS = {_CLASSIFICATION: "single_label_classification", _REGRESSION: "regression"}
_UNNAMED = "LABEL_0", "LABEL_1"  # transformers leaves these two out of config.json
_READ = ("pooling", "text_column", "label_column")  # fields of `task` that an export keeps
_SHOWN_CLASSES = 12  # in README.md
_README = """# An exported DARKFormer: {what}

    from transformers import pipeline

    classify = pipeline("text-classification", model="<this directory>", trust_remote_code=True)
    classify({example}, truncation=True)

`trust_remote_code=True` runs the `*_darkformer.py` files of this directory, which need torch and transformers (5.0 or
later) and nothing else. Without it transformers ends with an error. `AutoModelForSequenceClassification` and
`AutoTokenizer` load the model and its tokenizer one by one; `Trainer` and PEFT train them.

* It answers with {answer}.
* {reads}
* It was trained on texts of up to {length:,} tokens. `truncation=True` cuts longer ones there, as in training.
* It reads {pooling} in float32. Pass the `attention_mask` that the tokenizer gives; pad on either side.
* Attention, layer by layer: {kinds}.
* One row is one text. Refused: several documents in a row, masks with holes, output_attentions.

darkformer_jax reads the directory back, also after training in PyTorch:

    python -m darkformer_jax.convert --source=<this directory> --workdir=runs/copy
    python -m darkformer_jax.predict --workdir=runs/copy --text=<files>
"""
_PAIR = (
    "A text of it is {columns}, with a line feed between them. `text_pair` is refused: the tokenizer would join the "
    "tokens in another way."
)
_SINGLE = (
    "It reads a text as it is. If its texts are pairs, as in GLUE, one text is both with a line feed between them: "
    '`f"{{first}}\\n{{second}}"`. `text_pair` is refused: the tokenizer would join the tokens in another way.'
)


class Head(NamedTuple):
    """What the outputs of a model on whole texts mean.

    Attributes:
      task: task.name.
      classes: the names of a classification's outputs, in order; () for a regression.
    """

    task: str
    classes: tuple[str, ...]

    @property
    def num_outputs(self) -> int:
        """Outputs per text."""
        return len(self.classes) or 1


def head_of(workdir: Workdir, model: WorkdirModel, *, as_exact: bool) -> Head | None:
    """The head of a classifier or a regression; None for a language model.

    as_exact: the export should be a model of transformers' own.

    Raises:
      UserError: no export can hold the model, or the checkpoint has another number of outputs than labels.json.
    """
    name = model.config.task.name
    if name == LANGUAGE_MODEL:
        return None
    if as_exact:
        raise UserError(
            f"--as_exact: {workdir} is a {name}, whose head has a bias; LlamaForSequenceClassification and its like "
            "have none. Without --as_exact, the exported code has all of it, exact attention too"
        )
    if not model.config.model.causal:
        raise UserError(
            f"{workdir}: model.causal = False: the exported code is causal, and so are the families; only "
            "darkformer_jax runs an encoder"
        )
    head = Head(name, load_class_names(workdir.local) if name == _CLASSIFICATION else ())
    found = model.network.spec.num_outputs
    if found != head.num_outputs:
        raise UserError(
            f"{workdir}: its checkpoint has {found} outputs per text, its {name} {head.num_outputs}; allowed: a "
            "checkpoint of the same run"
        )
    return head


def head_config(head: Head) -> dict[str, Any]:
    """The fields of config.json that say what the outputs mean."""
    names = head.classes or _UNNAMED[:1]
    return {
        "architectures": [CLASSIFIER],
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": _PROBLEMS[head.task],
    }


def task_description(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What the model reads: `darkformer.task`."""
    return {name: config.task[name] for name in _READ} | {"sequence_length": config.sequence_length}


def fit_tokenizer(directory: Path, tokenizer: Tokenizer, length: int) -> None:
    """Makes the exported tokenizer read a text as the task does, and say where a second text begins.

    Texts are cut at `length`, and special tokens that they spell are text. `token_type_ids` show the model a pair that
    was not joined with a line feed, which it refuses. Padding needs some token; the model does not see which.

    Raises:
      UserError: a tokenizer.json puts other tokens around a text than training did.
    """
    definition = directory / "tokenizer.json"
    if definition.exists():
        around = tokenizers.Tokenizer.from_file(str(definition)).encode("").tokens
        if len(around) != tokenizer.adds_bos:
            raise UserError(
                f"the post_processor of tokenizer.json puts {' '.join(around)} around a text; in training there was "
                f"{'a BOS in front' if tokenizer.adds_bos else 'nothing'}. Allowed: the same"
            )
    path = str(directory / CONFIG_FILE)
    config = read_json_object(path) if os.path.isfile(path) else {}
    if config.get("add_eos_token"):
        config["add_eos_token"] = False  # the head has learned to read the text's own last token
    names = {**tokenizer.token_names, **token_names(config)}
    if not definition.exists():  # of a SentencePiece model, transformers puts a BOS in front only if this says so
        ends = {name: names[name] for name in ("bos_token", "eos_token") if name in names}
        config |= ends | {"add_bos_token": tokenizer.adds_bos}
    own = {
        "model_max_length": length,
        "truncation_side": "right",
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }
    write_json(path, config | own | {"pad_token": names.get("pad_token", names["eos_token"])})


def head_readme(head: Head, config: ml_collections.ConfigDict, kinds: str) -> str:
    """README.md. kinds: the layers' attention, in words."""
    shown = [f"`{shown_label(name)}`" for name in head.classes]
    hidden = len(shown) - _SHOWN_CLASSES
    classes = ", ".join(shown[:_SHOWN_CLASSES]) + (f" and {hidden} more" if hidden > 0 else "")
    columns = config.task.text_column.split(",")
    is_pair, is_regression = len(columns) > 1, head.task == _REGRESSION
    return _README.format(
        what="a regression on texts" if is_regression else "a classifier of texts",
        example='f"' + r"\n".join(f"{{{name}}}" for name in columns) + '"' if is_pair else '"a text"',
        answer="a number, the `score` of `LABEL_0`" if is_regression else f"one of {len(shown)} classes: {classes}",
        reads=_PAIR.format(columns=" and ".join(f"`{name}`" for name in columns)) if is_pair else _SINGLE.format(),
        length=config.sequence_length,
        pooling="the last token's hidden state" if config.task.pooling == "last" else "the mean hidden state",
        kinds=kinds,
    )


def is_classifier(values: Mapping[str, Any]) -> bool:
    """Whether a config.json of this package's format is that of a model on whole texts."""
    return CLASSIFIER in (values.get("architectures") or ())


def read_head(hf: HFConfig, task: Mapping[str, Any], config: ml_collections.ConfigDict) -> Head:
    """Sets the task of `config` to that of a config.json, and returns what the outputs mean.

    task: `darkformer.task`; {} for a language model that became a classifier in PyTorch.

    Raises:
      UserError: the labels or the problem are not those of a classification or a regression here.
    """
    names = _label_names(hf)
    default = _PROBLEMS[_REGRESSION if len(names) == 1 else _CLASSIFICATION]
    problem = hf.choice("problem_type", tuple(_PROBLEMS.values()), default)
    if problem != default:
        raise hf.error("problem_type", f"must be {default} for id2label of {len(names)}")
    name = next(name for name in _PROBLEMS if _PROBLEMS[name] == problem)
    config.task.name, config.data.source = name, LABELLED_SOURCE
    _set_task(task, hf, config)
    return Head(name, tuple(names) if name == _CLASSIFICATION else ())


def _label_names(hf: HFConfig) -> list[str]:
    section = hf.section("id2label")
    labels = dict(section.values) if section else {str(number): name for number, name in enumerate(_UNNAMED)}
    numbers = [str(number) for number in range(len(labels))]
    if labels.keys() != set(numbers):
        raise hf.error("id2label", f"must name the labels 0 to {len(labels) - 1}")
    names = [labels[number] for number in numbers]
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise hf.error("id2label", "must have a different name for each label")
    return names


def _set_task(task: Mapping[str, Any], hf: HFConfig, config: ml_collections.ConfigDict) -> None:
    said = HFConfig(task, f"{hf.path}: darkformer.task")
    for name in _READ:
        value = task.get(name, fields()[f"task.{name}"].default)
        if not isinstance(value, str):
            raise said.error(name, "must be a string")
        config.task[name] = value
    config.sequence_length = said.integer("sequence_length", config.sequence_length)
