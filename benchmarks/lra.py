"""Mechanisms as causal classifiers on ListOps and images, from scratch and after self-pretraining.

    python -m darkformer_jax.prepare_data --source=listops --scale=small --out=data/listops
    python -m benchmarks.lra --out=runs/lra --tasks=listops --seeds=3
    python -m darkformer_jax.report --runs='runs/lra/listops-*-s?' --out=docs/results/listops

For each task and mechanism, configs/lra.py trains <task>-<mechanism>-pretrained, a language model of the training
texts, with seed 0; and for each seed two classifiers with the same steps: -scratch-s<seed>, and -tuned-s<seed>, which
begins with the language model's weights. So the spread over seeds of the tuned ones has no part of the pretraining's.
`evaluate` then scores the test split once, at the newest checkpoint, into test.json of the workdir. Runs that --out
holds are not repeated; a run that was cut short goes on. Seeds come first, so that what is there after an hour compares
all mechanisms.
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.grid import complete, is_done, run_logged, train
from configs.lra import TASKS, get_config
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS

ATTENTIONS = ("softmax", "dark", "performer", "linear_transformer", "mamba2", "constant")
CONFIG = "configs/lra.py"


class Run(NamedTuple):
    """One run of the grid.

    Attributes:
      arguments: of configs/lra.py.
      after: the workdir whose weights it begins with, which must be done; or None.
      test: the file that `evaluate` scores, or None for a language model.
    """

    arguments: str
    test: str | None
    after: str | None = None


def plan(args: argparse.Namespace) -> dict[str, Run]:
    """Name of a workdir -> what fills it, in the order in which they are trained."""
    runs: dict[str, Run] = {}
    for seed, task, attention in itertools.product(range(args.seeds), args.tasks, args.attention):
        files = args.files or f"data/{task}"
        test = f"{files}/{TASKS[task].split.format('test')}"
        name, common = f"{task}-{attention}", f"task={task},attention={attention},files={files}"
        classifier = f"{common},steps={args.steps},seed={seed}"
        runs[f"{name}-scratch-s{seed}"] = Run(f"{classifier},causal=True", test)
        if args.pretrain_steps:
            pretrained = f"{name}-pretrained"
            runs[pretrained] = Run(f"{common},pretrain=next_token,steps={args.pretrain_steps}", None)
            runs[f"{name}-tuned-s{seed}"] = Run(f"{classifier},init_from={args.out / pretrained}", test, pretrained)
    return runs


def run(workdir: Path, runs: Mapping[str, Run]) -> bool:
    """Trains what is missing and scores the test split. Returns whether it ended well, and what it begins with had."""
    what = runs[workdir.name]
    if what.after and not is_done(workdir.with_name(what.after), get_config(runs[what.after].arguments)):
        return False
    if not is_done(workdir, get_config(what.arguments)) and not train(workdir, f"{CONFIG}:{what.arguments}"):
        return False
    result = workdir / "test.json"
    if what.test is None or result.exists():
        return True
    flags = (f"--workdir={workdir}", f"--text={what.test}", f"--json={result}")
    return run_logged(workdir, "-m", "darkformer_jax.evaluate", *flags)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of all workdirs")
    parser.add_argument("--tasks", default="listops", help="of configs/lra.py, comma-separated (default: %(default)s)")
    parser.add_argument("--attention", default=",".join(ATTENTIONS), help="mechanisms (default: %(default)s)")
    parser.add_argument("--files", help="directory of prepare_data's files, for one task (default: data/<task>)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. n-1 (default: 3)")
    parser.add_argument("--steps", type=int, default=1000, help="steps of a classifier (default: 1000)")
    parser.add_argument(
        "--pretrain_steps", type=int, default=1000, help="steps of self-pretraining; 0 = none (default: 1000)"
    )
    args = parser.parse_args(argv)
    args.out = args.out.absolute()
    for name, allowed in (("tasks", tuple(TASKS)), ("attention", tuple(MIXERS))):
        values = getattr(args, name).split(",")
        if unknown := [value for value in values if value not in allowed]:
            parser.error(f"--{name}: {unknown[0]!r} is unknown; allowed: {', '.join(allowed)}")
        setattr(args, name, values)
    if args.files and len(args.tasks) > 1:
        parser.error(f"--files={args.files} is for one task, and there are {len(args.tasks)}")
    if min(args.seeds, args.steps) < 1 or args.pretrain_steps < 0:
        parser.error("--seeds and --steps must be at least 1, --pretrain_steps at least 0")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Trains and scores what is missing. Ends with status 1, and names the runs, if some did not reach their end."""
    args = parse(argv)
    runs = plan(args)
    try:
        complete([args.out / name for name in runs], lambda workdir: run(workdir, runs))
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
