"""The paper's comparison in fine-tuning: every mechanism continues the same exactly pretrained weights.

    python -m benchmarks.paper --out=runs/paper --seeds=3
    python -m benchmarks.paper --out=runs/stability --variants='performer;dark' --learning_rates=1e-4,1e-3,1e-2
    python -m benchmarks.paper --out=runs/budget --variants='performer;dark' --num_features=16,64,256
    python -m darkformer_jax.report --runs='runs/paper/*-s*' --out=docs/results/paper

Trains the exact model of configs/paper.py:pretrain once (<out>/pretrained), then continues it with every variant,
learning rate, m and seed, each in a workdir of its own. Runs that --out holds are not repeated; a run that was cut
short goes on. A run that diverges is a result, and the others go on. For runs from scratch, see benchmarks/learning.py.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.grid import complete, is_done, train
from configs.paper import get_config
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS

CONFIG = "configs/paper.py"
PRETRAINED = "pretrained"
VARIANTS = {
    "softmax": "softmax",
    "performer": "performer",
    "dark": "dark",
    "lfk": "lfk",
    "random": "random",
    "constant": "constant",
    "window only": "window_only,window=32",
    "performer, window": "performer,window=32",
    "dark, window": "dark,window=32",
    "lfk, window": "lfk,window=32",
}
WITHOUT_FEATURES = ("softmax", "constant", "window only")


def plan(args: argparse.Namespace) -> dict[str, str]:
    """Name of a workdir -> the arguments of configs/paper.py that fill it."""
    runs = {}
    for variant, rate, features, seed in itertools.product(
        args.variants, args.learning_rates, args.num_features, range(args.seeds)
    ):
        name, arguments = variant.replace(", ", "-").replace(" ", "-"), VARIANTS[variant]
        if variant not in WITHOUT_FEATURES:
            name, arguments = f"{name}-m{features}", f"{arguments},m={features}"
        arguments += f",lr={rate:g},seed={seed},steps={args.steps}"
        if "geometry_learning_rate" in MIXERS[arguments.partition(",")[0]].uses:
            arguments += f",geometry_lr={rate * args.geometry_ratio:g}"
        runs[f"{name}-lr{rate:g}-s{seed}"] = arguments
    return runs


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    def numbers(kind: type) -> Any:
        return lambda text: [kind(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=lambda text: Path(text).absolute(), required=True, help="directory of all workdirs"
    )
    parser.add_argument("--variants", default=";".join(VARIANTS), help="separated by a semicolon (default: all)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 .. n-1 of each run (default: 1)")
    parser.add_argument("--steps", type=int, default=150, help="steps of fine-tuning (default: 150)")
    parser.add_argument("--pretrain_steps", type=int, default=750, help="steps of the exact model (default: 750)")
    parser.add_argument("--learning_rates", type=numbers(float), default=[1e-3], help="peaks (default: 1e-3)")
    parser.add_argument(
        "--geometry_ratio", type=float, default=3.0, help="learning rate of M over the rest's (default: 3)"
    )
    parser.add_argument("--num_features", type=numbers(int), default=[64], help="m, features per head (default: 64)")
    args = parser.parse_args(argv)
    args.variants = [name.strip() for name in args.variants.split(";")]
    if unknown := set(args.variants) - VARIANTS.keys():
        parser.error(f"--variants: {min(unknown)!r} is unknown; allowed: {'; '.join(VARIANTS)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing. Ends with status 1, and names the runs, if some did not reach their end."""
    args = _arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    exact = args.out / PRETRAINED
    pretraining = f"pretrain,steps={args.pretrain_steps}"
    runs = {args.out / name: arguments for name, arguments in plan(args).items()}
    try:
        begun = is_done(exact, get_config(pretraining))
        missing = [workdir for workdir, arguments in runs.items() if not is_done(workdir, get_config(arguments))]
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    if not begun and not train(exact, f"{CONFIG}:{pretraining}"):
        raise SystemExit(f"{exact}: pretraining failed; see {exact}.log")
    complete(missing, lambda workdir: train(workdir, f"{CONFIG}:{runs[workdir]}", f"--config.init_from={exact}"))


if __name__ == "__main__":
    main()
