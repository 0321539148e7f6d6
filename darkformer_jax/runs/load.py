"""The model of a finished or running run, for verbs that use one, such as generate and evaluate."""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from darkformer_jax.config.base import LANGUAGE_MODEL, fields
from darkformer_jax.config.fields import flat_fields
from darkformer_jax.config.specs import model_spec
from darkformer_jax.config.validation import from_json, validate
from darkformer_jax.data.tokenizers import Tokenizer, load_tokenizer
from darkformer_jax.distributed.sharding import with_sharding
from darkformer_jax.errors import UserError, one_line
from darkformer_jax.model.lora import merge_lora
from darkformer_jax.model.network import Network, variable_sharding
from darkformer_jax.ops.keys import key_of_seed
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


def load_model(
    workdir: Workdir, step: int | None = None, mesh: Mesh | None = None, dtype: str | None = None
) -> WorkdirModel:
    """Reads the newest undamaged checkpoint of a workdir, or that of `step`, onto the mesh or the default device.

    dtype: what the model computes in, float32 or bfloat16; None: what the run did.

    The checkpoint says how many outputs the model has per sequence. Parameters keep the dtypes of the checkpoint, which
    are float32 after training. Low-rank updates are merged into the weights, so the returned model and its config
    have none.

    Raises:
      UserError: no config, no checkpoint, a damaged one, or one that does not fit the config.
    """
    config, tokenizer = _read_config(workdir)
    config.model.dtype = dtype or config.model.dtype
    checkpoints = Checkpoints(workdir)
    step = checkpoints.good_step(step)
    saved = checkpoints.saved_shapes(step)["params"]
    num_outputs = saved["classifier"]["bias"].shape[0] if "classifier" in saved else 0
    with _config_errors(workdir):
        network = Network.of(model_spec(config, tokenizer.vocab_size, num_outputs))
    params, projections = jax.eval_shape(lambda: network.init(key_of_seed(0)))
    if mesh is not None:
        sharding = functools.partial(variable_sharding, mesh=mesh)
        params = jax.tree.map(with_sharding, params, network.map_params(sharding))
        projections = jax.tree.map(with_sharding, projections, network.map_projections(sharding))
    wanted = {"params": _with_dtypes(params, saved)}
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


def load_language_model(
    workdir: Workdir, step: int | None = None, mesh: Mesh | None = None, dtype: str | None = None
) -> WorkdirModel:
    """`load_model` for a language model. Raises UserError also for a model of another task."""
    _require_language_model(workdir)
    return load_model(workdir, step, mesh, dtype)


def language_model_network(workdir: Workdir) -> Network:
    """The network that `load_language_model` loads, without its checkpoint. Raises UserError as it does."""
    _require_language_model(workdir)
    config, tokenizer = _read_config(workdir)
    config.model.lora_rank = 0  # as `load_model` merges it
    with _config_errors(workdir):
        return Network.of(model_spec(config, tokenizer.vocab_size))


def _require_language_model(workdir: Workdir) -> None:
    task = dict(flat_fields(workdir.read_config())).get("task.name", LANGUAGE_MODEL)
    if task != LANGUAGE_MODEL:
        raise UserError(
            f"{workdir}: a model with task.name = {task!r} predicts no next token; `predict` answers for it; "
            "allowed here: a language model's workdir"
        )


def _read_config(workdir: Workdir) -> tuple[ml_collections.ConfigDict, Tokenizer]:
    """The validated config of a workdir, and its tokenizer, which must be the one of its training."""
    saved = workdir.read_config()
    tokenizer = load_tokenizer(str(workdir.local))
    workdir.check_tokenizer(tokenizer.fingerprint)
    with _config_errors(workdir):
        unknown = sorted(dict(flat_fields(saved)).keys() - fields().keys())
        if unknown:
            raise ValueError(f"{unknown[0]} is no field")
        config = from_json(saved)
        config.model.attention.backend = "auto"  # that of the run was for its own devices
        validate(config)
        return config, tokenizer


@contextlib.contextmanager
def _config_errors(workdir: Workdir) -> Iterator[None]:
    """Whatever a broken config raises is a UserError that names its file."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        reason = one_line(error)
        raise UserError(f"{workdir}/{CONFIG_FILE} is not the config of a run of this version: {reason}") from error


def _with_dtypes(wanted: dict, saved: dict) -> dict:
    """`wanted` with the dtypes of the floating-point arrays in `saved`."""

    def of(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = dtypes.get(path, leaf.dtype)
        return leaf.update(dtype=dtype if jnp.issubdtype(dtype, jnp.floating) else leaf.dtype)

    dtypes = {path: leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(saved)}
    return jax.tree_util.tree_map_with_path(of, wanted)
