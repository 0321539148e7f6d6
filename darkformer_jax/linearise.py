"""Makes a pretrained exact model linear in stages, and keeps what it can do.

    python -m darkformer_jax.linearise --workdir=runs/smollm2 --text='books/*.txt' --out=runs/smollm2-dark
    python -m darkformer_jax.linearise ... --stages=transfer,hidden --steps=transfer=100,hidden=400

The stages, each a run of its own in --out, which starts from the one before:

  1-transfer  each layer's features learn the output of exact attention, from the exact model's inputs (see calibrate)
  2-hidden    each layer learns to give what the exact model's layer gives, from the inputs that it gets in this model
  3-logits    the model learns to predict what the exact model predicts
  4-long      the same, in longer contexts

The last stage's directory is the model: generate, evaluate, finetune and convert read it like any other. Low-rank
updates of q, k, v and out are trained, and the geometry M. configs/linearise.py has the same stages for train.py, which
can train on several machines.

It prints a plan first, and refuses what does not fit before anything begins. After each stage it measures bits per
byte and copying on text that no stage has seen: 5% of --text, or --test_text. A command that was interrupted goes on
where it was if it is given again. --stages may then name more stages.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from absl import app

from darkformer_jax.calibration import GEOMETRIES
from darkformer_jax.cli.huge_pages import start_with_huge_pages
from darkformer_jax.cli.output import lost_output_is_no_crash
from darkformer_jax.cli.parser import Parser, one_line_errors, whole
from darkformer_jax.cli.progress import Progress, progress_bar
from darkformer_jax.config.base import DTYPES
from darkformer_jax.config.conversion import conversion_config
from darkformer_jax.config.linearisation import TRAINED_STAGES, stage_config
from darkformer_jax.data.text_files import TEXT_FIELD
from darkformer_jax.errors import UserError
from darkformer_jax.linearisation.settings import LONG, STAGES, TRANSFER, Settings

_STEPS = {TRANSFER: 200} | {stage: stage_config(stage).num_steps for stage in TRAINED_STAGES}


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; a mistake is one line and exit status 2."""
    parser = Parser("linearise", __doc__)
    attention, hidden, long = conversion_config("dark").model.attention, stage_config("hidden"), stage_config(LONG)
    steps = ",".join(f"{stage}={number}" for stage, number in _STEPS.items())
    parser.add_argument("--workdir", required=True, help="the exact model: an import, or a run with kind=softmax")
    parser.add_argument(
        "--text", required=True, help="globs of .txt, .md, .jsonl, .parquet files, or directories; see evaluate"
    )
    parser.add_argument("--out", required=True, help="directory of the stages: new, empty, or that of this command")
    parser.add_argument("--test_text", default="", help="like --text; figures are then measured on this text")
    field_help = f"field or column of .jsonl and .parquet that holds the text (default: {TEXT_FIELD})"
    parser.add_argument("--text_field", default=TEXT_FIELD, help=field_help)
    parser.add_argument("--stages", default=",".join(STAGES), help=f"which to run (default: {','.join(STAGES)})")
    parser.add_argument("--steps", default="", help=f"of stages, those of transfer per layer (default: {steps})")
    length = hidden.sequence_length
    parser.add_argument("--context", type=whole, default=length, help=f"tokens per row (default: {length})")
    long_help = f"tokens per row of the stage long (default: {long.sequence_length})"
    parser.add_argument("--long_context", type=whole, default=long.sequence_length, help=long_help)
    batch_help = f"rows per step; in the stage long as many tokens (default: {hidden.batch_size})"
    parser.add_argument("--batch_size", type=whole, default=hidden.batch_size, help=batch_help)
    parser.add_argument("--passages", type=whole, default=20, help="of --context tokens, for transfer (default: 20)")
    features = attention.num_features
    parser.add_argument(
        "--num_features", type=whole, default=features, help=f"m, features per head (default: {features})"
    )
    window_help = f"tokens before a query's chunk seen exactly; 0 = none (default: {attention.window})"
    parser.add_argument("--window", type=whole, default=attention.window, help=window_help)
    parser.add_argument("--geometry", default="identity", choices=GEOMETRIES, help="what M starts from; see calibrate")
    init_help = f"factor on that start (default: {attention.geometry_init})"
    parser.add_argument("--geometry_init", type=float, default=attention.geometry_init, help=init_help)
    parser.add_argument("--far_horizon", type=whole, default=0, help="see calibrate (default: 0)")
    parser.add_argument("--far_gain", action="store_true", help="learn a gain per head on the far part")
    exact_help = "layers to leave exact: none, 3,17, or auto:4, chosen by transfer; see calibrate (default: none)"
    parser.add_argument("--exact_layers", default="none", help=exact_help)
    heads_help = "key/value heads to leave exact: none, or auto:16, chosen by transfer; see calibrate (default: none)"
    parser.add_argument("--exact_heads", default="none", help=heads_help)
    budget_help = "with --exact_layers=auto or --exact_heads=auto: 64MB@32768 or 20%%@32768, see calibrate"
    parser.add_argument("--cache_budget", default="", help=budget_help)
    rank = hidden.model.lora_rank
    parser.add_argument("--lora", type=whole, default=rank, help=f"rank of the low-rank updates (default: {rank})")
    parser.add_argument("--dtype", default=DTYPES[0], choices=DTYPES, help="of activations (default: bfloat16)")
    tokens_help = "held-out tokens to measure on, from the first document on (default: 16384)"
    parser.add_argument("--test_tokens", type=whole, default=16384, help=tokens_help)
    parser.add_argument("--seed", type=whole, default=0, help="of projections, passages, updates and data (default: 0)")
    return parser.parse_args(argv[1:])


def main(args: argparse.Namespace) -> None:
    """Runs the stages. A UserError becomes one line and exit status 2, a signal 128 + its number."""
    from darkformer_jax.linearisation.run import linearise  # in here for a quick --help
    from darkformer_jax.training.stopping import Stopped

    with one_line_errors("the same command goes on"):
        try:
            linearise(settings_of(args), args.out, note=print, progress_of=_progress, progress_bar=progress_bar)
        except Stopped as stop:
            print(stop, file=sys.stderr)
            sys.exit(stop.exit_status)


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the flags stand for. Raises UserError for values that are not allowed."""
    smallest = {"context": 16, "long_context": 16, "batch_size": 1, "passages": 2, "num_features": 1, "window": 0}
    for name, least in (smallest | {"lora": 1, "test_tokens": 1, "seed": 0}).items():
        value = getattr(args, name)
        if not least <= value < 2**31:
            raise UserError(f"--{name}={value}: must be from {least} to {2**31 - 1}")
    stages = _stages(args.stages)
    if LONG in stages and args.long_context <= args.context:
        raise UserError(f"--long_context={args.long_context}: must be above --context={args.context}")
    if not args.out:
        raise UserError("--out=: give the name of a directory")
    values: dict[str, Any] = {name: value for name, value in vars(args).items() if name != "out"}
    return Settings(**values | {"stages": stages, "steps": _steps(args.steps, stages)})


def _stages(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in STAGES]
    if unknown or names != tuple(stage for stage in STAGES if stage in names) or names[0] != TRANSFER:
        raise UserError(
            f"--stages={text}: allowed: {','.join(STAGES)}, or some of them in this order from {TRANSFER} on"
        )
    return names


def _steps(text: str, stages: Sequence[str]) -> dict[str, int]:
    steps = dict(_STEPS)
    given: set[str] = set()
    for entry in text.split(",") if text else ():
        stage, equals, number = entry.partition("=")
        if not equals or stage not in STAGES or stage in given:
            raise UserError(f"--steps={text}: {entry!r}: allowed: each stage once, {TRANSFER}=100,hidden=400")
        if stage not in stages:
            raise UserError(f"--steps={text}: {stage} is not in --stages={','.join(stages)}")
        try:
            steps[stage] = whole(number)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--steps={text}: {error}") from error
        if not (0 if stage == TRANSFER else 1) <= steps[stage] < 2**31:
            raise UserError(f"--steps={text}: {entry!r}: must be at least {0 if stage == TRANSFER else 1}")
        given.add(stage)
    return steps


def _progress(config: Any) -> Progress:
    return Progress(config.num_steps, config.log.every)


if __name__ == "__main__":
    with lost_output_is_no_crash():
        start_with_huge_pages()
        app.run(main, flags_parser=parse_flags)
