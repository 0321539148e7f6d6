"""Does this checkout train as an earlier one does, and continue its runs?

    git worktree add ../before <commit>
    python -m benchmarks.versions --before=../before

For each mechanism, both checkouts' train.py train a small model for 50 steps, in turns. Then this one continues a run
that the earlier one ended at step 25. Prints whether all metrics of all steps and every array of the last checkpoint
are the same, bit for bit, how far the losses are apart at most, and the time per step over the earlier one's: the
median over steps and turns. The exit status is 1 if a loss differs by more than 1e-6 or a run does not go on at its
step. Run it on CPU, from the repository's root.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: this process and those it starts

import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
STEPS, STOP, TOLERANCE = 50, 25, 1e-6

SIZES = {
    "batch_size": 8,
    "sequence_length": 256,
    "model.num_layers": 4,
    "model.embed_dim": 64,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_dim": 16,
    "model.mlp_dim": 128,
    "model.dtype": "float32",
    "data.source": "text",
    "data.files": str(ROOT / "docs" / "*.md"),
    "data.tokenizer": "bytes",
    "optimizer.schedule": "constant",  # a cosine would end at the step where a run is stopped
    "optimizer.warmup_steps": 5,
    "eval.every": 0,
    "checkpoint.every": STOP,
    "log.every": 1,
    "sample.max_new_tokens": 1,
}
KIND, WINDOW = "model.attention.kind", {"model.attention.chunk_size": 32, "model.attention.window": 32}
CASES: dict[str, dict[str, Any]] = {
    **{kind: {KIND: kind} for kind in ("softmax", "performer", "dark", "lfk", "random", "constant")},
    "softmax_local": {KIND: "softmax_local", "model.attention.local_window": 64},
    "window_only": {KIND: "window_only", **WINDOW},
    "dark, window": {
        KIND: "dark",
        "model.attention.window_kernel": "softmax",
        "model.attention.num_sinks": 2,
        **WINDOW,
    },
    "dark, redrawn": {KIND: "dark", "model.attention.redraw_every": 10},
    "softmax,dark": {"model.attention.pattern": "softmax,dark"},
}


def train(checkout: Path, case: str, workdir: Path, steps: int) -> str:
    """What train.py of a checkout says. Raises SystemExit if it fails."""
    fields = SIZES | CASES[case] | {"num_steps": steps}
    config = checkout / "configs" / "base.py"
    config = config if config.exists() else checkout / "darkformer_jax" / "config" / "base.py"
    flags = [f"--config={config}", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in fields.items())]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, str(checkout / "train.py"), *flags]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{checkout}: {case}: status {done.returncode}: {done.stderr[-2000:]}")
    return done.stderr


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def figures(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The training steps without what the clock says. A run that was stopped has one evaluation more."""
    return [{k: v for k, v in line.items() if k != "time"} for line in lines if "loss" in line]


def arrays(workdir: Path) -> dict[str, bytes]:
    """The arrays of the last step, read by Orbax alone."""
    saved = ocp.PyTreeCheckpointer().restore(workdir / "checkpoints" / str(STEPS))
    leaves = ocp.utils.to_flat_dict(saved, sep="/")
    return {name: np.asarray(leaf).tobytes() for name, leaf in leaves.items()}


def compare(before: Path, case: str, turns: int, directory: Path) -> tuple[bool, bool, float, float]:
    """(trained the same bits, continued to the same bits, largest difference of a loss, time per step now / before)."""
    seconds: dict[Path, list[float]] = {before: [], ROOT: []}
    for turn in range(turns):
        for checkout, times in seconds.items():
            workdir = directory / f"{checkout == ROOT}{turn}"
            train(checkout, case, workdir, STEPS)
            times += [line["time"]["step_seconds"] for line in metrics(workdir) if line["step"] > 2 and "time" in line]
    old, new, stopped = directory / "False0", directory / "True0", directory / "stopped"
    train(before, case, stopped, STOP)
    if f"resuming {stopped} from step {STOP}" not in train(ROOT, case, stopped, STEPS):
        sys.exit(f"{case}: this checkout does not continue the earlier one's run at step {STOP}")
    wanted = figures(metrics(old)), arrays(old)
    found = [(figures(metrics(workdir)), arrays(workdir)) for workdir in (new, stopped)]
    gaps = [abs(a["loss"] - b["loss"]) for lines, _ in found for a, b in zip(wanted[0], lines, strict=True)]
    return (
        found[0] == wanted,
        found[1] == wanted,
        max(gaps),
        float(np.median(seconds[ROOT]) / np.median(seconds[before])),
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, type=Path, help="a checkout of the earlier commit")
    parser.add_argument("--cases", default=";".join(CASES), help="separated by semicolons (default: all)")
    parser.add_argument("--turns", type=int, default=1, help="runs per checkout for the time (default: 1)")
    o = parser.parse_args()
    cases = o.cases.split(";")
    if unknown := [case for case in cases if case not in CASES]:
        parser.error(f"--cases: there is no {unknown[0]!r}; allowed: {'; '.join(CASES)}")
    if not (o.before / "train.py").is_file():
        parser.error(f"--before={o.before}: there is no train.py; give a checkout of this repository")
    if o.turns < 1:
        parser.error(f"--turns={o.turns}: must be at least 1")
    print(f"{'':16s} {'trained':10s} {'continued':10s} {'max |loss difference|':22s} time per step")
    worst = 0.0
    for case in tqdm(cases, unit="case", disable=None):
        with tempfile.TemporaryDirectory() as directory:
            trained, continued, gap, ratio = compare(o.before.resolve(), case, o.turns, Path(directory))
        words = ["same bits" if same else "DIFFERS" for same in (trained, continued)]
        tqdm.write(f"{case:16s} {words[0]:10s} {words[1]:10s} {gap:<22.1e} {ratio:.2f}x")
        worst = max(worst, gap)
    sys.exit(not worst <= TOLERANCE)


if __name__ == "__main__":
    main()
