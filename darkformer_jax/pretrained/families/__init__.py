"""The families, by the model_type of their config.json, and the choice of one that has a given model."""

from darkformer_jax.config.base import fields as declared
from darkformer_jax.config.conversion import COMPUTATION
from darkformer_jax.errors import UserError
from darkformer_jax.mixers.attention import ATTENTION_FIELDS
from darkformer_jax.pretrained.families.family import Family, Fields, kinds_of, layer_fields
from darkformer_jax.pretrained.families.gemma import GEMMA
from darkformer_jax.pretrained.families.gemma2 import GEMMA2
from darkformer_jax.pretrained.families.gemma3 import GEMMA3
from darkformer_jax.pretrained.families.llama import LLAMA
from darkformer_jax.pretrained.families.mistral import MISTRAL
from darkformer_jax.pretrained.families.qwen import QWEN2, QWEN3
from darkformer_jax.pretrained.families.rope import canonical_rope
from darkformer_jax.pretrained.hf_config import HFConfig

__all__ = ["FAMILIES", "REFUSED", "Family", "Fields", "canonical", "family_of", "fitting_family"]

FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3)}

# Why models that people may try are not read, by what config.json or a GGUF file calls them.
REFUSED = {
    "gpt2": "its learned positions, LayerNorm and ungated MLP with biases are not this model's RoPE, RMSNorm and gate",
    "bert": "an encoder with learned positions, LayerNorm and ungated MLP is not this model's decoder",
    "gemma3": "only its text models (model_type gemma3_text) are read, not the ones with a vision tower",
}


def family_of(config: HFConfig) -> Family:
    """The family that config.json names. Raises UserError for one that is not supported."""
    model_type = config.values.get("model_type")
    why = REFUSED.get(str(model_type), f"allowed: {', '.join(FAMILIES)}")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise config.error("model_type", f"unsupported architecture; {why}")
    family = FAMILIES[model_type]
    architectures = config.strings("architectures")
    if architectures and family.architecture not in architectures:
        raise config.error("architectures", f"allowed for {model_type}: {family.architecture}")
    return family


def canonical(fields: Fields) -> Fields:
    """The same model with fields without an effect at their defaults, so that equal models have equal fields."""
    scale = fields["attention.query_scale"]
    return (
        fields
        | layer_fields(kinds_of(fields), fields["attention.local_window"])
        | canonical_rope(fields)
        | {"attention.query_scale": 0.0 if scale == fields["head_dim"] ** -0.5 else scale}
    )


def fitting_family(fields: Fields, where: str, preferred: str = "") -> Family:
    """A family that can hold the exact-attention model of these fields: `preferred` if it can, else the first that can.

    Args:
      where: the name of the model, for the error.

    Raises:
      UserError: no family can; the message says what the nearest one lacks.
    """
    wanted = canonical(fields)
    lacks: dict[str, list[str]] = {}
    for name in sorted(FAMILIES, key=lambda name: name != preferred):
        family = FAMILIES[name]
        try:
            read = canonical(family.read(HFConfig(family.write(wanted), name)))
        except UserError as error:
            lacks[name] = [str(error)]
            continue
        held = _unread_defaults(wanted, read) | read
        lacks[name] = [
            f"model.{field} = {wanted[field]!r} ({name}: {held[field]!r})"
            for field in sorted(held)
            if held[field] != wanted[field]
        ]
        if not lacks[name]:
            return family
    nearest = min(lacks, key=lambda name: len(lacks[name]))
    raise UserError(
        f"{where}: no Hugging Face family has this model; the nearest, {nearest}, lacks {', '.join(lacks[nearest])}"
    )


def _is_of_the_model(name: str) -> bool:
    section, _, own = name.partition(".")
    return section not in COMPUTATION or (section == "attention" and own in ATTENTION_FIELDS)


def _unread_defaults(wanted: Fields, read: Fields) -> Fields:
    """The fields of a model that a family does not know, as it has them: a new field is at its default there.

    Of the fields of attention, those count that belong to every mechanism and so to exact attention.
    """
    unread = [name for name in wanted if name not in read and _is_of_the_model(name)]
    return {name: declared()[f"model.{name}"].default for name in unread}
