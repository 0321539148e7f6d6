"""Starting a run from another run's weights, perhaps with another mechanism."""

import contextlib
import itertools
from collections.abc import Collection
from typing import NamedTuple

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from darkformer_jax.errors import UserError
from darkformer_jax.model.lora import is_lora, merge_lora
from darkformer_jax.runs.checkpoints import Checkpoints
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.training.experiment import Experiment
from darkformer_jax.training.step import TrainState

ParamPath = tuple[str, ...]


class _Place(NamedTuple):
    """Where one layer's parameter is: the array that stacks it, and its row (None: it belongs to no layer)."""

    path: ParamPath
    row: int | None
    shape: tuple[int, ...]


def initialize_from(
    workdir: Workdir, experiment: Experiment, state: TrainState, step: int | None = None
) -> tuple[TrainState, str]:
    """(`state` with every parameter that a checkpoint of `workdir` also has, a line that says what differs).

    Layers are matched by their number, whatever the two models' patterns. Low-rank updates that this model lacks are
    merged into the weights. Projections of the same shape are copied, unless the run redraws them, and so are
    coordinates, always. Optimizer moments, step and data order start anew.

    Args:
      step: the checkpoint's; None = the newest.

    Raises:
      UserError: no usable checkpoint, another number of layers, a parameter of another shape, or nothing in common.
    """
    checkpoints = Checkpoints(workdir)
    step = checkpoints.latest_good_step() if step is None else checkpoints.good_step(step)
    if step is None:
        raise UserError(f"init_from = {workdir}: there is no checkpoint in {checkpoints.directory}")
    shapes = checkpoints.saved_shapes(step)
    saved, wanted = _by_layer(shapes["params"]), _by_layer(state.params)
    common = sorted(wanted.keys() & saved.keys())
    _require_fit(workdir, saved, wanted, common)
    pairs = {name: (saved[name], wanted[name]) for name in common}
    merged = set() if any(map(is_lora, wanted)) else {name for name in saved if is_lora(name)}
    factors = {saved[name].path for name in merged}
    params = _transfer(checkpoints, step, "params", pairs, state.params, experiment.shardings.params, factors)
    report = f"initialised {len(common)} of {len(wanted)} parameter arrays from step {step} of {workdir}"
    report += ", its low-rank updates merged" if merged else ""

    # M was fitted to its projections, so they are copied, unless the new run's config redraws them.
    projections = state.projections
    drawn_anew = experiment.config.model.attention.redraw_every > 0
    if shapes.get("projections"):
        old = _by_layer(shapes["projections"], _num_stacks(shapes["params"]))
        new = _by_layer(projections, _num_stacks(state.params))
        same = sorted(
            name
            for name in new.keys() & old.keys()
            if new[name].shape == old[name].shape and not (drawn_anew and name[-1] == "projections")
        )
        if same:
            shardings = experiment.shardings.projections
            pairs = {name: (old[name], new[name]) for name in same}
            projections = _transfer(checkpoints, step, "projections", pairs, projections, shardings)
            report += f", and {len(same)} of {len(new)} arrays of projections"
    checkpoints.close()
    report += _listed("; new: ", wanted.keys() - saved.keys()) + _listed(
        "; not used: ", saved.keys() - wanted.keys() - merged
    )
    return state._replace(params=params, projections=projections), report


def check_init_from(workdir: Workdir, experiment: Experiment | None = None) -> None:
    """Raises UserError if `initialize_from` would find no checkpoint, or one that does not fit. Reads no array.

    experiment: None = its sizes are not known yet.
    """
    checkpoints = Checkpoints(workdir)
    try:
        steps = checkpoints.committed_steps()
        if not steps and not checkpoints.steps_without_manifest():
            raise UserError(f"init_from = {workdir}: there is no checkpoint in {checkpoints.directory}")
        if experiment is None or not steps:
            return
        with contextlib.suppress(OSError, ValueError, KeyError):  # of a damaged step, which `initialize_from` judges
            shapes = checkpoints.saved_shapes(steps[-1])
            saved, wanted = _by_layer(shapes["params"]), _by_layer(experiment.abstract.params)
            _require_fit(workdir, saved, wanted, sorted(wanted.keys() & saved.keys()))
    finally:
        checkpoints.close()


def _transfer(
    checkpoints: Checkpoints,
    step: int,
    tree: str,
    pairs: dict[ParamPath, tuple[_Place, _Place]],
    current: dict,
    shardings: dict,
    factors: Collection[ParamPath] = (),
) -> dict:
    """`current` with arrays of the checkpoint's `tree` copied into it, in the dtypes of `current`.

    Args:
      pairs: (place in the checkpoint, place in `current`) of each array.
      shardings: those of `current`.
      factors: paths in the checkpoint of low-rank updates that are merged first.
    """
    saved, layout = flatten_dict(checkpoints.saved_shapes(step)[tree]), flatten_dict(shardings)
    # Two stacks of a parameter differ only in their number of layers. That axis is never split: a sharding fits both.
    abstract = {
        source.path: jax.ShapeDtypeStruct(
            saved[source.path].shape, saved[source.path].dtype, sharding=layout[target.path]
        )
        for source, target in pairs.values()
    }
    everywhere = NamedSharding(next(iter(layout.values())).mesh, P())
    abstract |= {path: saved[path].update(sharding=everywhere) for path in factors}
    _, restored = checkpoints.restore({tree: unflatten_dict(abstract)}, step, partial=True, verify=False)

    def assemble(current: dict, loaded: dict) -> dict:
        new, found = flatten_dict(current), flatten_dict(merge_lora(loaded) if factors else loaded)
        for source, target in pairs.values():
            value = found[source.path].astype(new[target.path].dtype)
            if target.row is None:
                new[target.path] = value
            else:
                new[target.path] = new[target.path].at[target.row].set(value[source.row])
        return unflatten_dict(new)

    assembled: dict = jax.jit(assemble, out_shardings=shardings)(current, restored[tree])
    return assembled


def _require_fit(
    workdir: Workdir, saved: dict[ParamPath, _Place], wanted: dict[ParamPath, _Place], common: list[ParamPath]
) -> None:
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


def _num_stacks(params: dict) -> int:
    """The length of the model's pattern: each of its places has a stack of parameters."""
    return sum(name.startswith("blocks_") for name in params)


def _by_layer(tree: dict, num_stacks: int | None = None) -> dict[ParamPath, _Place]:
    """Every array by a name that does not depend on the pattern: ("layer 3", "attention", ...).

    num_stacks: the model's, to be given if `tree` is not its parameters and may lack some stacks.
    """
    num_stacks = _num_stacks(tree) if num_stacks is None else num_stacks
    places: dict[ParamPath, _Place] = {}
    for path, leaf in flatten_dict(tree).items():
        if not path[0].startswith("blocks_"):
            places[path] = _Place(path, None, tuple(leaf.shape))
            continue
        first = int(path[0].removeprefix("blocks_"))
        for row in range(leaf.shape[0]):
            layer = first + num_stacks * row
            places[(f"layer {layer}", *path[1:])] = _Place(path, row, tuple(leaf.shape[1:]))
    return places


def _listed(title: str, names: set[ParamPath]) -> str:
    """`; new: attention/mechanism/M of layers 0, 2`; empty without names."""
    layers: dict[str, list[int]] = {}
    for name in names:
        is_layer = name[0].startswith("layer ")
        numbers = layers.setdefault("/".join(name[1:] if is_layer else name), [])
        if is_layer:
            numbers.append(int(name[0].removeprefix("layer ")))
    shown = [f"{name} of layers {_ranges(numbers)}" if numbers else name for name, numbers in sorted(layers.items())]
    return title + ", ".join(shown) if shown else ""


def _ranges(numbers: list[int]) -> str:
    """0-2, 5 of [0, 1, 2, 5]."""
    runs = itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in ends)
