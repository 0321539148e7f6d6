"""A long tiny run with saves and evaluations: does anything grow that should not?

    python -m benchmarks.soak --steps=2000

Trains in a process of its own, saves every 10 steps, evaluates every 20 and redraws the projections every 50. Every 100
steps it prints the process's anonymous resident memory, open file descriptors, threads, and programs compiled since the
start. The exit status is 1 if a program was compiled in the run's second half, or if from the first half to the second
the median of the descriptors or threads rose by more than 5, or that of the memory by more than 2%. Run it on Linux, on
CPU, from the repository's root.

A growth of some 70 kB per save remains below that limit. At least a part of it is TensorStore 0.1.86's: each
`KvStore.Spec.to_json`, which Orbax calls for every array, keeps four Python objects.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: this process and those it starts

from tests.tiny_runs import COMPILES, Training, tiny_flags, write_text

SAMPLE_EVERY = 100  # steps
WARM_UP = 200  # steps
MEMORY_GROWTH = 0.02
NOISE = 5  # files and threads of saves under way; a leak of one per save would be 10 or more


class Sample(NamedTuple):
    """The process's resources at a step."""

    step: int
    memory_bytes: int
    files: int
    threads: int
    programs: int


def sample(child: Training) -> Sample:
    """The sample of a running process."""
    process = Path(f"/proc/{child.pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return Sample(
        child.step(),
        1024 * int(status["RssAnon"].removesuffix("kB")),
        len(os.listdir(process / "fd")),
        len(os.listdir(process / "task")),
        child.err.read_text().count("Finished XLA compilation of"),  # jax_log_compiles
    )


def watch(child: Training, steps: int) -> list[Sample]:
    """Samples every SAMPLE_EVERY steps, printed as they come."""
    samples: list[Sample] = []
    print(f"{'step':>6} {'memory MB':>10} {'files':>6} {'threads':>8} {'programs':>9}")
    for step in range(SAMPLE_EVERY, steps, SAMPLE_EVERY):
        while child.step() < step:
            child.assert_runs()
            time.sleep(0.05)
        samples.append(sample(child))
        now = samples[-1]
        print(f"{now.step:6} {now.memory_bytes / 1e6:10.1f} {now.files:6} {now.threads:8} {now.programs:9}", flush=True)
    return samples


def growth(samples: list[Sample]) -> list[str]:
    """The names of what grew."""
    warm = [each for each in samples if each.step >= WARM_UP]
    first, second = warm[: len(warm) // 2], warm[len(warm) // 2 :]
    medians = {
        name: [statistics.median(getattr(each, name) for each in half) for half in (first, second)]
        for name in ("memory_bytes", "files", "threads")
    }
    shown = "; ".join(f"{name} {before:,.0f}, {after:,.0f}" for name, (before, after) in medians.items())
    print(f"medians of the halves: {shown}")
    grew = [name for name in ("files", "threads") if medians[name][1] - medians[name][0] > NOISE]
    if medians["memory_bytes"][1] > medians["memory_bytes"][0] * (1 + MEMORY_GROWTH):
        grew.append("memory")
    if second[-1].programs > first[-1].programs:
        grew.append("programs")
    return grew


def main() -> int:
    """Runs, watches, judges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="at least 600 (default: 2000)")
    args = parser.parse_args()
    if args.steps < 600:
        parser.error(f"--steps={args.steps}: must be at least 600")
    with tempfile.TemporaryDirectory() as scratch:
        flags = tiny_flags(
            num_steps=args.steps,
            checkpoint__every=10,
            checkpoint__keep=2,
            eval__every=20,
            eval__batches=2,
            log__every=10,
            model__attention__redraw_every=50,
            data__files=write_text(Path(scratch) / "text.txt"),
        )
        child = Training(Path(scratch) / "run", flags, COMPILES | {"jax_log_compiles": True})
        grew = growth(watch(child, args.steps))
        child.assert_ends_well()
    print(f"grew: {', '.join(grew)}" if grew else "memory, files, threads and programs: flat")
    return 1 if grew else 0


if __name__ == "__main__":
    sys.exit(main())
