"""Starting a run from another run's weights, its mechanism changed perhaps."""

from typing import Any, NamedTuple

import jax

from darkformer_jax.data.tokenizers import has_tokenizer, load_tokenizer
from darkformer_jax.errors import UserError
from darkformer_jax.training.checkpoints import Checkpoints
from darkformer_jax.training.setup import Experiment
from darkformer_jax.training.step import TrainState

Path = tuple[str, ...]


class _Place(NamedTuple):
    """Where one layer's parameter is: the array that stacks it, and its row (None: it belongs to no layer)."""

    path: Path
    row: int | None
    shape: tuple[int, ...]


def initialize_from(workdir: str, experiment: Experiment, state: TrainState) -> tuple[TrainState, str]:
    """`state` with every parameter that `workdir`'s newest checkpoint has too, and a report of what it has not.

    Layers are matched by their number, whatever the two models' patterns. Optimizer moments, step and data order start
    anew.

    Raises:
      UserError: no usable checkpoint, another number of layers, a parameter of another shape, or nothing in common.
    """
    checkpoints = Checkpoints(workdir)
    step = checkpoints.latest_good_step()
    if step is None:
        raise UserError(f"init_from = {workdir}: there is no checkpoint in {checkpoints.directory}")
    saved_flat = _flat(checkpoints.saved_shapes(step)["params"])
    wanted_flat, shardings = _flat(state.params), _flat(experiment.shardings.params)
    saved, wanted = _by_layer(saved_flat), _by_layer(wanted_flat)
    common = sorted(wanted.keys() & saved.keys())
    _require_fit(workdir, saved, wanted, common)
    # Stacks of one parameter differ in their number of layers alone, an axis that is never split: a sharding fits both.
    abstract = {
        saved[name].path: jax.ShapeDtypeStruct(
            saved_flat[saved[name].path].shape,
            saved_flat[saved[name].path].dtype,
            sharding=shardings[wanted[name].path],
        )
        for name in common
    }
    _, restored = checkpoints.restore({"params": _nested(abstract)}, step, partial=True)
    checkpoints.close()

    def assemble(params: dict, loaded: dict) -> dict:
        new, found = _flat(params), _flat(loaded)
        for name in common:
            source, target = saved[name], wanted[name]
            value = found[source.path].astype(new[target.path].dtype)
            if target.row is None:
                new[target.path] = value
            else:
                new[target.path] = new[target.path].at[target.row].set(value[source.row])
        return _nested(new)

    params = jax.jit(assemble, out_shardings=experiment.shardings.params)(state.params, restored["params"])
    report = f"initialised {len(common)} of {len(wanted)} parameter arrays from step {step} of {workdir}"
    report += _listed("; new: ", wanted.keys() - saved.keys()) + _listed("; not used: ", saved.keys() - wanted.keys())
    return state._replace(params=params), report


def check_same_tokenizer(workdir: str, fingerprint: str) -> None:
    """Raises UserError where `workdir` was trained with another tokenizer: its embeddings would mean other tokens."""
    if has_tokenizer(workdir):
        saved = load_tokenizer(workdir).fingerprint
        if saved != fingerprint:
            raise UserError(
                f"init_from = {workdir}: its tokenizer (fingerprint {saved[:12]}) is not the data's "
                f"({fingerprint[:12]})"
            )


def _require_fit(workdir: str, saved: dict[Path, _Place], wanted: dict[Path, _Place], common: list[Path]) -> None:
    layers = [len({name[0] for name, place in places.items() if place.row is not None}) for places in (saved, wanted)]
    if layers[0] != layers[1]:
        raise UserError(f"init_from = {workdir}: it has {layers[0]} layers, this model has {layers[1]}")
    for name in common:
        if saved[name].shape != wanted[name].shape:
            raise UserError(
                f"init_from = {workdir}: {'/'.join(name)} has shape {saved[name].shape}, "
                f"this model's has {wanted[name].shape}"
            )
    if not common:
        raise UserError(f"init_from = {workdir}: its model and this one have no parameter in common")


def _by_layer(flat: dict[Path, Any]) -> dict[Path, _Place]:
    """Every parameter by a name that does not depend on the pattern: ("layer 3", "attention", ...)."""
    stacks = {path[0] for path in flat if path[0].startswith("blocks_")}
    places: dict[Path, _Place] = {}
    for path, leaf in flat.items():
        if path[0] not in stacks:
            places[path] = _Place(path, None, tuple(leaf.shape))
            continue
        first = int(path[0].removeprefix("blocks_"))
        for row in range(leaf.shape[0]):
            layer = first + len(stacks) * row
            places[(f"layer {layer}", *path[1:])] = _Place(path, row, tuple(leaf.shape[1:]))
    return places


def _listed(title: str, names: set[Path]) -> str:
    """`; new: attention/mechanism/M of layers 0, 2`; empty without names."""
    layers: dict[str, list[int]] = {}
    for name in names:
        is_layer = name[0].startswith("layer ")
        numbers = layers.setdefault("/".join(name[1:] if is_layer else name), [])
        if is_layer:
            numbers.append(int(name[0].removeprefix("layer ")))
    shown = [
        f"{name} of layers {', '.join(map(str, sorted(numbers)))}" if numbers else name
        for name, numbers in sorted(layers.items())
    ]
    return title + ", ".join(shown) if shown else ""


def _flat(tree: dict, prefix: Path = ()) -> dict[Path, Any]:
    flat: dict[Path, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, (*prefix, name)) if isinstance(value, dict) else {(*prefix, name): value}
    return flat


def _nested(flat: dict[Path, Any]) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree
