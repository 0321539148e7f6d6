"""The model of a finished or running run, for the verbs that use one: generate and evaluate."""

from typing import NamedTuple

import jax
import ml_collections

from darkformer_jax.config import from_json, model_spec
from darkformer_jax.data.tokenizers import Tokenizer, load_tokenizer
from darkformer_jax.errors import UserError
from darkformer_jax.model import Network
from darkformer_jax.training.checkpoints import Checkpoints
from darkformer_jax.training.workdir import read_config


class WorkdirModel(NamedTuple):
    """A trained model, its tokenizer and its config."""

    network: Network
    params: dict
    projections: dict
    tokenizer: Tokenizer
    config: ml_collections.ConfigDict
    step: int


def load_model(workdir: str, step: int | None = None) -> WorkdirModel:
    """Reads the newest undamaged checkpoint of a workdir, or the one of `step`, onto the default device.

    Raises:
      UserError: no config, no checkpoint, a damaged one, or one that does not fit the config.
    """
    saved = read_config(workdir)
    tokenizer = load_tokenizer(workdir)
    try:
        config = from_json(saved)
        network = Network.of(model_spec(config, tokenizer.vocab_size))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{workdir}/config.json is not the config of a run of this version: {reason}") from error
    checkpoints = Checkpoints(workdir)
    abstract = jax.eval_shape(lambda: network.init(jax.random.key(0)))
    wanted = {name: tree for name, tree in zip(("params", "projections"), abstract, strict=True) if tree}
    step, restored = checkpoints.restore(wanted, step, partial=True)
    checkpoints.close()
    return WorkdirModel(network, restored["params"], restored.get("projections", {}), tokenizer, config, step)
