"""Which tokenizer a run has: its config's, its workdir's, or that of the model it starts from."""

import ml_collections

from darkformer_jax.data import PREPARED_SOURCE, prepared_directories
from darkformer_jax.data.files import local_path
from darkformer_jax.data.prepared import read_manifest
from darkformer_jax.data.tokenizers import bpe_vocab_size, load_tokenizer, make_tokenizer
from darkformer_jax.errors import UserError
from darkformer_jax.runs.workdir import Workdir


def tokenizer_of(config: ml_collections.ConfigDict, workdir: Workdir | None = None) -> str:
    """`data.tokenizer` if it is set, else the workdir's own if there is one, else that of `init_from`."""
    d = config.data
    if d.tokenizer or d.source == PREPARED_SOURCE:
        return d.tokenizer
    own = workdir.tokenizer_dir if workdir else None
    return own or (str(Workdir(config.init_from).local) if config.init_from else "")


def vocab_size_of(config: ml_collections.ConfigDict, workdir: Workdir | None = None) -> int:
    """`model.vocab_size`, or the tokenizer's if that is 0. Does not read the text, which a dry run may lack."""
    if config.model.vocab_size:
        return config.model.vocab_size
    tokenizer = tokenizer_of(config, workdir)
    if tokenizer.startswith("bpe:"):
        return bpe_vocab_size(tokenizer)
    if tokenizer or config.data.source != PREPARED_SOURCE:
        return make_tokenizer(tokenizer, tuple).vocab_size  # no text is needed: nothing is trained
    directory = prepared_directories(config.data.files)[0].name
    read_manifest(local_path(directory))  # says that there is none
    return load_tokenizer(directory).vocab_size


def check_same_tokenizer(workdir: Workdir, fingerprint: str, field: str) -> None:
    """Raises UserError if `workdir` was trained with another tokenizer, so that its embeddings mean other tokens.

    So it does if that workdir's own tokenizer is another now.

    field: the config field that names the workdir.
    """
    directory = workdir.tokenizer_dir
    if directory is not None:
        saved = load_tokenizer(directory).fingerprint
        workdir.check_tokenizer(saved)
        if saved != fingerprint:
            raise UserError(
                f"{field} = {workdir}: its tokenizer (fingerprint {saved[:12]}) is not the data's ({fingerprint[:12]})"
            )
