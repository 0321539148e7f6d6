"""The model of a finished or running run, for verbs that use one, such as generate and evaluate."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh, NamedSharding

from darkformer_jax.config.specs import model_spec
from darkformer_jax.config.validation import from_json, validate
from darkformer_jax.data.labelled import load_class_names
from darkformer_jax.data.tokenizers import Tokenizer, load_tokenizer
from darkformer_jax.errors import UserError, one_line
from darkformer_jax.model.lora import merge_lora
from darkformer_jax.model.network import Network, variable_sharding
from darkformer_jax.runs.checkpoints import Checkpoints
from darkformer_jax.runs.origin import ends_of_text
from darkformer_jax.runs.workdir import CONFIG_FILE, Workdir


class WorkdirModel(NamedTuple):
    """A trained model, its tokenizer and its config."""

    network: Network
    params: dict
    projections: dict
    tokenizer: Tokenizer
    ends: frozenset[int]  # ids that end a text
    config: ml_collections.ConfigDict
    step: int


def load_model(workdir: Workdir, step: int | None = None, mesh: Mesh | None = None) -> WorkdirModel:
    """Reads the newest undamaged checkpoint of a workdir, or that of `step`, onto the mesh or the default device.

    Parameters keep the dtypes of the checkpoint, which are float32 after training. Low-rank updates are merged into the
    weights, so the returned model and its config have none.

    Raises:
      UserError: no config, no checkpoint, a damaged one, or one that does not fit the config.
    """
    saved = workdir.read_config()
    tokenizer = load_tokenizer(str(workdir.local))
    try:
        config = from_json(saved)
        validate(config)
        num_outputs = _num_outputs(config.task.name, workdir)
        network = Network.of(model_spec(config, tokenizer.vocab_size, num_outputs))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        reason = one_line(error)
        raise UserError(f"{workdir}/{CONFIG_FILE} is not the config of a run of this version: {reason}") from error
    checkpoints = Checkpoints(workdir)
    step = checkpoints.good_step(step)
    params, projections = jax.eval_shape(lambda: network.init(jax.random.key(0)))
    if mesh is not None:
        sharding = functools.partial(variable_sharding, mesh=mesh)
        params = jax.tree.map(_with_sharding, params, network.map_params(sharding))
        projections = jax.tree.map(_with_sharding, projections, network.map_projections(sharding))
    wanted = {"params": _with_dtypes(params, checkpoints.saved_shapes(step)["params"])}
    wanted |= {"projections": projections} if projections else {}
    _, restored = checkpoints.restore(wanted, step, partial=True, verify=False)
    checkpoints.close()
    ends = ends_of_text(workdir) | {tokenizer.eos_id}
    params, projections = restored["params"], restored.get("projections", {})
    if config.model.lora_rank:
        params = merge_lora(params)
        config.model.lora_rank, config.optimizer.train = 0, "all"
        network = Network.of(model_spec(config, tokenizer.vocab_size, num_outputs))
    return WorkdirModel(network, params, projections, tokenizer, ends, config, step)


def load_language_model(workdir: Workdir, step: int | None = None, mesh: Mesh | None = None) -> WorkdirModel:
    """`load_model` for a language model. Raises UserError also for a model of another task."""
    model = load_model(workdir, step, mesh)
    if model.network.spec.num_outputs:
        raise UserError(
            f"{workdir}: a model with task.name = {model.config.task.name!r} predicts no next token; "
            "allowed: a language model's workdir"
        )
    return model


def _num_outputs(task: str, workdir: Workdir) -> int:
    """How many numbers the model of a task gives per sequence; 0 = logits of the next token."""
    if task == "classification":
        return len(load_class_names(workdir.local))
    return 1 if task == "regression" else 0


def _with_sharding(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return leaf.update(sharding=sharding)


def _with_dtypes(wanted: dict, saved: dict) -> dict:
    """`wanted` with the dtypes of the floating-point arrays in `saved`."""

    def of(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = dtypes.get(path, leaf.dtype)
        return leaf.update(dtype=dtype if jnp.issubdtype(dtype, jnp.floating) else leaf.dtype)

    dtypes = {path: leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(saved)}
    return jax.tree_util.tree_map_with_path(of, wanted)
