"""Benchmarks of EleutherAI's lm-evaluation-harness on a workdir's language model.

    python -m darkformer_jax.lm_eval --workdir=runs/smollm2 --tasks=arc_easy,hellaswag --limit=200
    python -m darkformer_jax.lm_eval --workdir=runs/smollm2 --tasks=my_task --include_path=tasks/ --json=my_task.json

A task is one of the harness' own, whose data it fetches from the Hugging Face hub, or a YAML file: with `dataset_path:
json` and `data_files: ...` it reads files here, and needs no network (HF_HUB_OFFLINE=1 forbids it). The requests and
their tokens are those of the harness' own model `hf` on the exported model, and so are the scores. Long contexts keep
their end; a model with DARK attention may read more tokens than it was trained on: --max_length.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import app

from darkformer_jax.cli.output import lost_output_is_no_crash
from darkformer_jax.cli.parser import Parser, one_line_errors, whole
from darkformer_jax.cli.progress import progress_bar
from darkformer_jax.config.base import DTYPES
from darkformer_jax.data.files import local_path, new_file, write_new
from darkformer_jax.errors import UserError
from darkformer_jax.runs.load import language_model_network, load_language_model
from darkformer_jax.runs.workdir import Workdir


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; a mistake is one line and exit status 2."""
    parser = Parser("lm_eval", __doc__)
    parser.add_argument("--workdir", required=True, help="directory of the run or of the imported model")
    parser.add_argument("--step", type=whole, help="checkpoint to use (default: the newest)")
    parser.add_argument(
        "--tasks",
        required=True,
        help="comma-separated names of tasks and groups, patterns such as arc_*, or .yaml files",
    )
    parser.add_argument("--include_path", help="a directory with the .yaml files of more tasks")
    parser.add_argument("--num_fewshot", type=whole, help="solved examples before a question (default: the task's own)")
    parser.add_argument("--limit", type=whole, help="run the first so many documents of each task (default: all)")
    parser.add_argument("--batch_size", type=whole, default=8, help="rows at a time (default: 8)")
    parser.add_argument(
        "--max_length", type=whole, help="most tokens that the model sees (default: the run's sequence_length)"
    )
    parser.add_argument(
        "--gen_kwargs",
        help="how tasks generate text, such as temperature=0.8,top_p=0.95,max_gen_toks=128 (default: as they say)",
    )
    parser.add_argument(
        "--apply_chat_template", action="store_true", help="questions are messages in the model's chat template"
    )
    parser.add_argument(
        "--confirm_run_unsafe_code", action="store_true", help="allow tasks that run the code which the model writes"
    )
    parser.add_argument(
        "--seed", type=whole, default=1234, help="of the choice of examples and of draws (default: 1234, the harness')"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="what the model computes in (default: what its run did)")
    parser.add_argument("--json", help="also write the results to this file, which must not exist")
    return parser.parse_args(argv[1:])


def main(args: argparse.Namespace) -> None:
    """Prints the harness' table. A UserError becomes one line and exit status 2."""
    with one_line_errors("nothing was written"):
        evaluate_tasks(args)


def evaluate_tasks(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the tasks, prints their table, writes the JSON file if one was asked for, and returns its content."""
    _check_flags(args)
    started = time.perf_counter()
    workdir = Workdir(args.workdir)
    language_model_network(workdir)  # a workdir that cannot be used is named before the harness, which takes seconds
    from darkformer_jax.harness.harness_model import HarnessModel
    from darkformer_jax.harness.run import TaskOptions, load_tasks, run_tasks, table

    options = TaskOptions(
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        gen_kwargs=args.gen_kwargs,
        apply_chat_template=args.apply_chat_template,
        allow_unsafe_code=args.confirm_run_unsafe_code,
        seed=args.seed,
    )
    tasks = load_tasks(args.tasks, args.include_path, options)
    model = load_language_model(workdir, args.step, dtype=args.dtype)
    longest = model.config.sequence_length
    max_length = args.max_length or longest
    if max_length > longest:
        print(f"note: --max_length={max_length} is more than the {longest} tokens of the run", file=sys.stderr)
    adapter = HarnessModel(model, max_length, args.batch_size, args.seed, progress_bar)
    results = run_tasks(adapter, tasks, options, progress_bar)
    seconds = time.perf_counter() - started
    flags = {name: value for name, value in vars(args).items() if name not in ("json", "workdir", "step", "max_length")}
    about = {"workdir": str(workdir), "step": model.step, "max_length": max_length, **flags, "seconds": seconds}
    print(f"{workdir} step {model.step}: at most {max_length:,} tokens; {seconds:.0f} s")
    print(table(results))
    result = about | results
    if args.json is not None:
        write_new("--json", args.json, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def _check_flags(args: argparse.Namespace) -> None:
    lowest = {"limit": 1, "batch_size": 1, "max_length": 1, "num_fewshot": 0, "seed": 0}
    for name, least in lowest.items():
        value = getattr(args, name)
        if value is not None and not least <= value < 2**31:
            raise UserError(f"--{name}={value}: must be from {least} to {2**31 - 1}")
    args.tasks = [local_path(name) if name.endswith(".yaml") else name for name in args.tasks.split(",")]
    for name in args.tasks:
        if not name:
            raise UserError(f"--tasks={','.join(args.tasks)}: an empty name; expected names with commas between them")
        if name.endswith(".yaml") and not os.path.isfile(name):
            raise UserError(f"--tasks={name}: no such file")
    if args.include_path is not None:
        args.include_path = local_path(args.include_path)
        if not os.path.isdir(args.include_path):
            raise UserError(f"--include_path={args.include_path}: no such directory")
    if args.json is not None:
        args.json = new_file("--json", args.json)
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "lm_eval needs the package lm_eval: bash launch/install.sh lm_eval, or pip install 'lm_eval>=0.4.13'"
        )


if __name__ == "__main__":
    with lost_output_is_no_crash():
        app.run(main, flags_parser=parse_flags)
