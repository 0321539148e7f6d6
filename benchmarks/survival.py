"""kill -9 at random moments, saves included: does a run lose a committed step, or end differently from an unbroken one?

    python -m benchmarks.survival --kills=20

A tiny run is killed while it starts, steps or saves, and started again each time. After each kill, the newest step that
the disk had must be there and undamaged, and the next process must go on from it. At the end, metrics.jsonl and every
array of the last checkpoint must equal those of an undisturbed run, bit for bit. Prints what happened; the exit status
is 1 if any of this failed. Run it on CPU, from the repository's root.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: this process and those it starts

from darkformer_jax.runs.checkpoints import Checkpoints
from darkformer_jax.runs.workdir import Workdir
from tests.tiny_runs import (
    COMPILES,
    READS_COMPILED,
    Training,
    metrics_without_time,
    saved_arrays,
    tiny_flags,
    write_text,
)

SAVE_EVERY = 20
KINDS = ("start", "step", "step", "save", "save")  # moments; one that is listed twice is twice as likely


def flags(text: str, kills: int) -> list[str]:
    """Flags of a run with enough steps for `kills`, with evaluations, redraws and a line of progress per step."""
    return tiny_flags(
        num_steps=80 * (kills + 1),
        checkpoint__every=SAVE_EVERY,
        checkpoint__keep=2,
        eval__every=20,
        eval__batches=2,
        log__every=1,
        model__attention__redraw_every=10,
        data__files=text,
    )


def wait_for(moment: str, child: Training, good: int, rng: random.Random) -> None:
    """Returns at a random moment of that kind in the life of `child`, which goes on from step `good`."""
    if moment == "start":
        time.sleep(rng.uniform(0, 4))
    elif moment == "step":
        child.until(good + rng.randint(1, 2 * SAVE_EVERY))
        time.sleep(rng.uniform(0, 0.03))
    else:
        child.until((good // SAVE_EVERY + rng.randint(1, 2)) * SAVE_EVERY)  # printed right before the step is saved
        time.sleep(rng.uniform(0, 0.4))


def kill(child: Training, started: float, good: int) -> tuple[int, str, list[str]]:
    """Kills `child`, which began at `started`. Returns (the newest good step then, what was under way, problems)."""
    root = child.workdir / "checkpoints"
    seen = max(Checkpoints(Workdir(child.workdir)).committed_steps(), default=0)
    if child.stop(signal.SIGKILL) != -signal.SIGKILL:
        return good, "nothing", [f"the process ended by itself: {child.said[-1:]}"]
    checkpoints = Checkpoints(Workdir(child.workdir))
    committed = checkpoints.committed_steps()
    newest = checkpoints.latest_good_step() or 0
    problems = []
    if newest < max(seen, good):
        problems.append(f"step {max(seen, good)} was committed, and after the kill step {newest} is the newest")
    if newest != max(committed, default=0) or checkpoints.steps_without_manifest():
        problems.append(f"after the kill, some of the steps {committed} are damaged")
    if child.resumed_from() not in ([], [good]):
        problems.append(f"step {good} was the newest, but it went on from {child.resumed_from()}")
    marks = [path for path in root.glob("*.unfinished") if path.stat().st_mtime > started]
    if any(int(path.stem) > newest for path in marks):
        return newest, "save", problems
    if marks:
        return newest, "end of a save or removal of an older step", problems
    return newest, "step" if child.step() else "start", problems


def main() -> int:
    """Runs, kills, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        # A cache of its own: the killed processes read it, and only the unbroken run writes it.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(scratch) / "compiled")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
        return survive(Path(scratch), args.kills, random.Random(args.seed))


def survive(scratch: Path, kills: int, rng: random.Random) -> int:
    """Kills the run, compares it with an unbroken one, and returns the exit status."""
    text = write_text(scratch / "text.txt")
    unbroken, killed = scratch / "unbroken", scratch / "killed"
    Training(unbroken, flags(text, kills)).assert_ends_well()
    problems: list[str] = []
    under_way: Counter[str] = Counter()
    good = repeated = 0
    for number in range(1, kills + 1):
        moment = rng.choice(KINDS)
        started, child = time.time(), Training(killed, flags(text, kills), READS_COMPILED)
        wait_for(moment, child, good, rng)
        before = good
        good, what, wrong = kill(child, started, good)
        under_way[what] += 1
        problems += wrong
        again = max(child.step() - good, 0)
        repeated = max(repeated, again)
        reached = child.step() or "-"
        print(f"kill {number:3}: during {what}, step {before} -> {reached}; newest good {good}", flush=True)
    last = Training(killed, flags(text, kills), COMPILES)
    last.assert_ends_well()
    if last.resumed_from() != ([good] if good else []):
        problems.append(f"step {good} was the newest, but the last process went on from {last.resumed_from()}")
    if metrics_without_time(killed) != metrics_without_time(unbroken):
        problems.append("metrics.jsonl differs from the unbroken run's")
    if saved_arrays(killed) != saved_arrays(unbroken):
        problems.append("the last checkpoint differs from the unbroken run's")
    print(f"\n{kills} kills, during: {', '.join(f'{what} {count}' for what, count in under_way.most_common())}")
    print(f"committed steps lost or damaged: {'see below' if problems else 0}; steps to repeat at most: {repeated}")
    same = f"{len(metrics_without_time(unbroken))} lines of metrics and {len(saved_arrays(unbroken))} arrays"
    print("\n".join(problems) if problems else f"{same} equal the unbroken run's, bit for bit")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
