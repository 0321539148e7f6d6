"""What one GPU does: attention beside its peers, and training steps of a language model of 1.0 B parameters.

    bash launch/install.sh gpu && pip install -c constraints/py3.11.txt ".[peers]"
    python -m benchmarks.gpu --out=results/gpu
    python -m benchmarks.gpu --out=try --shape=tiny --lengths=256 --contexts=256 --repeats=1     # on any machine

One command after another, each in a process of its own, so that none finds memory taken: the card and its clocks;
`benchmarks.attention` in bfloat16, in which exact attention is cuDNN's, with decoding and peak memory; and `train.py`
with each form of attention and each context, whose last steps are recorded for TensorBoard or xprof, in
<out>/<run>/profile.
A step has 16,384 tokens, rows of the standard library's text; layers are computed again in the backward pass. Model
FLOP/s utilisation counts what the mathematics needs, and not what is computed again.

A part that fails is named, and the others run. <out>/gpu.json has every figure.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from darkformer_jax.tasks.table import table_lines

SHAPES: dict[str, dict[str, Any]] = {
    # TinyLlama's (arXiv 2401.02385), but for embeddings that input and output share.
    "1b": {
        "vocab_size": 32_000,
        "num_layers": 22,
        "embed_dim": 2048,
        "num_heads": 32,
        "num_kv_heads": 4,
        "head_dim": 64,
        "mlp_dim": 5632,
        "dtype": "bfloat16",
        "remat": "full",
    },
    "tiny": {"num_layers": 2, "embed_dim": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "mlp_dim": 64},
}
FORMS: dict[str, dict[str, Any]] = {
    "softmax": {"kind": "softmax"},
    "dark": {"kind": "dark", "num_features": 256, "chunk_size": 128},
    "dark, gates": {"kind": "dark", "num_features": 256, "chunk_size": 128, "decay": "gate"},
    "dark, window 256": {"kind": "dark", "num_features": 256, "chunk_size": 128, "window": 256, "num_sinks": 4},
}
FORMS |= {f"{form}, parallel": fields | {"backend": "parallel"} for form, fields in FORMS.items() if form != "softmax"}
PLAIN = {"decay": "none", "conv_width": 0, "window": 0}  # which the quickstart sets otherwise
TOKENS, STEPS, RECORDED = 16_384, 30, 3


def training(form: str, context: int, flags: argparse.Namespace, workdir: Path) -> list[str]:
    """The command of one training run."""
    attention = PLAIN | FORMS[form]
    fields = {f"model.{name}": value for name, value in SHAPES[flags.shape].items()}
    fields |= {f"model.attention.{name}": value for name, value in attention.items()}
    fields |= {
        "data.tokenizer": "bytes",
        "sequence_length": context,
        "batch_size": max(1, (TOKENS if flags.shape == "1b" else 512) // context),
        "num_steps": STEPS,
        "profile.first_step": STEPS - RECORDED,
        "profile.steps": RECORDED,
        "eval.every": 0,
        "checkpoint.every": 0,
        "log.every": 10,
        "sample.prompts": "()",
    }
    settings = [f"--config.{name}={value}" for name, value in fields.items()]
    return [sys.executable, "train.py", "--config=configs/quickstart.py", f"--workdir={workdir}", *settings]


def run(name: str, command: Sequence[str], log: Path) -> str | None:
    """Runs a command into a log; what went wrong, or None."""
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if not status:
        return None
    last = (log.read_text().strip().splitlines() or [""])[-1]
    tqdm.write(f"{name} failed ({log}): {last}")
    return last


def figures(workdir: Path) -> dict[str, Any]:
    """Of the last steps that were not recorded: tokens per second, utilisation, and peak memory."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "tokens_per_second" in line.get("time", {})]
    before, last = steps[-2]["time"], steps[-1]["time"]
    names = ("tokens_per_second", "step_seconds", "mfu")
    return {name: before.get(name) for name in names} | {"device_memory_bytes": last.get("device_memory_bytes")}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For people to read; speeds beside exact attention's of the same context."""
    exact = {row["context"]: row.get("tokens_per_second") for row in rows if row["form"] == "softmax"}
    cells = []
    for row in rows:
        if row["failed"]:
            cells.append([row["form"], f"{row['context']:,}", f"failed: {row['failed'][:60]}", "", "", ""])
            continue
        speed, of_exact = row["tokens_per_second"], exact.get(row["context"])
        mfu, memory = row["mfu"], row["device_memory_bytes"]
        cells.append(
            [
                row["form"],
                f"{row['context']:,}",
                f"{speed:,.0f}",
                f"{speed / of_exact:.2f}x" if of_exact else "",
                "" if mfu is None else f"{mfu:.1%}",
                "" if memory is None else f"{memory / 2**30:.1f}",
            ]
        )
    return "\n".join(table_lines([["attention", "context", "tokens/s", "of exact", "MFU", "GiB"], *cells]))


def card() -> str:
    """The card and its clocks, by nvidia-smi; a line that says so where there is none."""
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    try:
        shown = subprocess.run(["nvidia-smi", query, "--format=csv"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "no nvidia-smi on this machine"
    return shown.stdout.strip()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = lambda text: [int(number) for number in text.split(",")]
    parser.add_argument("--out", required=True, type=Path, help="directory of all that is written; new or empty")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="1b", help="of the trained model (default 1b)")
    parser.add_argument("--lengths", type=numbers, default=[2048, 8192, 16384, 65536], help="of attention alone")
    parser.add_argument("--contexts", type=numbers, default=[2048, 8192], help="of training")
    parser.add_argument("--forms", default=";".join(FORMS), help="of training, separated by semicolons (default: all)")
    parser.add_argument("--repeats", type=int, default=7, help="turns of attention alone (default 7)")
    flags = parser.parse_args(arguments)
    flags.forms = flags.forms.split(";")
    if unknown := [form for form in flags.forms if form not in FORMS]:
        parser.error(f"--forms: there is no {unknown[0]!r}; allowed: {'; '.join(FORMS)}")
    if flags.out.exists() and any(flags.out.iterdir()):
        parser.error(f"--out={flags.out}: it is not empty")
    return flags


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs everything; the exit status is 1 if a part failed."""
    flags = parse(arguments)
    flags.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"card": card()}
    print(found["card"], flush=True)
    lengths = ",".join(map(str, flags.lengths))
    attention = [sys.executable, "-m", "benchmarks.attention", "--dtype=bfloat16", f"--lengths={lengths}"]
    attention += [f"--repeats={flags.repeats}", f"--out={flags.out / 'attention.json'}"]
    attention += ["--decode", "--memory"] if flags.shape == "1b" else []
    parts: list[tuple[str, list[str], dict[str, Any] | None]] = [("attention", attention, None)]
    for context in flags.contexts:
        for form in flags.forms:
            name = f"{form.replace(', ', '-').replace(' ', '')}-{context}"
            row = {"form": form, "context": context, "workdir": name}
            parts.append((name, training(form, context, flags, flags.out / name), row))
    rows, failed = [], 0
    for name, command, row in tqdm(parts, unit="part", disable=None):
        wrong = run(name, command, flags.out / f"{name}.log")
        failed += wrong is not None
        if row is None:
            tqdm.write((flags.out / f"{name}.log").read_text())
        else:
            rows.append(row | {"failed": wrong} | ({} if wrong else figures(flags.out / name)))
        (flags.out / "gpu.json").write_text(json.dumps(found | {"training": rows}, indent=1) + "\n")
    print(table(rows))
    print(f"\nwritten to {flags.out}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
