"""Turns the workdir of an exact model into one with feature attention, fitted layer by layer."""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from darkformer_jax.calibration import CALIBRATION_FILE
from darkformer_jax.calibration.cache_budget import CACHE_CONTEXT, Budget, CacheSizes
from darkformer_jax.calibration.choice import Choice, choose
from darkformer_jax.calibration.exact_layers import Wish, candidates_of, check_wish, hybrid_pattern
from darkformer_jax.calibration.geometry import balanced_maps, whitening_geometry
from darkformer_jax.calibration.head_choice import (
    HeadChoice,
    HeadSizes,
    HeadWish,
    check_head_wish,
    choose_heads,
    head_pattern,
    parse_wishes,
)
from darkformer_jax.calibration.head_order import moments_in_order, restacked, rows_in_order, with_exact_heads_first
from darkformer_jax.calibration.kept import Arrays, Kept, Remember
from darkformer_jax.calibration.moments import Moments
from darkformer_jax.calibration.passages import num_test_passages, read_passages
from darkformer_jax.calibration.quality_curve import CURVE_FILE, draw_curve
from darkformer_jax.calibration.sight import check_sight, copy_distance
from darkformer_jax.calibration.transfer import (
    FittedMechanism,
    LayerTensors,
    errors,
    fit,
    matched_log_gain,
    teacher_layers,
)
from darkformer_jax.calibration.worth import Worth, measure_worth
from darkformer_jax.config.conversion import conversion_config, without_window
from darkformer_jax.config.specs import model_spec
from darkformer_jax.config.validation import validate
from darkformer_jax.data.files import whole_directory, write_json
from darkformer_jax.data.progress import ProgressBar
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from darkformer_jax.mixers.spec import Coordinates, MixerSpec
from darkformer_jax.mixers.window_only import WindowOnly
from darkformer_jax.model.network import Network
from darkformer_jax.model.spec import ModelSpec
from darkformer_jax.ops.keys import key_of_seed
from darkformer_jax.runs.checkpoints import Checkpoints
from darkformer_jax.runs.inherit import inherit
from darkformer_jax.runs.load import WorkdirModel, load_language_model
from darkformer_jax.runs.origin import hand_on_origin
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.next_token import NextToken
from darkformer_jax.training.environment import versions
from darkformer_jax.training.experiment import Experiment
from darkformer_jax.training.init_from import initialize_from
from darkformer_jax.training.step import TrainState

EXACT_KINDS = tuple(kind for kind, mixer in MIXERS.items() if mixer.role == "exact")
KINDS = tuple(kind for kind, mixer in MIXERS.items() if "window" in mixer.uses)  # these can replace an exact kind
GEOMETRY_KINDS = tuple(kind for kind in KINDS if "geometry_init" in MIXERS[kind].uses)  # those of them with an M
LEARNING_KINDS = (*GEOMETRY_KINDS, "lfk")  # without a gain or projections to learn
BALANCED_KINDS = tuple(kind for kind in KINDS if "balanced" in MIXERS[kind].uses)
MOMENTS_FILE = "moments.npz"
LEARNING_RATE = 3e-3  # of M; at 1e-2 the far part of some heads dies (docs/finetuning.md)
_WIDEST = (
    64  # of wider heads M learns slower: a step of Adam changes its largest singular value by up to d times the rate
)

_TOKENS_PER_STEP = 4096
_GAIN_PASSAGES = 4


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """The options; `python -m darkformer_jax.calibrate --help` explains each."""

    workdir: str
    step: int | None
    text: str
    test_text: str
    text_field: str
    mechanism: str
    transfer_steps: int
    learning_rate: float | None
    passages: int
    context: int
    num_features: int
    window: int
    num_sinks: int
    geometry: str
    geometry_init: float
    shrinkage: float
    far_gain: bool
    far_horizon: int
    learn_projections: bool
    exact_layers: str
    cache_budget: str
    exact_heads: str
    seed: int
    heldout_fraction: float = 0.0  # share of the text that is not read, as in `data.heldout_fraction`


class _Found(NamedTuple):
    """Arrays of one layer's mechanism: those that were fitted, and its coordinates."""

    params: dict
    projections: dict


class Calibrated(NamedTuple):
    """What `calibrate` found.

    Attributes:
      layers: one row per replaced layer: `layer`, `seconds`, and the relative errors of its heads, `before`, `after`
        and, if there is a window, `window_only`. Exact heads come first and have none.
      choice: of the exact layers, where they were chosen.
      heads: of the exact heads, likewise.
      worth: the loss of the new model, and that of the same without its features.
      copy_distance: tokens from a passage to its copy, where copying was measured.
    """

    layers: list[dict[str, Any]]
    choice: Choice | None
    heads: HeadChoice | None
    worth: Worth
    copy_distance: int


def calibrate(o: FitOptions, out: str, progress_bar: ProgressBar) -> Calibrated:
    """Fits feature attention to every layer that it replaces, and writes the workdir `out`, whole or not at all.

    What is found on the way is `Kept` until `out` is there: where a call was stopped, the same call goes on.

    calibration.json in `out` holds the options and what is returned.

    Raises:
      UserError: the model is not exact, options contradict each other, or there is too little text.
    """
    with whole_directory(out) as directory:
        exact = Workdir(o.workdir)
        teacher = load_language_model(exact, o.step)
        _require_exact(o.workdir, teacher)
        config = calibrated_config(o)
        specs = (teacher.network.spec, _network(config, teacher).spec)
        begin = int(teacher.tokenizer.adds_bos)
        wish, by_heads = checked_wishes(o, *specs, begin)
        if wish.layers:
            config = calibrated_config(o, hybrid_pattern(teacher.config, config, wish.layers))
        sizes = (o.passages, o.context, o.seed, o.heldout_fraction)
        passages, num_test = read_passages(o.text, o.test_text, o.text_field, teacher.tokenizer, *sizes)
        network, state = _initial(config, exact, teacher)
        kept = Kept(out, _what_decides(o, teacher, passages))
        fitted, rows, moments = _fit_layers(o, teacher, network, state, passages, num_test, progress_bar, kept)
        state = _with_layers(state, network, fitted)
        exact_model = teacher.network.bind(teacher.params, teacher.projections)
        replaced = _in_dtype(network, teacher.network.spec.dtype).bind(state.params, state.projections)
        texts = (passages[num_test:], passages[:num_test], teacher.tokenizer)
        choice, heads, pattern = None, None, ""
        if by_heads is not None:
            context = by_heads.context if isinstance(by_heads, Budget) else CACHE_CONTEXT
            head_sizes = HeadSizes(*specs, context)
            heads = choose_heads(by_heads, exact_model, replaced, *texts, head_sizes, progress_bar, kept)
            num_kv = specs[0].layers[0].num_kv_heads
            state = with_exact_heads_first(state, network, heads.by_layer)
            rows, moments = rows_in_order(rows, heads.by_layer, num_kv), moments_in_order(moments, heads.by_layer)
            pattern = head_pattern(teacher.config, config, heads.by_layer, num_kv)
        elif wish.is_auto:
            context = wish.budget.context if wish.budget else CACHE_CONTEXT
            choice = choose(wish, exact_model, replaced, *texts, CacheSizes.of(*specs, context), progress_bar, kept)
            pattern = hybrid_pattern(teacher.config, config, choice.layers)
            rows = [row for row in rows if row["layer"] not in choice.layers]
        worth = measure_worth(exact_model, replaced, heads or choice, *texts[1:], progress_bar, kept)
        if pattern:
            config = calibrated_config(o, pattern)
            state = restacked(state, network, *_initial(config, exact, teacher))
        written = Workdir(directory)
        written.write_config(config.to_dict())
        teacher.tokenizer.save(str(directory))
        hand_on_origin(exact, written)
        _save(written, state)
        moments.save(directory / MOMENTS_FILE)
        if choice is not None:
            draw_curve(choice.points, choice.number, choice.context, directory / CURVE_FILE)
        chosen = {"exact": choice.to_json()} if choice else {}
        chosen |= {"heads": heads.to_json()} if heads else {}
        chosen["worth"] = worth.to_json()
        write_json(directory / CALIBRATION_FILE, dataclasses.asdict(o) | {"layers": rows} | chosen)
    kept.forget()
    return Calibrated(rows, choice, heads, worth, copy_distance(o.context, begin))


def checked_wishes(o: FitOptions, exact: ModelSpec, replaced: ModelSpec, begin: int) -> tuple[Wish, HeadWish | None]:
    """What is to stay exact: (layers, heads).

    Args:
      exact: the model before.
      replaced: the same with every layer replaced that can be.
      begin: tokens of a passage before its text.

    Raises:
      UserError: wishes that the models cannot have, or passages that are too short to fit features, to choose by, or
        to estimate the moments of a geometry from.
    """
    wish, by_heads = parse_wishes(o.exact_layers, o.exact_heads, o.cache_budget)
    wish = check_wish(wish, exact, replaced)
    check_head_wish(by_heads, exact, replaced)
    chooses = wish.is_auto or isinstance(by_heads, int | Budget)
    for layer in candidates_of(exact, replaced):
        check_sight(replaced.layers[layer], o.context, begin, fits=_learns(o), chooses=chooses)
    dim, train = exact.layers[0].head_dim, o.passages - (0 if o.test_text else num_test_passages(o.passages))
    if o.geometry != "identity" and train * o.context <= dim:
        raise UserError(
            f"--geometry={o.geometry}: needs at least {dim + 1} tokens to fit on, of heads of {dim}; "
            f"--passages={o.passages} of --context={o.context} leave {train * o.context}"
        )
    return wish, by_heads


def _learns(o: FitOptions) -> bool:
    """Whether the mechanism has something to learn, and steps to learn it in."""
    return o.transfer_steps > 0 and (o.mechanism in LEARNING_KINDS or o.far_gain or o.learn_projections)


def _what_decides(o: FitOptions, teacher: WorkdirModel, passages: np.ndarray) -> Iterator[bytes]:
    """What a calibration finds depends on this."""
    yield json.dumps([versions(), dataclasses.asdict(o), teacher.config.to_dict()]).encode("utf-8")
    yield passages.tobytes()
    for leaf in jax.tree.leaves((teacher.params, teacher.projections)):
        yield np.asarray(leaf).tobytes()


def _require_exact(workdir: str, teacher: WorkdirModel) -> None:
    others = sorted(set(teacher.network.spec.layer_kinds) - set(EXACT_KINDS))
    if others:
        raise UserError(f"--workdir={workdir}: its layers are {', '.join(others)}; allowed: {', '.join(EXACT_KINDS)}")


def calibrated_config(o: FitOptions, pattern: str | None = None) -> ml_collections.ConfigDict:
    """The config of the new workdir. Raises UserError for options that contradict each other.

    pattern: of its layers; None = all are replaced that are not local.
    """
    config = conversion_config(o.mechanism)
    attention = config.model.attention
    attention.window = o.window
    without_window(config)
    # Only now: an option that needs a window, given without one, is refused below.
    attention.update({name: value for name, value in dataclasses.asdict(o).items() if name in attention})
    attention.balanced = o.geometry == "balanced"
    if pattern is not None:
        attention.pattern = pattern
    config.init_from, config.sequence_length, config.seed = o.workdir, o.context, o.seed
    config = inherit(config)
    validate(config)
    return config


def _network(config: ml_collections.ConfigDict, teacher: WorkdirModel) -> Network:
    return Network.of(model_spec(config, teacher.tokenizer.vocab_size))


def _in_dtype(network: Network, dtype: str) -> Network:
    """The network, computing in another dtype: a layer's cost is to be that of its attention, not of its rounding."""
    pattern = tuple(dataclasses.replace(mixer, dtype=dtype) for mixer in network.spec.pattern)
    return Network.of(dataclasses.replace(network.spec, dtype=dtype, pattern=pattern))


def _initial(config: ml_collections.ConfigDict, exact: Workdir, teacher: WorkdirModel) -> tuple[Network, TrainState]:
    """(the new network, its state): the weights are the exact model's, the mechanisms are as at the start of a run."""
    experiment = Experiment.of(config, NextToken.of(config, teacher.tokenizer.vocab_size))
    params, projections = jax.jit(experiment.network.init)(key_of_seed(config.seed))
    state = TrainState(jnp.zeros((), jnp.int32), params, projections, ())
    state, _ = initialize_from(exact, experiment, state, teacher.step)
    return experiment.network, state


def _save(workdir: Workdir, state: TrainState) -> None:
    saved = {"step": state.step, "params": state.params}
    if state.projections:
        saved["projections"] = state.projections
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        checkpoints.save(0, saved)


def _fit_layers(
    o: FitOptions,
    teacher: WorkdirModel,
    network: Network,
    state: TrainState,
    passages: np.ndarray,
    num_test: int,
    progress_bar: ProgressBar,
    remember: Remember,
) -> tuple[dict[int, "_Found"], list[dict[str, Any]], Moments]:
    """(what was found for each replaced layer's mechanism, a row for each, moments of every layer)."""
    spec, fitted = network.spec, {}
    keys = jax.random.split(key_of_seed(o.seed), spec.num_layers)
    exact = teacher.network.bind(teacher.params, teacher.projections)
    student = network.bind(state.params, state.projections)
    rows, moments = [], []
    with progress_bar(spec.num_layers, "layer") as bar:
        for index, tensors in enumerate(teacher_layers(exact, jnp.asarray(passages))):
            test = jax.tree.map(lambda leaf: leaf[:num_test], tensors)
            train = jax.tree.map(lambda leaf: leaf[num_test:], tensors)
            moments.append(Moments.of(train.q, train.k))
            if MIXERS[spec.layers[index].kind].role != "exact":
                attention: Any = student.layer(index).attention
                fit_it = functools.partial(
                    _fit_layer, o, attention.mechanism, train, test, moments[-1], index, keys[index]
                )
                found = unflatten_dict(remember(f"layer_{index}", fit_it), sep="/")
                fitted[index] = _Found(found.get("params", {}), found.get("projections", {}))
                errors_of = {name: values.tolist() for name, values in found["errors"].items()}
                rows.append({"layer": index, **errors_of, "seconds": float(found["seconds"])})
                bar.set_postfix(error=f"{np.mean(errors_of['after']):.3f}", refresh=False)
            bar.update()
    return fitted, rows, Moments.stack(moments)


def _fit_layer(
    o: FitOptions,
    module: Any,
    train: LayerTensors,
    test: LayerTensors,
    moments: Moments,
    layer: int,
    key: jax.Array,
) -> Arrays:
    """Arrays of one layer's mechanism, params/... and projections/..., its errors/... and the seconds it took."""
    started = time.perf_counter()
    mechanism = _started(o, module, train, moments, layer)
    trained = mechanism.trainable
    if trained and o.transfer_steps:
        count = min(max(1, _TOKENS_PER_STEP // o.context), len(train.q))
        rate = o.learning_rate or LEARNING_RATE * min(1.0, _WIDEST / module.spec.head_dim)
        trained = fit(mechanism, train, key, passages=count, steps=o.transfer_steps, learning_rate=rate)
    coordinates = nnx.to_pure_dict(nnx.filter_state(mechanism.fixed, Coordinates))
    found_errors = _errors(module.spec, mechanism, trained, test)
    found = {"params": nnx.to_pure_dict(trained), "projections": coordinates, "errors": found_errors}
    arrays = jax.tree.map(np.asarray, flatten_dict(found, sep="/"))
    return arrays | {"seconds": np.array(time.perf_counter() - started)}


def _started(o: FitOptions, module: Any, train: LayerTensors, moments: Moments, layer: int) -> FittedMechanism:
    """A layer's mechanism with the M and the gain that the fit starts from."""
    spec: MixerSpec = module.spec
    if o.geometry == "whitening":  # whitening keeps E|M x|^2; geometry_init scales it
        whitening = whitening_geometry(moments, scale=spec.scale, shrinkage=o.shrinkage, where=f"layer {layer}")
        module.M[...] = jnp.asarray(o.geometry_init * whitening, jnp.float32)
    if module.coordinates is not None:
        for name, value in balanced_maps(moments, f"layer {layer}")._asdict().items():
            getattr(module.coordinates, name)[...] = jnp.asarray(value, jnp.float32)
    if o.far_gain and o.mechanism in GEOMETRY_KINDS:  # the others' features estimate exp(q.k) itself
        few = jax.tree.map(lambda leaf: leaf[:_GAIN_PASSAGES], train)
        few = few._replace(**dict(zip("qk", module.in_coordinates(few.q, few.k), strict=True)))
        places = {"chunk_size": spec.chunk_size, "window": spec.window, "num_sinks": spec.num_sinks}
        places["far_horizon"] = spec.far_horizon
        module.log_gain[...] = matched_log_gain(few, module.M[...], scale=spec.scale, **places)
    return FittedMechanism.of(module)


def _errors(spec: MixerSpec, mechanism: FittedMechanism, trained: nnx.State, test: LayerTensors) -> dict[str, Any]:
    found = {"before": errors(mechanism, mechanism.trainable, test), "after": errors(mechanism, trained, test)}
    if spec.window:
        alone = FittedMechanism.of(WindowOnly(spec, 0))
        found["window_only"] = errors(alone, alone.trainable, test)
    return found


def _with_layers(state: TrainState, network: Network, fitted: dict[int, _Found]) -> TrainState:
    """`state` with what was found for these layers' mechanisms."""
    for index, found in fitted.items():
        place = divmod(index, len(network.spec.pattern))
        params, projections = (
            _with_layer(tree, *place, new) for tree, new in zip((state.params, state.projections), found, strict=True)
        )
        state = state._replace(params=params, projections=projections)
    return state


def _with_layer(tree: dict, row: int, place: int, new: dict) -> dict:
    """`tree` with `new` in one layer's mechanism."""
    stacked, changed = flatten_dict(tree), flatten_dict(new)
    for name, value in changed.items():
        path = (f"blocks_{place}", "attention", "mechanism", *name)
        stacked[path] = stacked[path].at[row].set(value)
    return unflatten_dict(stacked)
