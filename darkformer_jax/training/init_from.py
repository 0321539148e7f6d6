"""Starting a run from another run's weights, its mechanism changed perhaps."""

from typing import Any

import jax

from darkformer_jax.data.tokenizers import has_tokenizer, load_tokenizer
from darkformer_jax.errors import UserError
from darkformer_jax.training.checkpoints import Checkpoints
from darkformer_jax.training.setup import Experiment
from darkformer_jax.training.step import TrainState


def initialize_from(workdir: str, experiment: Experiment, state: TrainState) -> tuple[TrainState, str]:
    """`state` with every parameter that `workdir`'s newest checkpoint has too, and a report of what it has not.

    Optimizer moments, step and data order start anew.

    Raises:
      UserError: no usable checkpoint, a parameter of another shape, or nothing in common.
    """
    checkpoints = Checkpoints(workdir)
    step = checkpoints.latest_good_step()
    if step is None:
        raise UserError(f"init_from = {workdir}: there is no checkpoint in {checkpoints.directory}")
    saved_shapes = _flat(checkpoints.saved_shapes(step)["params"])
    wanted, shardings = _flat(state.params), _flat(experiment.shardings.params)
    common = {path for path in wanted if path in saved_shapes}
    for path in sorted(common):
        if saved_shapes[path].shape != wanted[path].shape:
            raise UserError(
                f"init_from = {workdir}: {'/'.join(path)} has shape {saved_shapes[path].shape}, "
                f"this model's has {wanted[path].shape}"
            )
    if not common:
        raise UserError(f"init_from = {workdir}: its model and this one have no parameter in common")
    abstract = {
        path: jax.ShapeDtypeStruct(wanted[path].shape, saved_shapes[path].dtype, sharding=shardings[path])
        for path in common
    }
    _, restored = checkpoints.restore({"params": _nested(abstract)}, step, partial=True)
    loaded = _flat(restored["params"])
    params = {path: loaded[path].astype(old.dtype) if path in loaded else old for path, old in wanted.items()}
    new = sorted("/".join(path) for path in wanted.keys() - common)
    dropped = sorted("/".join(path) for path in saved_shapes.keys() - wanted.keys())
    report = f"initialised {len(common)} of {len(wanted)} parameters from step {step} of {workdir}"
    report += f"; new: {', '.join(new)}" if new else ""
    report += f"; not used: {', '.join(dropped)}" if dropped else ""
    return state._replace(params=_nested(params)), report


def check_same_tokenizer(workdir: str, fingerprint: str) -> None:
    """Raises UserError where `workdir` was trained with another tokenizer: its embeddings would mean other tokens."""
    if has_tokenizer(workdir):
        saved = load_tokenizer(workdir).fingerprint
        if saved != fingerprint:
            raise UserError(
                f"init_from = {workdir}: its tokenizer (fingerprint {saved[:12]}) is not the data's ({fingerprint[:12]})"
            )


def _flat(tree: dict, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    flat: dict[tuple[str, ...], Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, (*prefix, name)) if isinstance(value, dict) else {(*prefix, name): value}
    return flat


def _nested(flat: dict[tuple[str, ...], Any]) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree
