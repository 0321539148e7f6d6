"""The export of a model that no Hugging Face family has: model_type "darkformer", with code of its own for PyTorch.

config.json holds the fields of the nearest family, and under `darkformer` what the model has beyond it: every field of
`model`, the seed, and the resolved attention of each layer, which the code reads. Weights keep the family's names; what
the family lacks has our path, our layout and float32. The files of `remote_code/` are copied beside them.
"""

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from darkformer_jax.config import base
from darkformer_jax.config.base import LANGUAGE_MODEL
from darkformer_jax.config.fields import flat_fields
from darkformer_jax.config.migrations import with_version
from darkformer_jax.config.pattern import Layer, parse_pattern
from darkformer_jax.config.specs import mixer_specs
from darkformer_jax.data.files import write_file
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from darkformer_jax.mixers.forgetting import alibi_slopes
from darkformer_jax.mixers.spec import MixerSpec
from darkformer_jax.pretrained.classifiers import Head, head_readme, is_classifier, read_head, task_description
from darkformer_jax.pretrained.families import FAMILIES, Family, Fields, canonical, fitting_family
from darkformer_jax.pretrained.families.family import FULL, kinds_of
from darkformer_jax.pretrained.hf_config import HFConfig
from darkformer_jax.pretrained.mechanism import exact_fields, is_exact, read_own_fields

MODEL_TYPE = KEY = "darkformer"
_FORMAT = 2  # 1 is that of darkformer.json
_CODE = Path(__file__).parent / "remote_code"
_CLASSES = {
    "AutoConfig": "configuration_darkformer.DarkformerConfig",
    "AutoModel": "modeling_darkformer.DarkformerModel",
    "AutoModelForSequenceClassification": "modeling_darkformer.DarkformerForSequenceClassification",
}
_OF_LANGUAGE_MODELS = {"AutoModelForCausalLM": "modeling_darkformer.DarkformerForCausalLM"}
ARCHITECTURE = "DarkformerForCausalLM"
# The kinds that remote_code/ computes.
KINDS = (
    *("softmax", "softmax_local", "performer", "dark", "lfk", "window_only"),
    *("linear_transformer", "hedgehog", "cosformer"),
)
_BLIND = ("random", "constant")
_OPTIONS = (
    *("kind", "head_dim", "scale", "softcap", "local_window", "num_features", "chunk_size", "window", "num_sinks"),
    *(
        "window_kernel",
        "exact_kv_heads",
        "far_gain",
        "far_horizon",
        "learn_projections",
        "balanced",
        "geometry_init",
        "horizon",
        "decay",
        "undecayed_heads",
    ),
    "conv_width",
)
_README = """# An exported DARKFormer

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("<this directory>", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained("<this directory>", trust_remote_code=True)

`trust_remote_code=True` runs the `*_darkformer.py` files of this directory, which need torch and transformers
(5.0 or later) and nothing else. Without it transformers ends with an error.

Attention, layer by layer: {kinds}.

* Linear attention keeps a state of constant size, whatever the number of tokens. Softmax layers and exact heads keep a
  cache that grows.
* One row is one document. Pad on either side; positions count the real tokens.
* `AutoModelForSequenceClassification` starts a classifier on it (`num_labels=`), whose head is new.
* Refused: several documents in a row, masks with holes, output_attentions, assisted decoding, static and quantised
  caches.

darkformer_jax reads the directory back, also after training in PyTorch:

    python -m darkformer_jax.convert --source=<this directory> --workdir=runs/copy
"""


def needs_own_format(fields: Fields, where: str, preferred: str) -> bool:
    """Whether no Hugging Face family has the attention of a model, but one has its sizes. See `fitting_family`."""
    if not is_exact(fields):
        return True
    try:
        fitting_family(exact_fields(fields, where), where, preferred)
    except UserError:
        with contextlib.suppress(UserError):
            fitting_family(stock_fields(fields), where, preferred)
            return True
    return False


def check_own_format(fields: Fields, where: str) -> None:
    """Raises UserError for a kind that the exported code does not compute."""
    for kind in kinds_of(fields):
        if kind not in KINDS:
            raise UserError(f"{where}: {kind}: {_reason(kind)}; allowed: {', '.join(KINDS)}")


def _reason(kind: str) -> str:
    if kind in _BLIND:
        return (
            "its attention does not look at its input, for which no Hugging Face model has a place. --as_exact exports "
            "the same transformer with exact attention in its place, which is another model"
        )
    return "the exported code does not compute this mixer, and only darkformer_jax runs it"


def stock_fields(fields: Fields) -> Fields:
    """The same sizes, norms and rotary positions with plain softmax attention, which a family can hold."""
    fields = fields | {name: base.fields()[f"model.{name}"].default for name in fields if name.startswith("attention.")}
    return canonical(fields | {"attention.kind": FULL, "attention.pattern": ""})


def own_config(stock: Mapping[str, Any], config: ml_collections.ConfigDict, family: Family) -> dict[str, Any]:
    """config.json of model_type "darkformer". stock: the family's, whose RoPE is left out: layers have their own.

    That of a classifier lacks `head_config`.
    """
    is_labelled = config.task.name != LANGUAGE_MODEL
    description = {
        "format": _FORMAT,
        "family": family.model_type,
        "seed": config.seed,
        "model": config.model.to_dict(),
        "pattern": [_layer(spec) for spec in mixer_specs(config)],
    } | ({"task": task_description(config)} if is_labelled else {})
    return _without_rope(stock) | {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "auto_map": _CLASSES | ({} if is_labelled else _OF_LANGUAGE_MODELS),
        KEY: with_version(description),
    }


def _without_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of RoPE, which transformers adds to every config, say nothing here."""
    return {name: value for name, value in values.items() if not name.startswith("rope_")}


def _layer(spec: MixerSpec) -> dict[str, Any]:
    """What the code reads of one layer. JSON keeps float32 numbers exactly."""
    rope = spec.rope
    return {name: getattr(spec, name) for name in _OPTIONS} | {
        "frequencies": [float(f) for f in rope.frequencies(spec.head_dim)] if spec.has_rope else None,
        "amplitude": rope.amplitude,
        "alibi": [-float(slope) for slope in alibi_slopes(spec.num_kv_heads)] if spec.has_alibi else None,
    }


def write_code(directory: Path, config: ml_collections.ConfigDict, head: Head | None) -> None:
    """Copies the code, byte for byte, and writes README.md. head: None = a language model."""
    for file in sorted(_CODE.glob("*.py")):
        shutil.copyfile(file, directory / file.name)
    fields = dict(flat_fields(config.model.to_dict()))
    pattern = parse_pattern(fields["attention.pattern"], fields["attention.kind"])
    layers = [_with_heads(pattern[layer % len(pattern)], fields) for layer in range(fields["num_layers"])]
    shown = ", ".join(f"{layers.count(layer)} x {layer}" for layer in dict.fromkeys(layers))
    readme = _README.format(kinds=shown) if head is None else head_readme(head, config, shown)
    write_file(str(directory / "README.md"), readme.encode())


def _with_heads(layer: Layer, fields: Fields) -> str:
    """The kind of a layer, and how many of its heads are exact."""
    count = layer.options.get("exact_kv_heads", fields["attention.exact_kv_heads"])
    has_some = count and "exact_kv_heads" in MIXERS[layer.kind].uses
    return f"{layer.kind} ({count} of {fields['num_kv_heads']} key/value heads exact)" if has_some else layer.kind


def is_own_format(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this format."""
    return values.get("model_type") == MODEL_TYPE


def read_own_config(hf: HFConfig, config: ml_collections.ConfigDict) -> tuple[Family, Head | None]:
    """Sets model, seed and task of `config` to those of a config.json.

    Returns the family that names the weights, and the head of a classifier or a regression.

    The vocabulary may have grown in PyTorch: its size is the one that the family's fields say.

    Raises:
      UserError: the format is another, a field is missing, or both descriptions differ in something else.
    """
    content = hf.values.get(KEY)
    if not isinstance(content, dict) or content.get("format") != _FORMAT or not isinstance(content.get("model"), dict):
        raise UserError(f"{hf.path}: {KEY} must be an object of format {_FORMAT}, with `model`")
    family = FAMILIES.get(str(content.get("family")))
    if family is None:
        raise UserError(f"{hf.path}: {KEY}.family = {content.get('family')!r}: allowed: {', '.join(FAMILIES)}")
    model = dict(flat_fields(content["model"]))
    where = f"{hf.path}: {KEY}"
    read_own_fields(content | {"model": model}, where, config)
    values = _without_rope(hf.values) | {"model_type": family.model_type}
    stock = _without_rope(canonical(family.read(HFConfig(values, hf.path))))
    config.model.vocab_size = stock["vocab_size"]
    said = stock_fields(dict(flat_fields(config.model.to_dict())))
    for name in stock:
        if said[name] != stock[name]:
            raise UserError(f"{where}.model.{name} = {said[name]!r}, but the rest of the file says {stock[name]!r}")
    _check_pattern(content.get("pattern"), config, where)
    config.sequence_length = hf.integer("max_position_embeddings", config.sequence_length)
    return family, read_head(hf, content.get("task", {}), config) if is_classifier(hf.values) else None


def _check_pattern(pattern: Any, config: ml_collections.ConfigDict, where: str) -> None:
    """Raises UserError where what the code reads of a layer is not what the fields of the model say."""
    layers = [_layer(spec) for spec in mixer_specs(config)]
    if not isinstance(pattern, list) or len(pattern) != len(layers):
        raise UserError(f"{where}.pattern must be a list of {len(layers)}, as {where}.model says")
    for index, (layer, said) in enumerate(zip(layers, pattern, strict=True)):
        if not isinstance(said, dict):
            raise UserError(f"{where}.pattern has {said!r} for layer {index}; allowed: an object")
        for name, value in said.items():
            if not _agree(layer.get(name), value):
                raise UserError(
                    f"{where}.pattern says {name} = {value!r} of layer {index}, and {KEY}.model {layer.get(name)!r}"
                )


def _agree(ours: Any, said: Any) -> bool:
    """Equal, but for the last digits of numbers: another machine rounds powers and roots otherwise."""
    try:
        return bool(np.shape(ours) == np.shape(said) and np.allclose(ours, said, rtol=1e-5, atol=0))
    except TypeError:  # words and null
        return bool(ours == said)
