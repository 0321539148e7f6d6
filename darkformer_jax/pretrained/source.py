"""The source of an import: a Hugging Face directory or a GGUF file, under one interface."""

import os
import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from darkformer_jax.data.files import local_path
from darkformer_jax.data.tokenizers import Tokenizer, has_tokenizer, read_tokenizer
from darkformer_jax.errors import UserError
from darkformer_jax.pretrained.hf_config import HFConfig
from darkformer_jax.pretrained.safetensors_files import SafetensorsFiles, StoredArray


class Source(Protocol):
    """A checkpoint whose arrays have Hugging Face's names and layout."""

    path: str
    config: HFConfig
    arrays: dict[str, StoredArray]

    def read(self, name: str, index: Sequence[slice]) -> np.ndarray:
        """A slice of an array."""

    def check_tokenizer(self) -> None:
        """Raises UserError if there is clearly no tokenizer. Takes no time or memory."""

    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises UserError if there is none, or if it cannot be read exactly."""


class HFDirectory:
    """config.json, safetensors and a tokenizer."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.config = HFConfig.read(os.path.join(path, "config.json"))
        self.files = SafetensorsFiles(path)
        self.arrays = self.files.arrays
        self.read = self.files.read

    def check_tokenizer(self) -> None:
        if not has_tokenizer(self.path):
            raise UserError(f"{self.path} holds no tokenizer: neither tokenizer.json nor tokenizer.model")

    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self.path)


def open_source(path: str) -> Source:
    """A directory, or a file whose name ends in .gguf. Raises UserError for anything else."""
    path = local_path(path)
    if os.path.isdir(path):
        return HFDirectory(path)
    if os.path.isfile(path) and path.endswith(".gguf"):
        try:
            from darkformer_jax.pretrained.gguf_file import GGUFFile
        except ModuleNotFoundError as error:
            raise UserError(
                f"{path}: GGUF files need the package gguf: bash launch/install.sh gguf, or pip install gguf"
            ) from error
        return GGUFFile(path)
    if os.path.exists(path):
        raise UserError(f"--source={path}: allowed: a Hugging Face directory or a .gguf file")
    raise UserError(f"--source={path}: no such file or directory{_download_hint(path)}")


def _download_hint(path: str) -> str:
    """For a name as models have on the Hugging Face hub, what to do; nothing is downloaded here."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path):
        return " (nothing is downloaded)"
    directory = f"models/{path.rpartition('/')[2]}"
    return (
        f"; nothing is downloaded. If it is a name on the Hugging Face hub: pip install huggingface_hub, hf download "
        f"{path} --local-dir {directory}, then --source={directory}"
    )
