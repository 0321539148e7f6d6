"""Puts feature attention in the place of a pretrained model's exact attention, and fits it to the model's own text.

    python -m darkformer_jax.calibrate --workdir=runs/smollm2 --text='books/*.txt' --out=runs/smollm2-dark
    python train.py --config=configs/finetune.py:dark --config.init_from=runs/smollm2-dark --workdir=runs/smollm2-tuned

Layer by layer, the geometry M (of `lfk`: the projections) learns to give what exact attention gives from the same q,
k and v (attention transfer); nothing else of the model changes. The new workdir serves generate, evaluate and
init_from like any other. What is seen exactly keeps the pretrained kernel (but no soft-cap). The relative error of
attention is reported, |out - exact| / |exact|, mean over heads: of the window alone, before and after, on passages
that are not trained on: a fifth, or those of --test_text. calibration.json in the new workdir has every head's,
moments.npz the first and second moments of every layer's q and k.

--far_gain lets each head scale what its features see. Of dark the gain starts where the far part has, about, the weight
that exact attention gives it, and stays there with --transfer_steps=0.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app
from flax import nnx

from darkformer_jax.calibration import REPORT_FILE
from darkformer_jax.calibration.geometry import whitening_geometry
from darkformer_jax.calibration.moments import Moments
from darkformer_jax.calibration.transfer import LayerTensors, Mechanism, errors, fit, matched_log_gain, teacher_layers
from darkformer_jax.cli.parser import Parser, one_line_errors
from darkformer_jax.cli.progress import progress_bar
from darkformer_jax.config.validation import validate
from darkformer_jax.data.files import whole_directory
from darkformer_jax.data.sources import open_corpus
from darkformer_jax.data.tokenizers import Tokenizer, encode_prompt
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from darkformer_jax.mixers.spec import MixerSpec
from darkformer_jax.mixers.window_only import WindowOnly
from darkformer_jax.runs.checkpoints import Checkpoints
from darkformer_jax.runs.inherit import inherit
from darkformer_jax.runs.load import WorkdirModel, load_language_model
from darkformer_jax.runs.origin import hand_on_origin
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.next_token import NextToken
from darkformer_jax.training.experiment import Experiment
from darkformer_jax.training.init_from import initialize_from
from darkformer_jax.training.step import TrainState

KINDS = ("dark", "lfk", "performer", "window_only")
GEOMETRIES = ("identity", "whitening")
MOMENTS_FILE = "moments.npz"

_HELDOUT_SHARE = 0.2
_TOKENS_A_STEP = 4096
_GAIN_PASSAGES = 4


def _parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("calibrate", __doc__)
    parser.add_argument("--workdir", required=True, help="of the exact model: an import, or a run with kind=softmax")
    parser.add_argument("--step", type=int, help="checkpoint to use (default: the newest)")
    parser.add_argument("--text", required=True, help="globs of .txt, .md, .jsonl files, or directories; see evaluate")
    parser.add_argument("--out", required=True, help="workdir to write; must be empty or not exist")
    parser.add_argument("--mechanism", default="dark", choices=KINDS, help="that takes the exact one's place")
    parser.add_argument("--test_text", default="", help="like --text; the errors are then of passages of this text")
    parser.add_argument("--transfer_steps", type=int, default=200, help="of each layer; 0 = fit nothing (default: 200)")
    parser.add_argument("--learning_rate", type=float, default=1e-2, help="of transfer (default: 1e-2)")
    parser.add_argument("--passages", type=int, default=20, help="of --context tokens that are read (default: 20)")
    parser.add_argument("--context", type=int, default=1024, help="tokens a passage (default: 1024)")
    parser.add_argument("--num_features", type=int, default=64, help="m, a head (default: 64)")
    parser.add_argument("--window", type=int, default=64, help="tokens before a query's chunk seen exactly; 0 = none")
    parser.add_argument("--num_sinks", type=int, help="first tokens seen exactly (default: 4, without a window 0)")
    parser.add_argument("--geometry", default="identity", choices=GEOMETRIES, help="what M starts as (dark)")
    parser.add_argument("--geometry_init", type=float, default=0.5, help="... times this (default: 0.5)")
    parser.add_argument("--shrinkage", type=float, default=0.0, help="of whitened moments towards isotropic, 0 to 1")
    parser.add_argument("--far_gain", action="store_true", help="learn a gain a head on what features see (see above)")
    parser.add_argument("--learn_projections", action="store_true", help="of dark: learn w beside M")
    parser.add_argument("--seed", type=int, default=0, help="of projections and passages (default: 0)")
    args = parser.parse_args(argv[1:])
    if args.num_sinks is None:
        args.num_sinks = 4 if args.window else 0
    return args


def main(args: argparse.Namespace) -> None:
    """Writes the workdir and prints the errors; on a UserError one line and exit status 2."""
    with one_line_errors("what was written is removed"):
        calibrate(args)


def calibrate(args: argparse.Namespace) -> dict[str, Any]:
    """Fits every layer, writes --out, and returns what its calibration.json holds."""
    _check_flags(args)
    with whole_directory(args.out) as directory:
        teacher = load_language_model(Workdir(args.workdir), args.step)
        _require_exact(args.workdir, teacher)
        config = _config(args)
        tokens, num_test = _passages(args, teacher.tokenizer)
        experiment = Experiment.of(config, NextToken.of(config, teacher.tokenizer.vocab_size))
        params, projections = jax.jit(experiment.network.init)(jax.random.key(args.seed))
        state = TrainState(jnp.zeros((), jnp.int32), params, projections, ())
        state, _ = initialize_from(Workdir(args.workdir), experiment, state, teacher.step)
        params, layers, moments = _fit_layers(args, teacher, experiment, state, tokens, num_test)
        report = {name: value for name, value in vars(args).items() if name != "out"} | {"layers": layers}
        fitted = Workdir(directory)
        fitted.write_config(config.to_dict())
        teacher.tokenizer.save(str(directory))
        hand_on_origin(Workdir(args.workdir), fitted)
        with contextlib.closing(Checkpoints(fitted)) as checkpoints:
            saved = {"step": state.step, "params": params, "projections": state.projections}
            checkpoints.save(0, {name: tree for name, tree in saved.items() if not isinstance(tree, dict) or tree})
        moments.save(directory / MOMENTS_FILE)
        (directory / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n")
    print(_summary(args.out, layers))
    return report


def _passages(args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """All passages, and how many in front are for the errors alone."""
    num_test = max(1, round(_HELDOUT_SHARE * args.passages))
    passages = read_passages(args.text, tokenizer, args.passages, args.context, args.seed)
    if not args.test_text:
        return passages, num_test
    test = read_passages(args.test_text, tokenizer, num_test, args.context, args.seed)
    if {row.tobytes() for row in test} & {row.tobytes() for row in passages}:
        raise UserError(f"--test_text={args.test_text}: has passages of --text={args.text}; allowed: other text")
    return np.concatenate([test, passages]), num_test


def read_passages(text: str, tokenizer: Tokenizer, count: int, context: int, seed: int) -> np.ndarray:
    """[count, context] ids: stretches of different places of the documents, each as a document's beginning.

    Raises UserError where the text has fewer.
    """
    begin = [tokenizer.bos_id] if tokenizer.adds_bos else []
    size = context - len(begin)
    passages = []
    for document in open_corpus("text", text).documents(lambda _: None):
        ids = encode_prompt(tokenizer, document.text)[len(begin) :]
        passages += [begin + ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
    if len(passages) < count:
        raise UserError(
            f"{text}: {len(passages)} passages of --context={context} tokens; {count} are needed (--passages)"
        )
    chosen = np.random.default_rng(seed).choice(len(passages), count, replace=False)
    return np.array([passages[i] for i in chosen], np.int32)


def _fit_layers(
    args: argparse.Namespace,
    teacher: WorkdirModel,
    experiment: Experiment,
    state: TrainState,
    tokens: np.ndarray,
    num_test: int,
) -> tuple[dict, list[dict[str, Any]], Moments]:
    """(parameters with what was fitted, errors of every layer that was replaced, moments of every layer)."""
    params = state.params
    spec = experiment.network.spec
    keys = jax.random.split(jax.random.key(args.seed), spec.num_layers)
    rows, moments = [], []
    teaching = teacher_layers(teacher.network.bind(teacher.params, teacher.projections), jnp.asarray(tokens))
    student = experiment.network.bind(params, state.projections)
    with progress_bar(spec.num_layers, "layer") as bar:
        for index, (mixer, tensors) in enumerate(zip(spec.layers, teaching, strict=True)):
            test, train = (
                jax.tree.map(lambda leaf, part=part: leaf[part], tensors)
                for part in (slice(0, num_test), slice(num_test, None))
            )
            moments.append(Moments.of(train.q, train.k))
            if MIXERS[mixer.kind].role != "exact":
                started = time.perf_counter()
                attention: Any = student.layer(index).attention
                module = attention.mechanism
                if args.geometry == "whitening":
                    module.M[...] = _whitening(args, moments[-1], mixer, index)
                if args.far_gain and args.mechanism == "dark":  # the others' features estimate exp(q.k) itself
                    module.log_gain[...] = _matched_log_gain(train, module.M[...], mixer)
                mechanism = Mechanism.of(module)
                trained = mechanism.trained
                if args.transfer_steps and trained:
                    options = {"steps": args.transfer_steps, "learning_rate": args.learning_rate}
                    passages = min(max(1, _TOKENS_A_STEP // args.context), len(train.q))
                    trained = fit(mechanism, train, keys[index], passages=passages, **options)
                if trained:
                    params = _with_layer(params, index, len(spec.pattern), nnx.to_pure_dict(trained))
                rows.append(_errors(args, index, mechanism, trained, test, mixer))
                rows[-1]["seconds"] = time.perf_counter() - started
                bar.set_postfix(error=f"{np.mean(rows[-1]['after']):.3f}", refresh=False)
            bar.update()
    return params, rows, Moments.stack(moments)


def _whitening(args: argparse.Namespace, moments: Moments, spec: MixerSpec, layer: int) -> jax.Array:
    """M [Hkv, d, d] to start from: geometry_init times the whitening that keeps E|M x|^2."""
    scale = spec.scale
    options = {"policy": "temperature", "shrinkage": args.shrinkage, "where": f"layer {layer}"}
    return jnp.asarray(args.geometry_init * whitening_geometry(moments, scale=scale, **options), jnp.float32)


def _matched_log_gain(train: LayerTensors, geometry: jax.Array, spec: MixerSpec) -> jax.Array:
    few = jax.tree.map(lambda leaf: leaf[:_GAIN_PASSAGES], train)
    near = {"chunk_size": spec.chunk_size, "window": spec.window, "num_sinks": spec.num_sinks}
    return matched_log_gain(few, geometry, scale=spec.scale, **near)


def _errors(
    args: argparse.Namespace, index: int, mechanism: Mechanism, trained: Any, test: LayerTensors, spec: Any
) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": index}
    if args.window:
        alone = Mechanism.of(WindowOnly(spec, index))
        row["window_only"] = errors(alone, alone.trained, test).tolist()
    row["before"] = errors(mechanism, mechanism.trained, test).tolist()
    row["after"] = errors(mechanism, trained, test).tolist()
    return row


def _with_layer(params: dict, index: int, num_stacks: int, trained: dict) -> dict:
    """`params` with one layer's mechanism replaced."""
    row, place = divmod(index, num_stacks)
    block = params[f"blocks_{place}"]
    own = block["attention"]["mechanism"]
    new = own | {name: own[name].at[row].set(value) for name, value in trained.items()}
    return params | {f"blocks_{place}": block | {"attention": block["attention"] | {"mechanism": new}}}


def _config(args: argparse.Namespace) -> ml_collections.ConfigDict:
    try:
        from configs import finetune
    except ImportError as error:
        raise UserError("configs/finetune.py is not there; start the command in a clone of the repository") from error
    config = finetune.get_config(args.mechanism)
    attention = config.model.attention
    attention.num_features, attention.window, attention.num_sinks = args.num_features, args.window, args.num_sinks
    attention.window_kernel = "softmax" if args.window else "dark"
    attention.geometry_init = args.geometry_init
    attention.far_gain, attention.learn_projections = args.far_gain, args.learn_projections
    config.init_from, config.sequence_length, config.seed = args.workdir, args.context, args.seed
    config = inherit(config)
    validate(config)
    return config


def _require_exact(workdir: str, teacher: WorkdirModel) -> None:
    exact = [kind for kind, mixer in MIXERS.items() if mixer.role == "exact"]
    others = sorted(set(teacher.network.spec.layer_kinds) - set(exact))
    if others:
        raise UserError(f"--workdir={workdir}: its layers are {', '.join(others)}; allowed: {', '.join(exact)}")


def _check_flags(args: argparse.Namespace) -> None:
    for name, smallest in (("transfer_steps", 0), ("passages", 2), ("context", 2), ("num_features", 1), ("seed", 0)):
        value = getattr(args, name)
        if not smallest <= value < 2**31:
            raise UserError(f"--{name}={value}: must be from {smallest} to {2**31 - 1}")
    if args.geometry == "whitening" and args.mechanism != "dark":
        raise UserError(f"--geometry=whitening: {args.mechanism} has no M; allowed: --mechanism=dark")
    if not 0 <= args.shrinkage <= 1:
        raise UserError(f"--shrinkage={args.shrinkage}: must be from 0 to 1")
    if args.shrinkage and args.geometry != "whitening":
        raise UserError(f"--shrinkage={args.shrinkage}: allowed: 0, or --geometry=whitening")
    if not 0 < args.learning_rate < 1:
        raise UserError(f"--learning_rate={args.learning_rate}: must be between 0 and 1")


def _summary(out: str, layers: Sequence[dict[str, Any]]) -> str:
    names = [name for name in ("window_only", "before", "after") if layers and name in layers[0]]
    means = {name: np.mean([row[name] for row in layers]) for name in names}
    shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in means.items())
    return f"{out}: relative error of attention over {len(layers)} layers: {shown}"


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
