"""The tokenizer_config.json beside a tokenizer, with the files in which some releases keep parts of it."""

import os
from typing import Any, NamedTuple

from darkformer_jax.data.files import read_file, read_json_object
from darkformer_jax.errors import UserError

CONFIG_FILE = "tokenizer_config.json"

_SPECIAL_FILE = "special_tokens_map.json"
_CHAT_FILE = "chat_template.jinja"


class Settings(NamedTuple):
    """What a tokenizer_config.json says about documents; None = it does not say."""

    bos_token: str | None
    eos_token: str | None
    add_bos_token: bool | None
    trained_as: str


def read_settings(config: dict[str, Any]) -> Settings:
    """What a config says about documents. Raises UserError for values of other types."""

    def token(name: str) -> str | None:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(value, str):
            raise UserError(f"{CONFIG_FILE} has {name} = {value!r}; allowed: a string, or null")
        return value or None

    adds_bos = config.get("add_bos_token")
    if adds_bos is not None and not isinstance(adds_bos, bool):
        raise UserError(f"{CONFIG_FILE} has add_bos_token = {adds_bos!r}; allowed: true, false, or null")
    return Settings(token("bos_token"), token("eos_token"), adds_bos, token("trained_as") or "")


def token_names(config: dict[str, Any]) -> dict[str, str]:
    """The tokens that a tokenizer_config.json names, such as bos_token."""
    named = {name: value for name, value in config.items() if name.endswith("_token") and not isinstance(value, bool)}
    contents = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: content for name, content in contents.items() if isinstance(content, str) and content}


def chat_template(config: dict[str, Any]) -> str | None:
    """The template of a tokenizer_config.json; of several named ones, the one that transformers uses by itself."""
    value = config.get("chat_template")
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}.get("default")
    if value is not None and not isinstance(value, str):
        allowed = 'a string, null, or a list of {"name": ..., "template": ...}'
        raise UserError(f"{CONFIG_FILE} has chat_template = {str(value)[:80]!r}; allowed: {allowed}")
    return value or None


def read_hf_config(directory: str) -> dict[str, Any] | None:
    """The tokenizer_config.json in a directory, merged with files in which some releases keep parts of it, or None."""
    special, own, template = (os.path.join(directory, name) for name in (_SPECIAL_FILE, CONFIG_FILE, _CHAT_FILE))
    config = read_json_object(special) if os.path.isfile(special) else {}
    if os.path.isfile(own):
        config |= {name: value for name, value in read_json_object(own).items() if config.get(name) is None or value}
    if os.path.isfile(template):
        try:
            config["chat_template"] = read_file(template).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{template} is not UTF-8 text: {error}") from error
    return config or None


def new_hf_config(bos_token: str | None, eos_token: str, spec: str = "") -> dict[str, Any]:
    """A config with which transformers reads the tokenizer.json beside it as this library does."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos_token,
        "eos_token": eos_token,
        "add_bos_token": bos_token is not None,
        "clean_up_tokenization_spaces": False,
        "trained_as": spec,
    }
