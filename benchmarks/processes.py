"""Trains with several real processes on this machine: kills, stops and restarts them, and checks what they refuse.

    python -m benchmarks.processes

Each process of a tiny run has one CPU device, and gloo carries their messages. However a run was interrupted, and
whatever its number of processes, it must end with the losses of one undisturbed process, to 1e-5: sums over two devices
are added in another order than over one. Prints each check; the exit status is 1 if one failed. Run it from the
repository's root.
"""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: this process and those it starts

from tests.tiny_runs import READS_COMPILED, Finished, Processes, Training, metrics_without_time, tiny_flags, write_text

STEPS, SAVE_EVERY, MINUTE = 60, 10, 60.0


class Checks:
    """Prints each check, and counts those that fail."""

    def __init__(self) -> None:
        self.failed = 0

    def check(self, holds: bool, what: str) -> None:
        self.failed += not holds
        print(f"{'ok    ' if holds else 'FAILED'}  {what}", flush=True)


def last_lines(ended: Sequence[Finished]) -> str:
    """The last line of each process's stderr, for a line of the report."""
    return " | ".join((end.err.splitlines() or [""])[-1][:150] for end in ended)


def losses(workdir: Path) -> dict[tuple[int, str], float]:
    """All losses in metrics.jsonl, by step and name."""
    return {
        (line["step"], name): value
        for line in metrics_without_time(workdir)
        for name, value in line.items()
        if name.endswith("loss")
    }


def compare(checks: Checks, unbroken: Path, workdir: Path, what: str) -> None:
    """Checks that two runs have the same losses."""
    expected, found = losses(unbroken), losses(workdir)
    same = expected.keys() == found.keys()
    difference = max((abs(expected[key] - found[key]) for key in expected.keys() & found.keys()), default=float("nan"))
    checks.check(
        same and difference < 1e-5, f"{what}: {len(found)} losses, at most {difference:.1e} from one process's"
    )


def kill(checks: Checks, processes: Processes, victim: int, step: int) -> None:
    """Sends SIGKILL to one process; the others must end with an error in under a minute."""
    processes.all[0].until(step)
    processes.all[victim].stop(signal.SIGKILL)
    started = time.monotonic()
    others = [process.wait() for number, process in enumerate(processes.all) if number != victim]
    seconds = time.monotonic() - started
    statuses = [end.status for end in others]
    checks.check(
        all(statuses) and seconds < MINUTE,
        f"kill -9 process {victim} of {len(processes.all)}: the others ended after {seconds:.1f} s with {statuses}",
    )
    print(f"        {last_lines(others)}")


def stop(checks: Checks, processes: Processes, victim: int, signum: int, step: int) -> None:
    """Sends a signal to one process; all must save the same step and end cleanly."""
    processes.all[0].until(step)
    os.kill(processes.all[victim].pid, signum)
    ended = processes.wait()
    lines = {end.err.splitlines()[-1] for end in ended}
    name = signal.Signals(signum).name
    checks.check(
        [end.status for end in ended] == [128 + signum] * len(ended) and len(lines) == 1,
        f"{name} to process {victim} of {len(ended)}: {[end.status for end in ended]}, {' / '.join(sorted(lines))}",
    )


def finish(checks: Checks, processes: Processes) -> None:
    """Waits until all processes end, which must be well."""
    ended = processes.wait()
    statuses = [end.status for end in ended]
    checks.check(not any(statuses), f"{len(ended)} processes to the end: {statuses}")
    if any(statuses):
        print(f"        {last_lines(ended)}")


def refused(checks: Checks, what: str, words: str, processes: Processes, status: int = 2) -> None:
    """Checks that every process ends with the status and one error line that has `words`."""
    started = time.monotonic()
    ended = processes.wait()
    seconds = time.monotonic() - started
    errors = [[line for line in end.err.splitlines() if line.startswith("error: ")] for end in ended]
    holds = all(end.status == status for end in ended) and all(
        len(lines) == 1 and words in lines[0] for lines in errors
    )
    checks.check(holds, f"{what}: {[end.status for end in ended]} after {seconds:.1f} s")
    print(f"        {last_lines(ended)}")


def two_one_two(checks: Checks, scratch: Path, begin: Callable[..., Processes], flags: Sequence[str]) -> None:
    """Two processes, one of them killed; then one process, stopped; then two processes."""
    workdir = scratch / "two"
    kill(checks, begin(2, workdir), victim=1, step=2 * SAVE_EVERY + 3)
    alone = Training(workdir, flags, READS_COMPILED)
    alone.until(3 * SAVE_EVERY + 3)
    checks.check(alone.stop(signal.SIGTERM) == 143, f"one process goes on from {alone.resumed_from()} and is stopped")
    checkpoints = workdir / "checkpoints"
    newest = max(int(path.name.split(".")[0]) for path in checkpoints.glob("*.sha256.json"))
    damaged = max((path for path in (checkpoints / str(newest)).rglob("*") if path.is_file()), key=os.path.getsize)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    last = begin(2, workdir)
    finish(checks, last)
    (resumed,) = last.all[0].resumed_from()
    checks.check(resumed < newest, f"step {newest} was damaged: both went on from step {resumed}")
    compare(checks, scratch / "unbroken", workdir, "2 -> 1 -> 2 processes")


def four_four_two(checks: Checks, scratch: Path, begin: Callable[..., Processes]) -> None:
    """Four processes, the first killed; four, stopped through the last one; four, stopped by Ctrl-C; then two."""
    workdir = scratch / "four"
    kill(checks, begin(4, workdir), victim=0, step=SAVE_EVERY + 3)
    stop(checks, begin(4, workdir), victim=3, signum=signal.SIGTERM, step=2 * SAVE_EVERY + 3)
    stop(checks, begin(4, workdir), victim=1, signum=signal.SIGINT, step=3 * SAVE_EVERY + 3)
    finish(checks, begin(2, workdir))
    compare(checks, scratch / "unbroken", workdir, "4 -> 4 -> 4 -> 2 processes")


def meshes(checks: Checks, scratch: Path, begin: Callable[..., Processes]) -> None:
    """The state is split over two processes. They read the same rows if the mesh does not split the batch."""
    for axis in ("fsdp", "tensor", "context"):
        finish(checks, begin(2, scratch / axis, ["--config.mesh.data=1", f"--config.mesh.{axis}=2"]))
        compare(checks, scratch / "unbroken", scratch / axis, f"2 processes, mesh.{axis} = 2")


def refusals(checks: Checks, scratch: Path, begin: Callable[..., Processes]) -> None:
    """Mistakes that must be refused and must not hang."""
    new = scratch / "new"
    short = ["--coordinator_timeout=3"]
    each = {1: ["--config.optimizer.learning_rate=0.5"]}
    refused(checks, "another learning rate in one", "optimizer.learning_rate: 0.5 here", begin(4, new, each=each))
    refused(checks, "not one workdir", "process 1 cannot see", begin(2, [scratch / "here", scratch / "there"]))
    refused(checks, "one missing", "process 1 of 3 did not come within 3 s", begin(3, new, short, start=(0, 2)), 1)
    refused(checks, "no coordinator", "cannot be reached within 3 s", begin(2, new, short, start=(1,)), 1)
    cwds = [scratch / name for name in ("with", "shorter", "without")]
    for cwd in cwds:
        cwd.mkdir()
    write_text(cwds[0] / "mine.txt")
    write_text(cwds[1] / "mine.txt", 5000)
    relative = ["--config.data.files=mine.txt"]
    refused(checks, "another text in one", "fingerprint: ", begin(2, new, relative, cwds=cwds[:2]))
    refused(checks, "no text in one", "no file matches", begin(2, new, relative, cwds=cwds[::2]))
    checks.check(not any((scratch / name).exists() for name in ("new", "here", "there")), "and nothing was written")


def main() -> int:
    """Runs all checks and returns the exit status."""
    checks = Checks()
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        # A cache of its own: the killed processes read it, and only the unbroken run writes it.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(scratch / "compiled")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        files: dict[str, object] = {"data__files": write_text(scratch / "text.txt")}
        files["model__vocab_size"] = 290  # even, for mesh.tensor = 2
        files["sequence_length"] = 64  # with mesh.context = 2, a process has as many tokens as a window
        flags = tiny_flags(
            num_steps=STEPS, checkpoint__keep=2, checkpoint__every=SAVE_EVERY, eval__every=SAVE_EVERY, **files
        )

        def begin(
            count: int, workdirs: Path | Sequence[Path], more: Sequence[str] = (), **options: object
        ) -> Processes:
            return Processes(count, workdirs, [*flags, *more], jax_config=READS_COMPILED, **options)  # type: ignore[arg-type]

        Training(scratch / "unbroken", flags).assert_ends_well()
        refusals(checks, scratch, begin)
        meshes(checks, scratch, begin)
        two_one_two(checks, scratch, begin, flags)
        four_four_two(checks, scratch, begin)
    print(f"\n{checks.failed} checks failed" if checks.failed else "\nall held")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
