"""All parts of a training run, made from its config without allocating an array."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding

from darkformer_jax.config.pattern import parse_pattern, show_layer
from darkformer_jax.config.specs import model_spec
from darkformer_jax.distributed.sharding import (
    Part,
    context_size,
    make_mesh,
    part_of_process,
    sharding_of,
    with_sharding,
)
from darkformer_jax.distributed.tokens import tokens_per_device, vocab_per_device
from darkformer_jax.mixers import MIXERS
from darkformer_jax.model.flops import train_step_flops
from darkformer_jax.model.lora import is_lora
from darkformer_jax.model.network import Network
from darkformer_jax.model.token_loss import tokens_at_once
from darkformer_jax.model.trainable import Paths, split_params, trained_paths
from darkformer_jax.tasks.task import Objective
from darkformer_jax.training.evaluation import rows_sharding
from darkformer_jax.training.optimizer import make_optimizer, make_schedule
from darkformer_jax.training.step import TrainState, make_state_init, make_train_step, state_shardings


def mesh_of(
    config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> tuple[Mesh, NamedSharding]:
    """(the config's mesh, how it holds arrays [rows, places] of a batch), on `devices`; None = on all.

    Raises UserError if the mesh does not fit the devices, the processes or the batches.
    """
    mesh = make_mesh(config.mesh.to_dict(), devices)
    micro_batch = config.batch_size // config.accumulation_steps
    axes, length = ("batch", "sequence"), config.sequence_length
    batch_sharding = sharding_of("a micro-batch (batch_size / accumulation_steps)", axes, (micro_batch, length), mesh)
    part_of_process(batch_sharding)
    sharding_of("an evaluation batch (eval.batch_size)", axes, (config.eval.batch_size, length), mesh)
    return mesh, batch_sharding


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts of a training run.

    Attributes:
      config: validated, with a value for every field.
      objective: what is learned.
      network: the model.
      trained: the parameters that the optimizer updates.
      optimizer: that of `trained`.
      schedule: the learning rate that metrics show.
      mesh: the devices.
      abstract: the shapes of the state.
      shardings: how the mesh holds the state.
      batch_sharding: how it holds arrays [rows, places] of a batch.
    """

    config: ml_collections.ConfigDict
    objective: Objective
    network: Network
    trained: Paths
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    mesh: Mesh
    abstract: TrainState
    shardings: TrainState
    batch_sharding: NamedSharding

    @classmethod
    def of(
        cls, config: ml_collections.ConfigDict, objective: Objective, devices: Sequence[jax.Device] | None = None
    ) -> "Experiment":
        """The experiment on `devices`; None = on all.

        Raises UserError if the config, the objective and the devices do not fit together.
        """
        mesh, batch_sharding = mesh_of(config, devices)
        network = Network.of(model_spec(config, objective.vocab_size, objective.num_outputs))
        o = config.optimizer
        trained = trained_paths(network, o.train)
        optimizer = make_optimizer(o, config.num_steps, network)
        peak = o.geometry_learning_rate if o.train == "geometry" else o.learning_rate
        schedule = make_schedule(o, config.num_steps, peak)
        abstract = jax.eval_shape(make_state_init(network, optimizer, config.seed, trained))
        shardings = state_shardings(network, optimizer, abstract, mesh, trained)
        for mixer in network.spec.pattern:
            MIXERS[mixer.kind].check_mesh(mixer, mesh)
            if context_size(mesh) > 1:
                MIXERS[mixer.kind].check_stretch(mixer, config.sequence_length // context_size(mesh))
        return cls(config, objective, network, trained, optimizer, schedule, mesh, abstract, shardings, batch_sharding)

    def initial_state(self) -> TrainState:
        """The state before the first step, created already sharded."""
        init = make_state_init(self.network, self.optimizer, self.config.seed, self.trained)
        # This runs once. On a CPU, LLVM takes 13 s for the quickstart's random draws at its usual level, as long as for
        # the training step. At this level it takes 4 s, and the bits are the same.
        options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
        return jax.jit(init, out_shardings=self.shardings, compiler_options=options)()

    def train_step(self) -> jax.stages.Wrapped:
        """The jitted (state, batch, the task's constants) -> (state, metrics); the state is donated."""
        step = make_train_step(
            self.network,
            self.objective,
            self.optimizer,
            self.schedule,
            accumulation_steps=self.config.accumulation_steps,
            redraw_every=self.config.model.attention.redraw_every,
            trained=self.trained,
        )
        options = None
        if self.config.model.remat != "none" and self.mesh.devices.flat[0].platform == "cpu":
            # This pass removes the barriers of jax.checkpoint, after which XLA merges what is computed again with the
            # forward pass and keeps everything. The other platforms remove them later.
            options = {"xla_disable_hlo_passes": "cse_barrier_expander"}
        return jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, None), compiler_options=options)

    @property
    def part(self) -> Part:
        """The rows of every batch that this process reads."""
        return part_of_process(self.batch_sharding)

    @property
    def sharded_state(self) -> TrainState:
        """The state's shapes, each with its sharding."""
        return jax.tree.map(with_sharding, self.abstract, self.shardings)

    @property
    def sharded_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a step's batch, each with its sharding."""
        shapes = self.objective.batch_shapes(self.config.batch_size)
        return {
            name: with_sharding(leaf, rows_sharding(self.batch_sharding, leaf.ndim)) for name, leaf in shapes.items()
        }

    @property
    def num_params(self) -> int:
        """The number of parameters, trained or not."""
        return _size(self.abstract.params)

    @property
    def num_trained(self) -> int:
        """The number of parameters that `optimizer.train` trains."""
        return _size(split_params(self.abstract.params, self.trained)[0])

    @property
    def state_bytes(self) -> int:
        """Bytes of the whole state: parameters, optimizer moments, projections."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.abstract))

    @property
    def tokens_per_step(self) -> int:
        """The number of positions in a step's batch, padding included."""
        return self.config.batch_size * self.config.sequence_length

    @property
    def step_flops(self) -> float:
        """Model FLOPs per step: `train_step_flops`, less frozen matrices' gradients, plus low-rank updates."""
        spec = self.network.spec
        matrices = {"kernel"} if spec.num_outputs else {"kernel", "embedding" if spec.tie_embeddings else "head"}
        frozen = flatten_dict(split_params(self.abstract.params, self.trained)[1])
        low_rank = sum(leaf.size for path, leaf in flatten_dict(self.abstract.params).items() if is_lora(path))
        multiplied = sum(leaf.size for path, leaf in frozen.items() if path[-1] in matrices)
        whole = train_step_flops(spec, self.config.sequence_length, self.tokens_per_step)
        return whole + (6.0 * low_rank - 2.0 * multiplied) * self.tokens_per_step

    @property
    def cost(self) -> str:
        """The whole run in words."""
        steps, tokens = self.config.num_steps, self.tokens_per_step
        return f"{steps:,} steps of {tokens:,} tokens, {steps * self.step_flops:.1e} FLOPs in all"

    def describe(self) -> str:
        """The sizes of the experiment, which --dry_run prints."""
        spec = self.network.spec
        per_device = bytes_per_device(self.abstract, self.shardings)
        rows = (
            ("parameters", f"{self.num_params:,}"),
            ("trained", f"{self.num_trained:,} (optimizer.train = {self.config.optimizer.train!r})"),
            ("state", f"{self.state_bytes / 2**20:,.1f} MiB, of which {per_device / 2**20:,.1f} MiB per device"),
            ("tokens/step", f"{self.tokens_per_step:,} = {self.config.batch_size} x {self.config.sequence_length}"),
            ("FLOPs/step", f"{self.step_flops:.3e}"),
            ("layers", f"{spec.num_layers}{', in turn ' if len(spec.pattern) > 1 else ' x '}{self._layers()}"),
            ("vocabulary", f"{spec.vocab_size:,}"),
            *([] if spec.num_outputs else [("logits", self._logits())]),
            *self.objective.describe().items(),
            ("mesh", ", ".join(f"{name}={size}" for name, size in self.mesh.shape.items())),
            ("steps", f"{self.config.num_steps:,}"),
            ("cost", self.cost),
        )
        return "\n".join(f"{name:14s} {value}" for name, value in rows)

    def _layers(self) -> str:
        """The entries of the pattern with their options, equal neighbours as one: `softmax, 2 x dark(m=128)`."""
        attention, shown = self.config.model.attention, []
        for layer, mixer in zip(
            parse_pattern(attention.pattern, attention.kind), self.network.spec.pattern, strict=True
        ):
            # Which heads are exact is shown wherever it is said, for it decides how large the caches are.
            exact = {"exact_kv_heads": mixer.exact_kv_heads} if mixer.exact_kv_heads else {}
            shown.append(show_layer(layer._replace(options={**layer.options, **exact})))
        runs = [(entry, len(list(run))) for entry, run in itertools.groupby(shown)]
        return ", ".join(f"{count} x {entry}" if count > 1 else entry for entry, count in runs)

    def _logits(self) -> str:
        """What a device has of a micro-batch's logits at a time, in words."""
        rows = self.config.batch_size // self.config.accumulation_steps, self.config.sequence_length
        vocab = self.network.spec.vocab_size
        with jax.set_mesh(self.mesh):
            tokens, count = tokens_at_once(rows, vocab), tokens_per_device(rows)
            size = 4 * tokens * vocab_per_device(vocab)
        return f"{size / 2**20:,.1f} MiB per device, of {tokens:,} of its {count:,} tokens at a time"


def bytes_per_device(abstract: Any, shardings: Any) -> int:
    """Bytes of the arrays' shards on one device."""
    pairs = zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, sharding in pairs)


def _size(tree: dict) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
