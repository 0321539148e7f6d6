"""Distillation (Hinton et al., arXiv 1503.02531): a frozen teacher's predictions as targets beside the text's own."""

from typing import NamedTuple

from darkformer_jax.errors import UserError
from darkformer_jax.model.network import Network
from darkformer_jax.runs.load import load_model
from darkformer_jax.training.experiment import Experiment
from darkformer_jax.training.init_from import check_same_tokenizer


class Teacher(NamedTuple):
    """A model that is not trained; `arrays` are its parameters and projections, laid out like the student's."""

    network: Network
    arrays: tuple[dict, dict]
    step: int


def load_teacher(workdir: str, experiment: Experiment, fingerprint: str) -> Teacher:
    """The newest model of `workdir` on the experiment's mesh, in the dtypes that its checkpoint has.

    Args:
      fingerprint: of the data's tokenizer.

    Raises:
      UserError: no usable checkpoint, another tokenizer, or a table of another size.
    """
    check_same_tokenizer(workdir, fingerprint, "distill.workdir")
    model = load_model(workdir, mesh=experiment.mesh)
    theirs, ours = model.network.spec.vocab_size, experiment.network.spec.vocab_size
    if theirs != ours:
        raise UserError(f"distill.workdir = {workdir}: its model has {theirs} ids, this one {ours}; allowed: as many")
    return Teacher(model.network, (model.params, model.projections), model.step)
