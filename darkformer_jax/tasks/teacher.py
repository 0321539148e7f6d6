"""A teacher: a frozen model whose predictions are targets of another model."""

from typing import NamedTuple

import ml_collections

from darkformer_jax.distributed.sharding import make_mesh
from darkformer_jax.errors import UserError
from darkformer_jax.model.network import Network
from darkformer_jax.runs.load import load_language_model
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.tokenizer import check_same_tokenizer


class Teacher(NamedTuple):
    """A frozen model. `arrays` are its parameters and projections, sharded like the student's."""

    network: Network
    arrays: tuple[dict, dict]
    step: int


def load_teacher(config: ml_collections.ConfigDict, vocab_size: int, fingerprint: str) -> Teacher:
    """The newest model of `distill.workdir` on the config's mesh, in the dtypes of its checkpoint.

    Args:
      config: the student's.
      vocab_size: number of ids of the data's tokenizer.
      fingerprint: that of the data's tokenizer.

    Raises:
      UserError: no usable checkpoint, another tokenizer, or a table of another size.
    """
    workdir = Workdir(config.distill.workdir)
    check_same_tokenizer(workdir, fingerprint, "distill.workdir")
    model = load_language_model(workdir, mesh=make_mesh(config.mesh.to_dict()))
    theirs, ours = model.network.spec.vocab_size, config.model.vocab_size or vocab_size
    if theirs != ours:
        raise UserError(f"distill.workdir = {workdir}: its model has {theirs} ids, this one {ours}; allowed: the same")
    return Teacher(model.network, (model.params, model.projections), model.step)
