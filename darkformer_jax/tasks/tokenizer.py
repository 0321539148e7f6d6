"""Which tokenizer a run has: its config's, its workdir's, or that of the model it starts from."""

import ml_collections

from darkformer_jax.data import PREPARED_SOURCE
from darkformer_jax.data.tokenizers import bpe_vocab_size, load_tokenizer, make_tokenizer
from darkformer_jax.errors import UserError
from darkformer_jax.runs.workdir import Workdir


def tokenizer_of(config: ml_collections.ConfigDict, workdir: Workdir | None = None) -> str:
    """What `data.tokenizer` says; where it says nothing, the workdir's own once it has one, else `init_from`'s."""
    d = config.data
    if d.tokenizer or d.source == PREPARED_SOURCE:
        return d.tokenizer
    own = workdir.tokenizer_dir if workdir else None
    return own or (str(Workdir(config.init_from).local) if config.init_from else "")


def vocab_size_of(config: ml_collections.ConfigDict) -> int:
    """Ids of the tokenizer, or of the model where it says; without reading the text, which a dry run may lack."""
    if config.model.vocab_size:
        return config.model.vocab_size
    tokenizer = tokenizer_of(config)
    if tokenizer.startswith("bpe:"):
        return bpe_vocab_size(tokenizer)
    if tokenizer:
        return make_tokenizer(tokenizer, tuple).vocab_size  # no text is needed: nothing is trained
    return load_tokenizer(config.data.files).vocab_size


def check_same_tokenizer(workdir: Workdir, fingerprint: str, field: str) -> None:
    """Raises UserError where `workdir` was trained with another tokenizer: its embeddings would mean other tokens.

    field: of the config, that names the workdir.
    """
    directory = workdir.tokenizer_dir
    if directory is not None:
        saved = load_tokenizer(directory).fingerprint
        if saved != fingerprint:
            raise UserError(
                f"{field} = {workdir}: its tokenizer (fingerprint {saved[:12]}) is not the data's ({fingerprint[:12]})"
            )
