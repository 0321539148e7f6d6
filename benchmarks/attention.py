"""Times causal attention: ours against exact attention and the PyTorch peers, in one run.

    python -m benchmarks.attention                          # the table: L = 1024, 4096, 16384
    python -m benchmarks.attention --only=ours,exact-jax --lengths=512,2048 --repeats=5
    python -m benchmarks.attention --crossover --decode --memory --out=attention.json

Sizes: batch 1, 8 heads of 64, 256 features; inputs are N(0, 1), in each library's own axis order. "forward+backward" is
the output and the gradients of q, k, v and of the learned geometry if there is one. The contenders take turns within
every repetition, so noise hits all of them. On a busy machine, still read the minima: PyTorch's threads wait for each
other and lose more to other processes than XLA's, so the medians flatter ours.
Contenders that are not installed, or need more memory than is free, are left out, and the table says why. Below it is
the roofline, in float32: what the machine's rates, measured in the same run, allow, and the share that `ours` reaches.

--memory, --decode and --crossover measure only what they name; add --lengths to get the table as well.
"""

import argparse
import functools
import gc
import itertools
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array
from tqdm import tqdm

from benchmarks.contenders import (
    BATCH,
    CHUNK,
    CONTENDERS,
    FEATURES,
    HEAD_DIM,
    HEADS,
    Problem,
    Row,
    Run,
    Skipped,
    build_ours,
    jax_inputs,
    kernel_parameters,
    start_devices_for_cores,
)
from benchmarks.roofline import measure_rates, roofline
from darkformer_jax import dark_attention

LENGTHS = (1024, 4096, 16384)
CROSSOVER_LENGTHS = (256, 512, 1024, 2048, 4096)
DECODE_CONTEXTS = (1024, 4096, 16384, 65536)
DECODE_BASE = 4096  # ratios are to this context
DECODE_TURNS = 4  # these runs are short: this many times --repeats
EXACT_TOKENS = 4  # one takes long after 64k tokens
MEMORY_LENGTH, MEMORY_LIMIT_GIB = 65536, 3.0
SETTLE_SECONDS = 0.05  # between two contenders, until the idle threads of the first stop spinning
SLOW_SECONDS, SLOW_REPEATS = 5.0, 3  # a run that takes longer is repeated only so often
PEERS = ("torch", "darkformer-pytorch", "performer-pytorch")


def interleave(runs: dict[str, Run], repeats: int, bar: tqdm) -> dict[str, list[float]]:
    """Seconds of each run. The runs take turns; the first turn of each (compilation, caches) is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    turns = dict.fromkeys(runs, repeats)
    for turn in range(-1, repeats):
        for name, run in runs.items():
            if turn >= turns[name]:
                bar.update()
                continue
            gc.collect()
            time.sleep(SETTLE_SECONDS)
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if turn >= 0:
                seconds[name].append(elapsed)
            elif elapsed > SLOW_SECONDS:
                turns[name] = min(repeats, SLOW_REPEATS)
            bar.update()
    return seconds


def time_problem(problem: Problem, names: Sequence[str], repeats: int, bar: tqdm) -> list[Row]:
    """One row per contender: the median, or why there is none."""
    runs, skipped = {}, {}
    bar.set_description(f"L={problem.length} {'forward+backward' if problem.backward else 'forward'}")
    for name in names:
        try:
            runs[name] = CONTENDERS[name](problem)
        except Skipped as reason:
            skipped[name] = str(reason)
            bar.update(repeats + 1)
    seconds = interleave(runs, repeats, bar)
    rows = []
    for name in names:
        row: Row = {"length": problem.length, "pass": "forward+backward" if problem.backward else "forward"}
        row |= {"contender": name, "skipped": skipped.get(name)}
        if name in runs:
            row |= {"median_ms": 1e3 * statistics.median(seconds[name]), "min_ms": 1e3 * min(seconds[name])}
            row |= {"runs_ms": [1e3 * s for s in seconds[name]]}
            for base in ("ours", "ours-hybrid"):
                if base in runs:
                    # A pair is from the same repetition, so what slowed both down cancels.
                    pairs = zip(seconds[name], seconds[base], strict=False)
                    row[f"times_{base}"] = statistics.median(mine / theirs for mine, theirs in pairs)
                    row[f"min_times_{base}"] = min(seconds[name]) / min(seconds[base])
        rows.append(row)
    return rows


def table(rows: Sequence[Row]) -> str:
    """Rows of `time_problem` as text. The last two columns compare minima."""
    names = ("times_ours", "times_ours-hybrid", "min_times_ours", "min_times_ours-hybrid")
    titles = ("/ ours", "/ hybrid", "min/ours", "min/hybr.")
    head = f"{'L':>6}  {'pass':16}  {'contender':18}  {'median ms':>9}  {'min ms':>9}"
    lines = [head + "".join(f"  {title:>9}" for title in titles)]
    for row in rows:
        head = f"{row['length']:>6}  {row['pass']:16}  {row['contender']:18}  "
        if row["skipped"]:
            lines.append(head + f"skipped: {row['skipped']}")
            continue
        ratios = [f"{row[name]:.2f}x" if name in row else "-" for name in names]
        lines.append(
            head + f"{row['median_ms']:9.1f}  {row['min_ms']:9.1f}" + "".join(f"  {ratio:>9}" for ratio in ratios)
        )
    return "\n".join(lines)


def time_table(lengths: Sequence[int], names: Sequence[str], repeats: int, dtype: str) -> list[Row]:
    """All lengths, forward and forward+backward. Each part is printed as soon as it is there."""
    rows: list[Row] = []
    problems = [Problem(length, backward, dtype) for length in lengths for backward in (False, True)]
    with tqdm(total=len(problems) * len(names) * (repeats + 1), disable=None, leave=False) as bar:
        for problem in problems:
            part = time_problem(problem, names, repeats, bar)
            text = table(part)
            tqdm.write(text if not rows else text.partition("\n")[2])
            rows += part
    return rows


def crossover(rows: Sequence[Row], exact: str, ours: str, direction: str) -> str:
    """The length from which `ours` is faster than `exact`, interpolated between the two lengths around it."""
    ratios = sorted(
        (row["length"], math.log(row[f"times_{ours}"]))
        for row in rows
        if row["contender"] == exact and row["pass"] == direction and not row["skipped"]
    )
    if not ratios:
        return "unknown"
    if ratios[0][1] > 0:
        return f"below {ratios[0][0]}"
    for (low, before), (high, after) in itertools.pairwise(ratios):
        if after > 0:
            return f"{low * (high / low) ** (before / (before - after)):.0f}"
    return f"above {ratios[-1][0]}"


def time_crossover(names: Sequence[str], repeats: int, dtype: str) -> tuple[list[Row], list[Row]]:
    """(timings, the lengths from which each of ours overtakes each exact attention)."""
    names = [name for name in names if name in ("ours", "ours-hybrid", "exact-jax", "exact-torch")]
    rows = time_table(CROSSOVER_LENGTHS, names, repeats, dtype)
    found: list[Row] = [
        {"ours": ours, "exact": exact, "pass": direction, "length": crossover(rows, exact, ours, direction)}
        for exact in ("exact-jax", "exact-torch")
        for ours in ("ours", "ours-hybrid")
        for direction in ("forward", "forward+backward")
        if {ours, exact} <= set(names)
    ]
    print("\nfaster than exact attention from this length on:")
    for row in found:
        print(f"  {row['ours']:12}  {row['exact']:12}  {row['pass']:16}  {row['length']}")
    return rows, found


def decode_run(context: int, window: int, dtype: str) -> Run:
    """A run of CHUNK one-token steps after `context` tokens, so that every run folds the window exactly once."""
    inputs = (*jax_inputs(context, dtype), kernel_parameters()[1])
    q, k, v = (x[:, :1] for x in inputs[:3])
    projections, geometry = kernel_parameters()
    attend = functools.partial(dark_attention, geometry=geometry, chunk_size=CHUNK, window=window)

    @jax.jit
    def prefill(q: Array, k: Array, v: Array, projections: Array) -> Any:
        return attend(q, k, v, projections=projections, return_state=True)[1]

    @functools.partial(jax.jit, donate_argnums=4)
    def step(q: Array, k: Array, v: Array, projections: Array, state: Any) -> tuple[Array, Any]:
        return attend(q, k, v, projections=projections, state=state, return_state=True)

    kept = [prefill(*inputs[:3], projections)]

    def run() -> None:
        for _ in range(CHUNK):
            out, kept[0] = step(q, k, v, projections, kept[0])
        jax.block_until_ready((out, kept[0]))

    return run


def decode_exact_run(context: int, dtype: str) -> Run:
    """A run of EXACT_TOKENS queries, one at a time, against a cache of `context` keys."""
    q, k, v = jax_inputs(context, dtype)
    q = q[:, -1:]
    attend = jax.jit(functools.partial(jax.nn.dot_product_attention, implementation="xla"))

    def run() -> None:
        for _ in range(EXACT_TOKENS):
            out = attend(q, k, v)
        jax.block_until_ready(out)

    return run


def time_decode(repeats: int, dtype: str) -> list[Row]:
    """Milliseconds per token after short and long contexts."""
    names = {"ours": CHUNK, "ours-hybrid": CHUNK, "exact-jax": EXACT_TOKENS}  # tokens of one run
    runs: dict[str, Run] = {}
    for context in DECODE_CONTEXTS:
        runs[f"ours {context}"] = decode_run(context, 0, dtype)
        runs[f"ours-hybrid {context}"] = decode_run(context, CHUNK, dtype)
        runs[f"exact-jax {context}"] = decode_exact_run(context, dtype)
    repeats *= DECODE_TURNS
    with tqdm(total=len(runs) * (repeats + 1), desc="decode", disable=None, leave=False) as bar:
        seconds = interleave(runs, repeats, bar)
    rows = []
    titles = "  ".join(f"{context:>8}" for context in DECODE_CONTEXTS)
    print(f"\ntime per token, ms, after   {titles}  tokens; ratios to {DECODE_BASE}")
    for name, tokens in names.items():
        times = {context: seconds[f"{name} {context}"] for context in DECODE_CONTEXTS}
        base = times[DECODE_BASE]
        medians = [1e3 * statistics.median(of) / tokens for of in times.values()]
        ratios = [statistics.median(b / a for a, b in zip(base, of, strict=True)) for of in times.values()]
        min_ratios = [min(of) / min(base) for of in times.values()]
        row: Row = {"contender": name, "contexts": DECODE_CONTEXTS, "ms_a_token": medians}
        rows.append(row | {"ratios": ratios, "min_ratios": min_ratios})
        print(f"  {name:24}" + "  ".join(f"{median:8.3f}" for median in medians))
        for title, values in (("ratio", ratios), ("ratio of the fastest", min_ratios)):
            print(f"    {title:22}" + "  ".join(f"{value:8.2f}" for value in values))
    return rows


def resident_bytes() -> int:
    """The memory of this process now, or, where Linux's /proc is missing, the most it ever had."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most memory this process ever had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_growth(window: int, dtype: str) -> int:
    """Bytes that forward+backward, gradients included, adds to the inputs. Needs a process of its own."""
    run = build_ours(Problem(MEMORY_LENGTH, True, dtype), window)
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    before = stats.get("bytes_in_use", resident_bytes())
    run()
    stats = device.memory_stats() or {}
    return stats.get("peak_bytes_in_use", peak_resident_bytes()) - before


def measure_memory(dtype: str) -> list[Row]:
    """Peak memory growth of forward+backward, each in a fresh process."""
    rows = []
    print(f"\nmemory of forward+backward at L = {MEMORY_LENGTH} (limit {MEMORY_LIMIT_GIB} GiB):")
    for name, window in (("ours", 0), ("ours-hybrid", CHUNK)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            gib = pool.apply(memory_growth, (window, dtype)) / 2**30
        rows.append({"contender": name, "length": MEMORY_LENGTH, "gib": gib, "within_limit": gib < MEMORY_LIMIT_GIB})
        print(f"  {name:12}  {gib:.2f} GiB{'' if gib < MEMORY_LIMIT_GIB else '  OVER THE LIMIT'}")
    return rows


# ---- command line


def environment(dtype: str) -> Row:
    """The machine, versions and sizes that the numbers depend on."""
    versions: dict[str, str | None] = {}
    for package in ("jax", "jaxlib", *PEERS):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "versions": versions,
        "dtype": dtype,
        "sizes": {"batch": BATCH, "heads": HEADS, "head_dim": HEAD_DIM, "features": FEATURES, "chunk": CHUNK},
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", help=f"tokens, comma-separated (default {','.join(map(str, LENGTHS))})")
    parser.add_argument(
        "--repeats", type=int, default=7, help="turns of each contender; medians are reported (default 7)"
    )
    parser.add_argument(
        "--only", default=",".join(CONTENDERS), help="contenders, comma-separated (default %(default)s)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default %(default)s)")
    parser.add_argument("--decode", action="store_true", help="time per token after 1k to 64k tokens of context")
    parser.add_argument("--memory", action="store_true", help="peak memory growth of forward+backward at L = 65,536")
    parser.add_argument("--crossover", action="store_true", help="the length from which ours is faster than exact")
    parser.add_argument("--out", type=Path, help="also write everything to this JSON file")
    flags = parser.parse_args(arguments)
    flags.only = flags.only.split(",")
    unknown = set(flags.only) - set(CONTENDERS)
    if unknown:
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; allowed: {', '.join(CONTENDERS)}")
    try:
        flags.lengths = None if flags.lengths is None else [int(length) for length in flags.lengths.split(",")]
    except ValueError:
        parser.error(f"--lengths={flags.lengths}: expected whole numbers, comma-separated")
    if flags.repeats < 1 or min(flags.lengths or [1]) < 1:
        parser.error("--repeats and --lengths must be at least 1")
    if flags.out and not flags.out.absolute().parent.is_dir():
        parser.error(f"--out={flags.out}: there is no directory {flags.out.absolute().parent}")
    if flags.lengths is None and not (flags.decode or flags.memory or flags.crossover):
        flags.lengths = list(LENGTHS)
    return flags


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the flags ask for."""
    flags = parse(arguments)
    if any(name.endswith("-cores") for name in flags.only):
        start_devices_for_cores()
    if flags.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "float32")  # as torch does: float32 must not mean tf32
    results: Row = {"environment": environment(flags.dtype)}
    described = results["environment"]
    print(
        f"{described['device']}, {described['cpus']} CPUs, load {described['load_average'][0]:.1f}, {flags.dtype}; ",
        end="",
    )
    print(", ".join(f"{name} {version}" for name, version in described["versions"].items() if version))
    if flags.memory:  # first: a child process starts from its parent's peak memory
        results["memory"] = measure_memory(flags.dtype)
    if flags.decode:
        results["decode"] = time_decode(flags.repeats, flags.dtype)
    if flags.crossover:
        results["crossover_timings"], results["crossover"] = time_crossover(flags.only, flags.repeats, flags.dtype)
    if flags.lengths:
        rates = measure_rates() if flags.dtype == "float32" else None
        results["table"] = time_table(flags.lengths, flags.only, flags.repeats, flags.dtype)
        if rates is not None:
            results["rates"], results["roofline"] = rates._asdict(), roofline(results["table"], rates)
    results["load_average_after"] = os.getloadavg()
    if flags.out:
        flags.out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\nwritten to {flags.out}")


if __name__ == "__main__":
    main()
