"""A teacher: a frozen model whose predictions are targets of another model."""

import dataclasses
import functools

import ml_collections

from darkformer_jax.distributed.sharding import make_mesh
from darkformer_jax.errors import UserError
from darkformer_jax.model.network import Network
from darkformer_jax.runs.load import WorkdirModel, language_model_network, load_language_model
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.tokenizer import check_same_tokenizer


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The newest model of `distill.workdir`. The first use of `arrays` or `step` reads its weights.

    Attributes:
      config: the student's.
      network: the teacher's.
    """

    config: ml_collections.ConfigDict
    network: Network

    @classmethod
    def of(cls, config: ml_collections.ConfigDict, vocab_size: int, fingerprint: str) -> "Teacher":
        """The teacher that a student's config names.

        Args:
          config: the student's.
          vocab_size: number of ids of the data's tokenizer.
          fingerprint: that of the data's tokenizer.

        Raises:
          UserError: no workdir of a language model, another tokenizer, or a table of another size.
        """
        workdir = Workdir(config.distill.workdir)
        check_same_tokenizer(workdir, fingerprint, "distill.workdir")
        network = language_model_network(workdir)
        theirs, ours = network.spec.vocab_size, config.model.vocab_size or vocab_size
        if theirs != ours:
            raise UserError(
                f"distill.workdir = {workdir}: its model has {theirs} ids, this one {ours}; allowed: the same"
            )
        if config.distill.hidden_weight:
            _require_same_layers(workdir, network, config.model)
        return cls(config, network)

    @property
    def arrays(self) -> tuple[dict, dict]:
        """Its parameters and projections on the config's mesh, in the dtypes of its checkpoint.

        Raises UserError if there is no usable checkpoint.
        """
        return self._model.params, self._model.projections

    @property
    def step(self) -> int:
        """The step of its checkpoint. Raises UserError as `arrays` does."""
        return self._model.step

    @functools.cached_property
    def _model(self) -> WorkdirModel:
        return load_language_model(Workdir(self.config.distill.workdir), mesh=make_mesh(self.config.mesh.to_dict()))


def _require_same_layers(workdir: Workdir, network: Network, model: ml_collections.ConfigDict) -> None:
    for name, theirs in (("num_layers", network.spec.num_layers), ("embed_dim", network.spec.embed_dim)):
        if theirs != model[name]:
            raise UserError(
                f"distill.workdir = {workdir}: model.{name} = {theirs}, in this model {model[name]}; allowed with "
                "distill.hidden_weight: the same"
            )
