"""The paper's comparison in fine-tuning: every mechanism continues the same exactly pretrained weights.

    python -m benchmarks.paper --out=runs/paper --seeds=3
    python -m benchmarks.paper --out=runs/stability --variants='performer;dark' --learning_rates=1e-4,1e-3,1e-2
    python -m benchmarks.paper --out=runs/budget --variants='performer;dark' --num_features=16,64,256
    python -m darkformer_jax.report --runs='runs/paper/*-s*' --out=docs/results/paper

Trains the exact model of configs/paper.py:pretrain once (<out>/pretrained), then continues it with every variant,
learning rate, m and seed, each in a workdir of its own. What --out holds is not repeated; a run
that was cut short goes on. A run that diverges is a result; the others go on. From scratch: benchmarks/learning.py.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tqdm

ROOT = Path(__file__).parents[1]
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


def plan(args: argparse.Namespace) -> dict[str, list[str]]:
    """Name of a workdir -> the flags of train.py that fill it."""
    runs = {}
    for variant, rate, features, seed in itertools.product(
        args.variants, args.learning_rates, args.num_features, range(args.seeds)
    ):
        name, arguments = variant.replace(", ", "-").replace(" ", "-"), VARIANTS[variant]
        if variant not in WITHOUT_FEATURES:
            name, arguments = f"{name}-m{features}", f"{arguments},m={features}"
        arguments += f",lr={rate:g},geometry_lr={rate * args.geometry_ratio:g},seed={seed},steps={args.steps}"
        flags = [f"--config=configs/paper.py:{arguments}", f"--config.init_from={args.out / PRETRAINED}"]
        runs[f"{name}-lr{rate:g}-s{seed}"] = flags
    return runs


def is_done(workdir: Path) -> bool:
    """Whether the run got to its last step, whose weights were measured and saved."""
    try:
        num_steps = json.loads((workdir / "config.json").read_text())["num_steps"]
        last = (workdir / "metrics.jsonl").read_text().splitlines()[-1]
    except (FileNotFoundError, IndexError):
        return False
    row = json.loads(last)
    return row["step"] == num_steps and "heldout_loss" in row and (workdir / "checkpoints" / str(num_steps)).is_dir()


def train(workdir: Path, flags: Sequence[str]) -> bool:
    """Runs train.py, its output in <workdir>.log; whether it got to its end."""
    command = [sys.executable, str(ROOT / "train.py"), f"--workdir={workdir}", *flags]
    with workdir.with_name(f"{workdir.name}.log").open("w") as log:
        return subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode == 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    def numbers(kind: type) -> Any:
        return lambda text: [kind(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=lambda text: Path(text).absolute(), required=True, help="directory of all workdirs"
    )
    parser.add_argument("--variants", default=";".join(VARIANTS), help="separated by a semicolon (default: all)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 .. n-1 of each run (default: 1)")
    parser.add_argument("--steps", type=int, default=150, help="of fine-tuning (default: 150)")
    parser.add_argument("--pretrain_steps", type=int, default=750, help="of the exact model (default: 750)")
    parser.add_argument("--learning_rates", type=numbers(float), default=[1e-3], help="peaks (default: 1e-3)")
    parser.add_argument("--geometry_ratio", type=float, default=3.0, help="learning rate of M over it (default: 3)")
    parser.add_argument("--num_features", type=numbers(int), default=[64], help="m, a head (default: 64)")
    args = parser.parse_args(argv)
    args.variants = [name.strip() for name in args.variants.split(";")]
    if unknown := set(args.variants) - VARIANTS.keys():
        parser.error(f"--variants: {min(unknown)!r} is unknown; allowed: {'; '.join(VARIANTS)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing; ends with status 1 where a run did not get to its end, naming it."""
    args = _arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    exact = args.out / PRETRAINED
    if not is_done(exact) and not train(exact, [f"--config=configs/paper.py:pretrain,steps={args.pretrain_steps}"]):
        raise SystemExit(f"{exact}: pretraining failed; see {exact}.log")
    runs = {args.out / name: flags for name, flags in plan(args).items()}
    missing = [workdir for workdir in runs if not is_done(workdir)]
    failed = []
    with tqdm.tqdm(missing, unit="run") as bar:
        for workdir in bar:
            bar.set_description(workdir.name)
            if not train(workdir, runs[workdir]):
                failed.append(workdir.name)
    if failed:
        raise SystemExit(f"did not get to their end (diverged?), see their .log: {', '.join(failed)}")


if __name__ == "__main__":
    main()
