"""Imports a pretrained model into a workdir, or exports the model of a workdir.

    python -m darkformer_jax.convert --source=models/SmolLM2-135M --workdir=runs/smollm2      # a Hugging Face directory
    python -m darkformer_jax.convert --source=SmolLM2-135M.Q4_1.gguf --workdir=runs/smollm2   # needs the package gguf
    python -m darkformer_jax.convert --workdir=runs/smollm2 --export_hf=exported/smollm2

generate, evaluate and --config.init_from read the workdir like that of any run. Nothing is downloaded, and nothing in a
checkpoint is executed: of a Hugging Face directory, only safetensors, JSON and tokenizer files are read.
"""

import argparse
import re
from collections.abc import Sequence

from absl import app

from darkformer_jax.cli.output import lost_output_is_no_crash
from darkformer_jax.cli.parser import Parser, one_line_errors, whole
from darkformer_jax.cli.progress import progress_bar
from darkformer_jax.config import base
from darkformer_jax.errors import UserError
from darkformer_jax.pretrained.export import SHARD_GB, export_workdir
from darkformer_jax.pretrained.load import plan_import, run_import
from darkformer_jax.pretrained.source import open_source
from darkformer_jax.runs.workdir import Workdir

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; a mistake is one line and exit status 2."""
    parser = Parser("convert", __doc__)
    other = parser.add_mutually_exclusive_group(required=True)
    other.add_argument("--source", help="a Hugging Face directory, or a .gguf file, to import into --workdir")
    other.add_argument("--export_hf", help="directory to write the model of --workdir to; must be empty or not exist")
    parser.add_argument(
        "--workdir", required=True, help="workdir to export; with --source, to write: it must be empty or not exist"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the written arrays (default: unchanged, but a GGUF file and float16 become float32); "
        "float16 only for an export",
    )
    parser.add_argument("--step", type=whole, help="checkpoint to export (default: the newest)")
    parser.add_argument(
        "--as_exact",
        action="store_true",
        help="export other attention as exact attention, for programs that run no code of an export: another model",
    )
    parser.add_argument("--max_shard_size", help=f"largest exported file, in KB, MB or GB (default: {SHARD_GB}GB)")
    return parser.parse_args(argv[1:])


def main(args: argparse.Namespace) -> None:
    """Converts and prints what was written. A UserError becomes one line and exit status 2."""
    with one_line_errors("what was written is removed"):
        if args.source is None:
            _export(args)
        else:
            _import(args)


def _export(args: argparse.Namespace) -> None:
    written = export_workdir(
        Workdir(args.workdir),
        args.export_hf,
        step=args.step,
        dtype=args.dtype,
        shard_bytes=_bytes(f"{SHARD_GB}GB" if args.max_shard_size is None else args.max_shard_size),
        as_exact=args.as_exact,
        progress_bar=progress_bar,
    )
    print(f"{args.export_hf}: {written}")


def _import(args: argparse.Namespace) -> None:
    if args.step is not None:
        raise UserError(f"--step={args.step}: only an export chooses a checkpoint")
    if args.as_exact:
        raise UserError("--as_exact: only an export chooses how attention is written")
    if args.max_shard_size is not None:
        raise UserError(f"--max_shard_size={args.max_shard_size}: only an export writes such files")
    if args.dtype == "float16":
        raise UserError("--dtype=float16: allowed for a workdir: float32, bfloat16")
    plan = plan_import(open_source(args.source), base.get_config(), args.dtype)
    run_import(plan, args.workdir, progress_bar)
    model = plan.config.model
    task = f" {plan.head.task}" if plan.head else ""
    print(
        f"{args.workdir}: {plan.family.model_type}{task}, {model.num_layers} layers of width {model.embed_dim}, "
        f"{model.vocab_size:,} ids; {plan.num_bytes / 1e6:,.1f} MB"
    )


def _bytes(text: str) -> int:
    found = re.fullmatch(r"([0-9]+)(KB|MB|GB)", text)
    if not found or int(found[1]) == 0:
        raise UserError(f"--max_shard_size={text}: must be a number and a unit, like 500MB; units: {', '.join(_UNITS)}")
    return int(found[1]) * _UNITS[found[2]]


if __name__ == "__main__":
    with lost_output_is_no_crash():
        app.run(main, flags_parser=parse_flags)
