"""Replaces a pretrained model's exact attention with feature attention, and fits that to text.

    python -m darkformer_jax.calibrate --workdir=runs/smollm2 --text='books/*.txt' --out=runs/smollm2-dark
    python train.py --config=configs/finetune.py:dark --config.init_from=runs/smollm2-dark --workdir=runs/smollm2-tuned

Layer by layer, the geometry M (for `lfk`: the projections) learns to give the output of exact attention from the same
q, k and v (attention transfer). Nothing else in the model changes. generate, evaluate and init_from read the new
workdir like any other. Keys that are seen exactly keep the pretrained kernel, without its soft-cap.

The verb prints the relative error of attention, |out - exact| / |exact|, averaged over heads: with the window alone,
before the fit and after it. It is measured on passages that are not trained on: a fifth of them, or those of
--test_text. In the new workdir, calibration.json has the errors of every head, and moments.npz has the first and second
moments of every layer's q and k.

A few layers hold most of what the model loses. They can stay exact, with a cache that grows: --exact_layers=3,17 names
them. --exact_layers=auto:4 chooses them once all layers are fitted: it measures what replacing each one alone costs in
loss, and in copying a passage that is repeated. --exact_layers=auto --cache_budget=64MB@32768 (or 20%@32768, a share of
the exact model's caches) chooses as many as the bytes hold at 32,768 tokens, beside the states of the other layers. The
verb then prints quality against cache for 0, 2, 4, ... exact layers, measured on the passages that are not trained on,
and draws exact_layers.png. Local layers (softmax_local) stay as they are and do not count. configs/finetune.py:keep
trains what was chosen.

--exact_heads=auto:18 leaves single key/value heads exact instead, with their queries; so does --exact_heads=auto with
--cache_budget. Heads of a layer differ more than layers do: for the same cache they keep more, above all copying. Each
head's gain is a gradient: of the loss, and of a quarter of what copying costs, with respect to the share of exact
attention in that head. Every layer's heads are put in another order, the exact ones first, which changes no output.
calibration.json and moments.npz have the heads in that order; the chosen ones are named by the order before.
--exact_heads=5:2,20:1+2 names them, for example to fit M anew around heads that were chosen before.

--geometry=balanced first maps q and k to coordinates in which both vary equally. Exact attention is the same in them,
and random features vary less. Models with norms of q and k (Gemma 3, Qwen 3) may have keys that are many times as large
as their queries: their features see nothing otherwise, and the verb names the layers. Use it with --far_gain.

--far_gain lets each head scale the far part, which its features see. For dark, the gain starts where the far part has
about the weight that exact attention gives it. With --transfer_steps=0 it stays there.

--far_horizon=256 bounds what features weigh in long texts: beyond 256 tokens their total weight stops growing, as that
of the far part of exact attention mostly does. Use it for models that will read more than --context tokens.

At the end the verb prints the loss of the exact model, of the new one, and of the new one without its features.

A command that was killed or interrupted goes on if it is given again: until --out is there, a hidden directory beside
it (.NAME.HASH.begun) keeps each layer that was fitted and each model that was measured.
"""

import argparse
from collections.abc import Sequence

from absl import app

from darkformer_jax.calibration import GEOMETRIES
from darkformer_jax.calibration.fitting import (
    BALANCED_KINDS,
    GEOMETRY_KINDS,
    KINDS,
    LEARNING_RATE,
    FitOptions,
    calibrate,
)
from darkformer_jax.calibration.head_choice import parse_wishes
from darkformer_jax.calibration.summary import summary
from darkformer_jax.cli.huge_pages import start_with_huge_pages
from darkformer_jax.cli.output import lost_output_is_no_crash
from darkformer_jax.cli.parser import Parser, one_line_errors, whole
from darkformer_jax.cli.progress import progress_bar
from darkformer_jax.config.conversion import conversion_config, without_window
from darkformer_jax.data.text_files import TEXT_FIELD
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS

_MECHANISM_OPTIONS = ("num_features", "window", "num_sinks", "geometry_init")


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; a mistake is one line and exit status 2."""
    parser = Parser("calibrate", __doc__)
    defaults = conversion_config("dark").model.attention  # dark uses all of _MECHANISM_OPTIONS
    parser.add_argument("--workdir", required=True, help="the exact model: an import, or a run with kind=softmax")
    parser.add_argument("--step", type=whole, help="checkpoint to use (default: the newest)")
    parser.add_argument(
        "--text", required=True, help="globs of .txt, .md, .jsonl, .parquet files, or directories; see evaluate"
    )
    parser.add_argument("--out", required=True, help="workdir to write; must be empty or not exist")
    parser.add_argument("--mechanism", default="dark", choices=KINDS, help="what replaces exact attention")
    parser.add_argument("--test_text", default="", help="like --text; errors are then measured on this text")
    field_help = f"field or column of .jsonl and .parquet that holds the text (default: {TEXT_FIELD})"
    parser.add_argument("--text_field", default=TEXT_FIELD, help=field_help)
    parser.add_argument("--transfer_steps", type=whole, default=200, help="per layer; 0 = fit nothing (default: 200)")
    rate_help = f"that of the transfer (default: {LEARNING_RATE:g}; less for heads wider than 64)"
    parser.add_argument("--learning_rate", type=float, help=rate_help)
    parser.add_argument("--passages", type=whole, default=20, help="passages of --context tokens to read (default: 20)")
    parser.add_argument("--context", type=whole, default=1024, help="tokens per passage (default: 1024)")
    parser.add_argument("--num_features", type=whole, help=f"m, features per head (default: {defaults.num_features})")
    window_help = f"tokens before a query's chunk seen exactly; 0 = none (default: {defaults.window})"
    parser.add_argument("--window", type=whole, help=window_help)
    sinks_help = f"first tokens seen exactly (default: {defaults.num_sinks}, without a window 0)"
    parser.add_argument("--num_sinks", type=whole, help=sinks_help)
    parser.add_argument("--geometry", default="identity", choices=GEOMETRIES, help="what M starts from (dark)")
    init_help = f"factor on that start (default: {defaults.geometry_init})"
    parser.add_argument("--geometry_init", type=float, help=init_help)
    parser.add_argument("--shrinkage", type=float, default=0.0, help="pulls whitened moments towards isotropic, 0 to 1")
    parser.add_argument("--far_gain", action="store_true", help="learn a gain per head on the far part")
    horizon_help = "tokens after which the features' total weight stops growing with the text; 0 = never (default: 0)"
    parser.add_argument("--far_horizon", type=whole, default=0, help=horizon_help)
    parser.add_argument("--learn_projections", action="store_true", help="dark: learn w, too")
    exact_help = "layers to leave exact: none, numbers such as 3,17, or auto:N, the N that matter most (default: none)"
    parser.add_argument("--exact_layers", default="none", help=exact_help)
    budget_help = "with either auto: bytes, or a share, of all layers' caches @ tokens: 64MB@32768, 20%%@32768"
    parser.add_argument("--cache_budget", default="", help=budget_help)
    heads_help = "key/value heads to leave exact: none, auto:N, auto, or by layer such as 5:2,20:1+2 (default: none)"
    parser.add_argument("--exact_heads", default="none", help=heads_help)
    parser.add_argument("--seed", type=whole, default=0, help="seed of projections and passages (default: 0)")
    return parser.parse_args(argv[1:])


def main(args: argparse.Namespace) -> None:
    """Writes the workdir and prints the errors. A UserError becomes one line and exit status 2."""
    with one_line_errors("the same command goes on from what was found"):
        complete_flags(args)
        _check_flags(args)
        options = FitOptions(**{name: value for name, value in vars(args).items() if name != "out"})
        print(summary(options, args.out, calibrate(options, args.out, progress_bar)))


def complete_flags(args: argparse.Namespace) -> None:
    """Gives the mechanism's options the defaults of a conversion. Raises UserError for one that it does not use."""
    config = conversion_config(args.mechanism)
    attention = config.model.attention
    if args.window is not None:
        attention.window = args.window
    without_window(config)
    for name in _MECHANISM_OPTIONS:
        value = getattr(args, name)
        if value is None:
            setattr(args, name, attention[name])
        elif name not in MIXERS[args.mechanism].uses:
            raise UserError(f"--{name}={value}: {args.mechanism} does not use it")


def _check_flags(args: argparse.Namespace) -> None:
    parse_wishes(args.exact_layers, args.exact_heads, args.cache_budget)
    for name, smallest in (("transfer_steps", 0), ("passages", 2), ("context", 2), ("num_features", 1), ("seed", 0)):
        value = getattr(args, name)
        if not smallest <= value < 2**31:
            raise UserError(f"--{name}={value}: must be from {smallest} to {2**31 - 1}")
    if args.geometry == "whitening" and args.mechanism not in GEOMETRY_KINDS:
        kinds = ", ".join(GEOMETRY_KINDS)
        raise UserError(f"--geometry=whitening: {args.mechanism} has no M; allowed: --mechanism={kinds}")
    if args.geometry == "balanced" and args.mechanism not in BALANCED_KINDS:
        kinds = ", ".join(BALANCED_KINDS)
        raise UserError(f"--geometry=balanced: {args.mechanism} has no coordinates; allowed: --mechanism={kinds}")
    if not 0 <= args.shrinkage <= 1:
        raise UserError(f"--shrinkage={args.shrinkage}: must be from 0 to 1")
    if args.shrinkage and args.geometry != "whitening":
        raise UserError(f"--shrinkage={args.shrinkage}: allowed: 0, or --geometry=whitening")
    if args.learning_rate is not None and not 0 < args.learning_rate < 1:
        raise UserError(f"--learning_rate={args.learning_rate}: must be between 0 and 1")
    if args.learning_rate is not None and not args.transfer_steps:
        raise UserError(f"--learning_rate={args.learning_rate}: nothing is learned with --transfer_steps=0")


if __name__ == "__main__":
    with lost_output_is_no_crash():
        start_with_huge_pages()
        app.run(main, flags_parser=parse_flags)
